"""`moe-runtime plan show`, and what `plan make` prints of what it made.

Does not know how a plan is found or measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_runtime.cli.options import DebugOption, JsonOption, outcome_place
from moe_runtime.cli.session import emit_json, session
from moe_runtime.placement.plan import Plan
from moe_runtime.report import PlanReport
from moe_runtime.report.plan_facts import MEASURES, comparison, pair, warnings_of

__all__ = ["made_facts", "print_made", "show_command"]


def show_command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan, *.plan.json.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write, .html.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a plan: model, devices, certificate, what it is worth, its layers.

    Example:  [bold]moe-runtime plan show olmoe.plan.json[/bold]
    """
    with session(as_json=as_json, debug=debug):
        report = PlanReport.load(plan)
        saved = report.save(outcome_place(out)) if out is not None else None
        if as_json:
            emit_json({**report.facts(), "report": None if saved is None else str(saved)})
        elif saved is not None:
            typer.echo(f"{report.outcome}\nwrote {saved}")
        else:
            typer.echo(str(report))


def made_facts(plan: Plan, place: Path) -> dict[str, Any]:
    """What `plan make --json` prints: the plan's facts and where it was written."""
    return {"plan": str(place), **PlanReport(plan).facts()}


def print_made(plan: Plan, place: Path, model: str | None) -> None:
    """The comparison, what is proved, how far the counts carry, and what to do next."""
    console = Console(highlight=False, soft_wrap=True)
    report = PlanReport(plan)
    if plan.devices > 1:
        console.print(_table(plan))
        console.print()
    for line in report.findings():
        console.print(escape(line))
    for warning in warnings_of(plan):
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[yellow]warning:[/] {escape(warning)}"
        )
    console.print(f"wrote {escape(str(place))}")
    for hint in _next_steps(plan, place, model):
        console.print(f"next: {escape(hint)}")


def _table(plan: Plan) -> Table:
    """The plan and its rivals; train beside held-out where there is one."""
    rows = comparison(plan)
    held = isinstance(plan.metrics.get("held_out"), Mapping)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("plan")
    under = "\ntrain held-out" if held else "\non train"
    for name in MEASURES.values():
        table.add_column(name + under, justify="right")
    for name, measured in rows:
        cells = [pair(measured, field, held=held) for field in MEASURES]
        table.add_row(name, *cells, style="bold" if name == "this plan" else None)
    return table


def _next_steps(plan: Plan, place: Path, model: str | None) -> list[str]:
    path, of = shlex.quote(str(place)), shlex.quote(model) if model else "MODEL"
    if plan.devices == 1:
        memory = plan.topology.memory[0]
        budget = f" --expert-budget {memory}" if memory else ""
        return [f"moe-runtime generate {of} --plan {path}{budget} --prompt '...'"]
    steps = [
        f"moe-runtime report {path} -o {path.removesuffix('.plan.json')}.html",
        f"moe-runtime export {path} --to sglang --model {of} -o placement.json",
    ]
    sizes = [{len(group) for group in plan.device_experts(at)} for at in range(len(plan.layers))]
    if not plan.has_replicas and all(len(found) == 1 for found in sizes):
        steps.append(f"moe-runtime bake {of} --plan {path} -o OUT")
    return steps
