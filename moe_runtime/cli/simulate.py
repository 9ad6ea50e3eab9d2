"""`moe-runtime simulate`: policies and predictors on recorded routing, in simulated time.

Does not know how time passes, nor how a contender is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.options import DebugOption, JsonOption, checked_budget, outcome_place
from moe_runtime.cli.session import emit_json, session, to_stderr
from moe_runtime.cli.simulate_run import Request, simulated
from moe_runtime.core import format_bytes
from moe_runtime.files import write_text

__all__ = ["simulate"]

_WIDTH = 132  # columns of the table where no terminal says how many there are


def simulate(  # noqa: PLR0913, PLR0917  the command's options
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE...", help="Recorded runs of one model; each starts cold."),
    ],
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            callback=checked_budget,
            metavar="SIZE",
            help="Memory for experts: bytes, 8GiB, or 25% of all experts.",
        ),
    ] = "25%",
    link_gbps: Annotated[
        float,
        typer.Option("--link-gbps", min=1e-6, help="Gigabytes a second that bring in experts."),
    ] = 1.0,
    latency_ms: Annotated[
        float, typer.Option("--latency-ms", min=0, help="From a read's begin to its first byte.")
    ] = 0.1,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, help="Reads under way at once.")
    ] = 3,
    layer_ms: Annotated[
        float,
        typer.Option("--layer-ms", min=0, help="A layer in one call, without routed experts."),
    ] = 1.0,
    expert_ms: Annotated[
        float, typer.Option("--expert-ms", min=0, help="One expert in one call.")
    ] = 0.5,
    token_ms: Annotated[
        float, typer.Option("--token-ms", min=0, help="In addition, each token in each expert.")
    ] = 0.0,
    call_ms: Annotated[
        float, typer.Option("--call-ms", min=0, help="A forward call beside its MoE layers.")
    ] = 2.0,
    forecast_ms: Annotated[
        float, typer.Option("--forecast-ms", min=0, help="A predictor's forecast of one layer.")
    ] = 0.1,
    expert_bytes: Annotated[
        str | None,
        typer.Option("--expert-bytes", metavar="SIZE", help="One expert's bytes: 17MB, 4325376."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="CHECKPOINT", help="Take the bytes from a checkpoint."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="all|NAME", help="A contender; may be repeated."),
    ] = None,
    predictor: Annotated[
        list[Path] | None,
        typer.Option("--predictor", metavar="FILE", help="A predictor file; may be repeated."),
    ] = None,
    fit: Annotated[
        list[Path] | None,
        typer.Option(
            "--fit",
            metavar="TRACE",
            help="What predictors are fitted to; may be repeated. Else the other traces, and of a "
            "single trace they learn while it goes.",
        ),
    ] = None,
    phase: Annotated[
        str, typer.Option("--phase", help="decode: without the prompts' calls; all: with them.")
    ] = "decode",
    recall: Annotated[
        float,
        typer.Option("--recall", min=0, max=1, help="How often the stand-in for a gate is right."),
    ] = 0.9,
    seed: Annotated[int, typer.Option("--seed", help="Of its errors.")] = 0,
    trial: Annotated[
        bool,
        typer.Option("--trial", help="Each run finds out if forecasts pay, as the runtime does."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write all figures as JSON.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Simulate caching and prefetching on recorded routing, beside LRU and Belady's bound.

    The runtime's own cache, loader and planner run on a simulated clock: the link and the time that
    computing takes are what you say (the defaults are a 1 GB/s disk and a small machine's CPU), so
    tokens/s are a prediction under these figures and no measurement.

    A use is resident, in time (loaded ahead of need), late (under way when it was asked for) or
    missed. Predictors are fitted to what is not simulated, which takes seconds to minutes.

    Example:  [bold]moe-runtime simulate a.trace.safetensors --expert-bytes 17MB[/bold]
    """
    if (expert_bytes is None) == (model is None):
        raise typer.BadParameter("give the size of an expert: --expert-bytes SIZE or --model PATH")
    if phase not in {"decode", "all"}:
        raise typer.BadParameter(f"--phase is decode or all, not {phase!r}")
    if budget == "auto":
        raise typer.BadParameter("--budget is a size or a share here, like 25%")
    with session(as_json=as_json, debug=debug):
        place = None if out is None else outcome_place(out)
        request = Request(
            traces=tuple(traces),
            fit=tuple(fit or ()),
            predictors=tuple(predictor or ()),
            contenders=tuple(policy or ("all",)),
            explicit="all" not in (policy or ("all",)),
            budget=budget,
            expert_bytes=expert_bytes,
            model=model,
            link=(link_gbps, latency_ms, parallel),
            compute={
                "layer": layer_ms,
                "expert": expert_ms,
                "expert_token": token_ms,
                "call": call_ms,
                "forecast": forecast_ms,
            },
            decode_only=phase == "decode",
            recall=recall,
            seed=seed,
            trial=trial,
        )
        found = simulated(request, to_stderr())
        if place is not None:
            write_text(place, json.dumps(found, indent=1, allow_nan=False) + "\n")
        if as_json:
            emit_json(found)
        else:
            _print(found)
            if place is not None:
                typer.echo(f"{place} written")


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    setting = found["setting"]
    console.print(
        f"{found['tokens']:,} tokens, {sum(setting['slots'])} of {setting['experts']} experts fit, "
        f"{format_bytes(max(setting['expert_bytes']))} an expert, "
        f"{setting['link']['bytes_per_second'] / 1e9:g} GB/s; simulated"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in (
        *("hits", "resident", "in time", "late", "missed", "stalls", "read", "unused"),
        *("/Belady", "tokens/s", "/lru"),
    ):
        table.add_column(name, justify="right")
    for row in found["contenders"]:
        over, speed = row["bytes_over_belady"], row["speed_over_lru"]
        table.add_row(
            escape(row["title"]),
            f"{100 * row['hit_rate']:.1f} %",
            *(f"{row[name]:,}" for name in ("resident", "in_time", "late", "missed")),
            f"{row['stall_seconds']:.2f} s",
            format_bytes(row["bytes"]["read"]),
            format_bytes(row["bytes"]["wasted"]),
            "" if over is None else f"{over:.3f}",
            f"{row['tokens_per_second']:.2f}",
            "" if speed is None else f"{speed:.3f}",
        )
    console.print(table)
    for item in found["left_out"]:
        console.print(f"[dim]without {escape(item['title'])}: {escape(item['why'])}[/dim]")
