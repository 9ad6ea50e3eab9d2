"""`moe-runtime steer eval`: whether steering helps, measured on tasks beside its controls.

Knows options and how a run is started; does not know how it is measured or shown.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from moe_runtime.cli.options import (
    DebugOption,
    DtypeOption,
    JsonOption,
    LocalOption,
    ModelArgument,
    PolicyOption,
    RevisionOption,
    SubfolderOption,
    VariantOption,
    checked_budget,
    hub_options,
    outcome_place,
)
from moe_runtime.cli.session import emit_json, quiet_libraries, session, to_stderr
from moe_runtime.cli.steer_eval_run import run_evaluation
from moe_runtime.cli.steer_shown import EvaluationProgress, show_evaluation
from moe_runtime.steering.controls import ControlKind, Controls, PromptPlace
from moe_runtime.steering.sampling import Sampling

__all__ = ["evaluate"]

_KINDS = ", ".join(get_args(ControlKind))


def _betas(text: str) -> tuple[float, ...]:
    """Numbers with commas; `1,2,4,...,512` goes on by the factor of the last two before it."""
    found: list[float] = []
    parts = text.replace(" ", "").split(",")
    try:
        for at, part in enumerate(parts):
            if part == "..." and len(found) >= 2 and at + 2 == len(parts):
                factor, last = found[-1] / found[-2], float(parts[-1])
                if factor <= 1 or not math.isfinite(last):
                    raise ValueError
                while found[-1] * factor < last * (1 - 1e-9):
                    found.append(found[-1] * factor)
            else:
                found.append(float(part))
    except (ValueError, ZeroDivisionError):
        found = []
    if not found or not all(math.isfinite(one) and one >= 0 for one in found):
        raise typer.BadParameter(
            f"{text!r}: write numbers of at least 0 with commas, or 1,2,4,...,512"
        )
    return tuple(found)


def _kinds(text: str) -> tuple[ControlKind, ...]:
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in get_args(ControlKind)]
    if unknown:
        raise typer.BadParameter(f"unknown control {unknown[0]!r}; known: {_KINDS}")
    return cast("tuple[ControlKind, ...]", kinds)


def _budget(text: str | None) -> str | None:
    return None if text is None else checked_budget(text)


def evaluate(  # noqa: PLR0913, PLR0917  the command's options
    model: ModelArgument,
    tasks: Annotated[
        Path,
        typer.Option("--tasks", metavar="X.jsonl", help="JSON lines with prompt, answer, checker."),
    ],
    steering: Annotated[
        Path, typer.Option("--steer", metavar="S.steer.json", help="The experts, as a steer file.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="X.steer-eval.json", help="The evaluation to write."),
    ],
    beta: Annotated[
        str,
        typer.Option("--beta", help="Factors to try, as 2,64 or 1,2,4,...,512; 1 is unsteered."),
    ] = "1,2,4,...,512",
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Of each problem in each arm.")
    ] = 16,
    controls: Annotated[str, typer.Option("--controls", help=f"Any of {_KINDS}.")] = "",
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Choices of random experts, for every beta.")
    ] = 3,
    trace: Annotated[
        list[Path] | None,
        typer.Option("--trace", help="How often experts are used, for the control frequency."),
    ] = None,
    prompt_text: Annotated[
        str, typer.Option("--prompt-text", help="What the control prompt adds.")
    ] = "Think carefully.",
    prompt_place: Annotated[
        str, typer.Option("--prompt-place", help="start, end or before-last-line of the prompt.")
    ] = "end",
    tip_token: Annotated[
        list[str] | None,
        typer.Option(
            "--tip-token", help="What the control tip makes rarer; by itself the end marker."
        ),
    ] = None,
    tip_penalty: Annotated[float, typer.Option("--tip-penalty", help="By how many logits.")] = 3.0,
    tip_span: Annotated[
        int, typer.Option("--tip-span", min=1, help="For how many tokens of a thought.")
    ] = 600,
    thinking_only: Annotated[
        bool, typer.Option("--thinking-only", help="Steer only between the thinking markers.")
    ] = False,
    thinking: Annotated[
        tuple[str, str],
        typer.Option(
            "--thinking", metavar="START END", help='The markers; "" "" if there are none.'
        ),
    ] = ("<think>", "</think>"),
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="An answer that is longer is cut.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Keep the likeliest to this share.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Keep so many; 0: all.")] = 0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of samples, random experts and intervals.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Samples of a forward call.")
    ] = 32,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the model's chat template.")
    ] = False,
    expert_budget: Annotated[
        str | None,
        typer.Option(
            "--expert-budget",
            callback=_budget,
            metavar="SIZE",
            help="Keep experts in this memory: bytes, 8GiB, 25% or auto; by itself all are loaded.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")] = "auto",
    policy: PolicyOption = "lru",
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    variant: VariantOption = None,
    local_files_only: LocalOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure accuracy, thinking length and answer form with steering, without, and with controls.

    Choose beta on validation tasks, then run once more with that beta alone on held-out tasks. A
    run that is interrupted goes on when the same command is given again.

    Example:  [bold]moe-runtime steer eval ./model --tasks puzzles.jsonl --steer think.steer.json
    --beta 1,2,4,...,512 --samples 16 -o think.steer-eval.json[/bold]
    """
    betas, kinds = _betas(beta), _kinds(controls)
    with session(as_json=as_json, debug=debug):
        quiet_libraries(debug=debug)
        place = outcome_place(out)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        chosen = Controls(
            kinds=kinds,
            draws=draws,
            prompt_text=prompt_text,
            prompt_place=cast("PromptPlace", prompt_place),
            tip_tokens=tuple(tip_token or ()),
            tip_penalty=tip_penalty,
            tip_span=tip_span,
        )
        hub = hub_options(
            dtype=dtype,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            local_files_only=local_files_only,
        )
        runtime = {"device": device, "policy": policy}
        if expert_budget is not None:
            runtime["expert_budget"] = expert_budget
        journal = place.with_name(place.name + ".journal")
        console = to_stderr()
        with EvaluationProgress(console, journal) as progress:
            found = run_evaluation(
                model,
                tasks,
                steering,
                trace or [],
                hub=hub,
                runtime=runtime,
                thinking_only=thinking_only,
                options={
                    "betas": betas,
                    "samples": samples,
                    "sampling": sampling,
                    "controls": chosen,
                    "thinking": thinking,
                    "batch_size": batch_size,
                    "chat": chat,
                    "journal": journal,
                    "progress": progress,
                },
            )
        found.save(place)
        journal.unlink(missing_ok=True)
        if as_json:
            emit_json({**found.to_dict(), "file": str(place)})
        else:
            show_evaluation(found)
            typer.echo(f"written to {place}")
