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
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.cost import measure
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.recordings import Recording, read_recordings
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
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure plans on a trace, beside contiguous placement on the same devices.

    The trace should be one that none of the plans was made from.

    Example:  [bold]moe-runtime plan compare a.plan.json b.plan.json
    --trace other.trace.safetensors[/bold]
    """
    with session(as_json=as_json, debug=debug):
        loaded = [Plan.load(path) for path in plans]
        recording = read_recordings(trace)
        name = ", ".join(map(str, trace))
        for path, plan in zip(plans, loaded, strict=True):
            require_plan_like(plan, recording, path, name)
        rows = _measured(dict(zip(plans, loaded, strict=True)), recording)
        if as_json:
            emit_json({"trace": list(map(str, trace)), "tokens": recording.tokens, "plans": rows})
        else:
            _print(rows, recording)


def _measured(plans: dict[Path, Plan], recording: Recording) -> list[dict[str, Any]]:
    """A row for each plan, and one of contiguous placement for each topology among them."""
    affinity = affinity_of(recording)
    rows, topologies = [], []
    for path, plan in plans.items():
        if plan.topology not in topologies:
            topologies.append(plan.topology)
        metrics = measure(plan.matrices(), plan.topology, recording, affinity)
        rows.append({"plan": str(path), "devices": plan.devices, **metrics.to_dict()})
    for topology in topologies:
        placement = contiguous(recording.experts, topology.devices)
        metrics = measure(placement, topology, recording, affinity)
        nodes = f" in {topology.node_count} nodes" if topology.node_count > 1 else ""
        rows.append(
            {"plan": f"contiguous{nodes}", "devices": topology.devices, **metrics.to_dict()}
        )
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
    for row in rows:
        cells = [NONE if row[name] is None else f"{row[name]:.3f}" for name in _COLUMNS]
        table.add_row(Path(row["plan"]).name, str(row["devices"]), *cells)
    console.print(table)
