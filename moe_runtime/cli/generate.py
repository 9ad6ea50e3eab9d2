"""`moe-runtime generate`: text from a model whose experts stay in a budget.

Does not know how the budget is kept.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.generate_many import ManyOptions, show_many
from moe_runtime.cli.generate_parallel import ParallelCommand, run_rank
from moe_runtime.cli.options import (
    AskedBatchOption,
    AskedLengthOption,
    DebugOption,
    DtypeOption,
    ExactOption,
    ExpertBudgetOption,
    HostBudgetOption,
    HostExecutionOption,
    JsonOption,
    LocalOption,
    ModelArgument,
    PageOption,
    PlanOption,
    PolicyOption,
    ReaderThreadsOption,
    RevisionOption,
    SubfolderOption,
    VariantOption,
    hub_options,
    outcome_place,
    tokenizer_options,
)
from moe_runtime.cli.room import AskedRoom, budget_line
from moe_runtime.cli.session import emit_json, quiet_libraries, session
from moe_runtime.corpus import read_corpus
from moe_runtime.parallel import ParallelOptions
from moe_runtime.placement.links import Link, Links
from moe_runtime.report import Report

__all__ = ["generate"]


_MANY = "batch_size", "schedule", "window", "every", "compare", "verify", "out", "expert_parallel"
# What ranks, each with its experts for good, have no use for.
_ONE_PROCESS = (
    *("schedule", "window", "every", "compare", "verify", "predictor", "expert_budget"),
    *("host_budget", "device", "policy", "exact", "reader_threads"),
)


def generate(  # noqa: PLR0913, PLR0917  the command's options
    context: typer.Context,
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A file with the prompt; - is stdin.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE|-",
            help="Many prompts, as `trace` reads them: one a line, or JSON lines with 'prompt'.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="With --prompts: sequences of a call.")
    ] = 8,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="With --prompts: put sequences that need the same experts into one batch (union, "
            "k-medoids), or leave them in order.",
        ),
    ] = "union",
    window: Annotated[
        str | None,
        typer.Option(
            "--window", help="With --prompts: batches under way at once, or all; 4 (in order 1)."
        ),
    ] = None,
    every: Annotated[
        int, typer.Option("--every", min=1, help="With --prompts: tokens between regroupings.")
    ] = 1,
    predictor: Annotated[
        Path | None,
        typer.Option(
            "--predictor",
            metavar="PRED",
            help="A predictor file: experts are loaded ahead by it as long as that pays. With "
            "--prompts it says which sequences go together; else the run's own past does.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --prompts: run them in order too, before.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="With --prompts: compare with each prompt alone.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="X.jsonl", help="With --prompts: texts, as JSON lines."
        ),
    ] = None,
    expert_parallel: Annotated[
        str | None,
        typer.Option(
            "--expert-parallel",
            metavar="coherent|vanilla",
            help="With --prompts, under torchrun: each rank holds the experts that --plan gives "
            "it. coherent: tokens move to their experts and stay; vanilla: out and back.",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", help="With --expert-parallel: seconds to wait for a rank that hangs."
        ),
    ] = 120.0,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            metavar="RATE[,LATENCY]",
            help="With --expert-parallel: what the links between ranks give, as 1Gbit,0.2ms, for "
            "the time that prefill is foretold to take; else as the plan says.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many tokens.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    expert_budget: ExpertBudgetOption = "auto",
    host_budget: HostBudgetOption = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")] = "auto",
    policy: PolicyOption = "lru",
    plan: PlanOption = None,
    exact: ExactOption = False,
    host_execution: HostExecutionOption = "auto",
    reader_threads: ReaderThreadsOption = 3,
    max_batch: AskedBatchOption = None,
    max_length: AskedLengthOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    variant: VariantOption = None,
    local_files_only: LocalOption = False,
    run: Annotated[
        Path | None,
        # The second name is for torchrun, which takes --run for an option of its own.
        typer.Option("--run", "--run-file", metavar="RUN.json", help="Write the run file here."),
    ] = None,
    report: PageOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Generate text; it streams to standard output, the outcome goes to standard error.

    With --prompts, texts are generated in batches, and sequences regrouped between tokens.

    Example:  [bold]moe-runtime generate ./olmoe -p "Once upon a time" --expert-budget 25%[/bold]

    On two ranks:  [bold]torchrun --nproc-per-node 2 -m moe_runtime generate ./olmoe --prompts
    texts.txt --expert-parallel coherent --plan olmoe.plan.json[/bold]
    """
    if sum(one is not None for one in (prompt, prompt_file, prompts)) != 1:
        raise typer.BadParameter("give exactly one of --prompt, --prompt-file and --prompts")
    if prompts is None:
        _refuse_given(context, _MANY, "goes with --prompts")
    if expert_parallel is None:
        _refuse_given(context, ("timeout", "link"), "goes with --expert-parallel")
    else:
        _refuse_given(context, _ONE_PROCESS, "does not go with --expert-parallel")
        if str(prompts) == "-":
            raise typer.BadParameter("--expert-parallel reads prompts from a file, not from -")
    with session(as_json=as_json, debug=debug):
        hub = hub_options(
            dtype=dtype,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            local_files_only=local_files_only,
        )
        if expert_parallel is not None and prompts is not None:
            quiet_libraries(debug=debug)
            run_rank(
                model,
                list(read_corpus(prompts)),
                ParallelCommand(
                    options=ParallelOptions(
                        mode=expert_parallel,
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        seed=seed,
                        batch_size=batch_size,
                        links=None if link is None else Links(near=Link.parse(link)),
                    ),
                    plan=plan,
                    timeout=timeout,
                    chat=chat,
                    out=None if out is None else outcome_place(out),
                    run=None if run is None else outcome_place(run),
                    report=None if report is None else outcome_place(report),
                ),
                hub=hub,
                as_json=as_json,
                debug=debug,
            )
            return
        runtime = {
            "expert_budget": expert_budget,
            "host_budget": host_budget,
            "device": device,
            "policy": policy,
            "plan": plan,
            "exact": exact,
            "host_execution": host_execution,
            "reader_threads": reader_threads,
        }
        asked = AskedRoom(max_batch=max_batch, max_length=max_length)
        if prompts is not None:
            options = ManyOptions(
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                schedule=schedule,
                window=int(window) if window is not None and window.isdigit() else window,
                every=every,
                temperature=temperature,
                seed=seed,
                predictor=predictor,
                verify=verify,
                compare=compare,
                chat=chat,
                room=asked,
            )
            quiet_libraries(debug=debug)
            show_many(
                model,
                list(read_corpus(sys.stdin if str(prompts) == "-" else prompts)),
                options,
                hub=hub,
                runtime=runtime,
                out=None if out is None else outcome_place(out),
                run=None if run is None else outcome_place(run),
                page=None if report is None else outcome_place(report),
                as_json=as_json,
            )
            return
        runtime["predictor"] = predictor
        text = prompt if prompt is not None else _read_prompt(prompt_file)
        place = None if run is None else outcome_place(run)
        page = None if report is None else outcome_place(report)
        made = _generate(
            model,
            text,
            hub,
            runtime,
            {"max_new_tokens": max_new_tokens, **_sampling(temperature)},
            room=asked,
            seed=seed,
            chat=chat,
            stream=not as_json,
            debug=debug,
        )
        for path in (place, page):
            if path is not None:
                made.save(path)
        if as_json:
            record = made.to_dict()
            emit_json(
                {
                    **record["generated"][0],
                    "outcome": made.outcome,
                    "budget": record["budget"],
                    "summary": made.summary.to_dict(),
                    "run": None if place is None else str(place),
                    "report": None if page is None else str(page),
                }
            )
        else:
            typer.echo(made.outcome, err=True)
            if line := budget_line(made.to_dict()):
                typer.echo(line, err=True)


def _refuse_given(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Wrong usage if one of these options was given on the command line."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")


def _read_prompt(path: Path | None) -> str:
    if path is None or str(path) == "-":
        return sys.stdin.read()
    return path.read_text(encoding="utf-8")


def _sampling(temperature: float) -> dict[str, Any]:
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature}


def _generate(
    path: str,
    prompt: str,
    hub: dict[str, Any],
    runtime: dict[str, Any],
    generation: dict[str, Any],
    *,
    room: AskedRoom,
    seed: int,
    chat: bool,
    stream: bool,
    debug: bool,
) -> Report:
    """Load, generate, and report with the text in the record."""
    import torch
    from transformers import AutoTokenizer, TextStreamer

    import moe_runtime

    quiet_libraries(debug=debug)
    tokenizer = AutoTokenizer.from_pretrained(path, **tokenizer_options(hub))
    inputs = _encode(tokenizer, prompt, chat=chat)
    new_tokens = generation["max_new_tokens"]
    left = room.for_prompts([inputs["input_ids"].shape[1]], new_tokens=new_tokens)
    model = moe_runtime.from_pretrained(path, **runtime, **left, **hub)
    inputs = inputs.to(model.device)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True) if stream else None
    began = time.perf_counter()
    output = model.generate(**inputs, **generation, streamer=streamer)
    seconds = time.perf_counter() - began
    # An encoder-decoder's output begins with the decoder's start token instead of the prompt.
    first = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    new = output[0, first:]
    record = moe_runtime.report(model).to_dict()
    record["generated"] = [
        {
            "prompt": prompt,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "new_tokens": len(new),
            "seconds": round(seconds, 6),
        }
    ]
    return Report.from_run(record)


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Token ids and mask `[1, tokens]`; ValueError if there is no chat template to use."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
