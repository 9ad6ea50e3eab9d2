"""`moe-runtime plan compare`: several plans, and contiguous ones, measured on the same tokens.

Does not know how a plan is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.options import DebugOption, JsonOption
from moe_runtime.cli.plan_inputs import require_plan_like
from moe_runtime.cli.session import emit_json, session
from moe_runtime.cli.step_time import (
    BatchOption,
    ComputeOption,
    LinkOption,
    NodeLinkOption,
    PromptTokensOption,
    ServingOptions,
    WidthsOption,
    serving_of,
)
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.cost import measure
from moe_runtime.placement.messages import MODES
from moe_runtime.placement.plan import BoolArray, Plan
from moe_runtime.placement.recordings import Recording, read_recordings
from moe_runtime.placement.timed_plan import PROMPT_TOKENS, predicted_times
from moe_runtime.placement.topology import Topology
from moe_runtime.report.summary import NONE

__all__ = ["compare_command"]

_COLUMNS = {
    "crossing": "crossing",
    "node_crossing": "between nodes",
    "distinct_devices": "devices a token",
    "load": "load",
    "load_worst": "worst layer",
    "hop_cost": "hop cost",
}


def compare_command(
    plans: Annotated[
        list[Path], typer.Argument(metavar="PLAN...", help="Plans of one model, *.plan.json.")
    ],
    trace: Annotated[
        list[Path],
        typer.Option(
            "--trace", metavar="TRACE", help="The tokens to measure on; repeat to add more."
        ),
    ],
    link: LinkOption = None,
    node_link: NodeLinkOption = None,
    batch: BatchOption = 32,
    prompt_tokens: PromptTokensOption = PROMPT_TOKENS,
    widths: WidthsOption = None,
    compute_ms: ComputeOption = 0.0,
    model: Annotated[
        str | None, typer.Option("--model", help="Checkpoint to read widths from, with --link.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure plans on a trace, beside contiguous placement on the same devices.

    The trace should be one that none of the plans was made from. With --link, and --model or
    --widths, each plan's decode step is timed in both modes of expert parallelism too; with --json
    so is the prefill before it.

    Example:  [bold]moe-runtime plan compare a.plan.json b.plan.json
    --trace other.trace.safetensors[/bold]
    """
    with session(as_json=as_json, debug=debug):
        loaded = [Plan.load(path) for path in plans]
        recording = read_recordings(trace)
        name = ", ".join(map(str, trace))
        for path, plan in zip(plans, loaded, strict=True):
            require_plan_like(plan, recording, path, name)
        asked = ServingOptions(
            link=link,
            node_link=node_link,
            batch=batch,
            prompt_tokens=prompt_tokens,
            widths=widths,
            compute_ms=compute_ms,
            model=model,
        )
        rows = _measured(dict(zip(plans, loaded, strict=True)), recording, asked)
        if as_json:
            emit_json({"trace": list(map(str, trace)), "tokens": recording.tokens, "plans": rows})
        else:
            _print(rows, recording)


def _measured(
    plans: dict[Path, Plan], recording: Recording, asked: ServingOptions
) -> list[dict[str, Any]]:
    """A row for each plan, and one of contiguous placement for each topology among them."""
    affinity = affinity_of(recording)
    rivals: list[tuple[str, list[BoolArray], Topology]] = []
    for plan in plans.values():
        topology = plan.topology
        if topology not in [known for _, _, known in rivals]:
            nodes = f" in {topology.node_count} nodes" if topology.node_count > 1 else ""
            placement = contiguous(recording.experts, topology.devices)
            rivals.append((f"contiguous{nodes}", placement, topology))
    mine = [(str(path), plan.matrices(), plan.topology) for path, plan in plans.items()]
    rows: list[dict[str, Any]] = []
    for name, placement, topology in (*mine, *rivals):
        metrics = measure(placement, topology, recording, affinity)
        row = {"plan": name, "devices": topology.devices, **metrics.to_dict()}
        if asked.given:
            serving = serving_of(asked, topology, recording)
            row["step_time"] = predicted_times(placement, topology, recording, serving)
        rows.append(row)
    return rows


def _print(rows: list[dict[str, Any]], recording: Recording) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no edge to wrap at
    tokens = f"{recording.tokens:,} tokens" if recording.tokens else "an unknown number of tokens"
    console.print(f"measured on {tokens}; lower is better in every column\n", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("plan", overflow="fold", min_width=12)
    table.add_column("devices", justify="right")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right")
    timed = "step_time" in rows[0]
    for title in ("vanilla ms", "coherent ms") if timed else ():
        table.add_column(title, justify="right")
    for row in rows:
        cells = [NONE if row[name] is None else f"{row[name]:.3f}" for name in _COLUMNS]
        times = row.get("step_time", {})
        cells += [f"{1e3 * times[mode]['seconds']:.3f}" for mode in MODES if times]
        table.add_row(Path(row["plan"]).name, str(row["devices"]), *cells)
    console.print(table)
