"""`moe-runtime steer cost`: what steering does to hits, bytes, tokens/s and routing.

Knows options and output; does not know how anything is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.options import (
    DebugOption,
    DtypeOption,
    ExpertBudgetOption,
    JsonOption,
    LocalOption,
    ModelArgument,
    PolicyOption,
    RevisionOption,
    SubfolderOption,
    VariantOption,
    hub_options,
    outcome_place,
    tokenizer_options,
)
from moe_runtime.cli.room import AskedRoom
from moe_runtime.cli.session import emit_json, quiet_libraries, session, to_stderr
from moe_runtime.corpus import read_corpus
from moe_runtime.report import SteeringReport
from moe_runtime.report.steering_parts import SteeringParts
from moe_runtime.steering.cost import SteeringCost
from moe_runtime.steering.files import SteeringFile, read_steering
from moe_runtime.steering.values import Steering

__all__ = ["cost"]


def cost(  # noqa: PLR0913, PLR0917  the command's options
    model: ModelArgument,
    steer: Annotated[
        Path, typer.Option("--steer", metavar="X.steer.json", help="The steering to measure.")
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE|-",
            help="Prompts as `trace` reads them: one a line, or JSON lines with 'prompt'.",
        ),
    ],
    beta: Annotated[
        float | None,
        typer.Option("--beta", min=0, help="Instead of the file's, for all of its experts."),
    ] = None,
    expert_budget: ExpertBudgetOption = "25%",
    policy: PolicyOption = "lru",
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Prompts to use, from the first.")
    ] = 8,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Of each prompt.")
    ] = 64,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Of all arms; figures are medians over them.")
    ] = 5,
    pin: Annotated[
        bool,
        typer.Option("--pin/--no-pin", help="Also with the steered experts in slots of their own."),
    ] = True,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    variant: VariantOption = None,
    local_files_only: LocalOption = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="X.steer-cost.json", help="Write all figures here."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what steering costs in an expert budget, and how it moves routing.

    Prompts are continued greedily without steering; then the same tokens are produced with and
    without it, in turns, so that what differs is steering's doing. One more run goes on with the
    steered model's own text. `moe-runtime report` draws the file.

    Example:  [bold]moe-runtime steer cost ./model --steer think.steer.json --prompts p.txt[/bold]
    """
    with session(as_json=as_json, debug=debug):
        quiet_libraries(debug=debug)
        place = None if out is None else outcome_place(out)
        file = read_steering(steer)  # before the model is loaded
        texts = list(islice(read_corpus(sys.stdin if str(prompts) == "-" else prompts), limit))
        hub = hub_options(
            dtype=dtype,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            local_files_only=local_files_only,
        )
        found = _measure(
            model,
            file,
            texts,
            name=steer.name,
            beta=beta,
            hub=hub,
            runtime={"expert_budget": expert_budget, "policy": policy},
            options={"max_new_tokens": max_new_tokens, "rounds": rounds, "pin": pin},
        )
        saved = None if place is None else found.save(place)
        report = SteeringReport(SteeringParts(costs=(found,)))
        if as_json:
            emit_json(
                {
                    "outcome": report.outcome,
                    "cost": report.facts()["costs"][0],
                    "file": None if saved is None else str(saved),
                }
            )
        else:
            typer.echo(str(report))
            if saved is not None:
                typer.echo(f"wrote {saved}")


def _measure(
    path: str,
    file: SteeringFile,
    texts: Sequence[str],
    *,
    name: str,
    beta: float | None,
    hub: dict[str, Any],
    runtime: dict[str, Any],
    options: dict[str, Any],
) -> SteeringCost:
    """Load, check that the steering is for this model, measure with progress."""
    from transformers import AutoTokenizer

    import moe_runtime
    from moe_runtime.steering.cost_run import measure_cost

    tokenizer = AutoTokenizer.from_pretrained(path, **tokenizer_options(hub))
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    room = AskedRoom().for_prompts(map(len, prompts), new_tokens=options["max_new_tokens"])
    loaded = moe_runtime.from_pretrained(path, **runtime, **room, **hub)
    file.check(moe_runtime.runtime_of(loaded).spec)
    with to_stderr().status("measuring") as status:
        return measure_cost(
            loaded,
            _with_beta(file.steering, beta),
            prompts,
            tokenizer=tokenizer,
            name=name,
            progress=status.update,
            **options,
        )


def _with_beta(steering: Steering, beta: float | None) -> Steering:
    return (
        steering if beta is None else replace(steering, betas=dict.fromkeys(steering.betas, beta))
    )
