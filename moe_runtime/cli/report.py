"""`moe-runtime report`: a run, plan, evaluation, simulation or steering as a page.

Does not know how any of them is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import DebugOption, JsonOption, outcome_place
from moe_runtime.cli.plan_inputs import require_plan_like
from moe_runtime.cli.session import emit_json, session
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.recordings import read_recordings
from moe_runtime.report import (
    EvaluationReport,
    ParallelReport,
    PlanReport,
    Report,
    SimulationReport,
    SteeringReport,
)
from moe_runtime.report.base import FactsReport

__all__ = ["report"]

RUN, PLAN, EVALUATION, SIMULATION = "run", "plan", "evaluation", "simulation"
PARALLEL = "parallel-run"
STEERING = ("steering", "steer-eval", "steer-cost")
KINDS = (RUN, PLAN, EVALUATION, SIMULATION, PARALLEL, *STEERING)
ENDINGS = {kind: f".{kind}.json" for kind in KINDS} | {"steering": ".steer.json"}


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN.json",
            help="The file of a run, a plan, an evaluation, a simulation or of steering.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write, .html.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="TRACE", help="With a plan: draw this trace's affinity too."
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="FILE",
            help="With a file of steering: another one of the same model; may be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a run, a plan, an evaluation, a simulation or steering, or render it as one HTML page.

    The page is self-contained. Without --out the report is printed as text.

    Example:  [bold]moe-runtime report run.json -o report.html[/bold]
    """
    with session(as_json=as_json, debug=debug):
        kind = _kind_of(run)
        if trace is not None and kind != PLAN:
            raise typer.BadParameter(f"--trace goes with a plan, and this is {_a(kind)} file")
        if beside and kind not in STEERING:
            raise typer.BadParameter(f"--with goes with a file of steering, and this is {_a(kind)}")
        loaded = _load(kind, run, trace, beside or [])
        summary = (
            loaded.facts()
            if isinstance(loaded, FactsReport)
            else loaded.summary.to_dict() | {"prediction": loaded.prediction}
        )
        saved = loaded.save(outcome_place(out)) if out is not None else None
        if as_json:
            emit_json(
                {
                    "outcome": loaded.outcome,
                    "summary": summary,
                    "report": None if saved is None else str(saved),
                }
            )
        elif saved is not None:
            typer.echo(f"{loaded.outcome}\nwrote {saved}")
        else:
            typer.echo(str(loaded))


def _load(kind: str, path: Path, trace: Path | None, beside: list[Path]) -> Report | FactsReport:
    if kind in STEERING:
        return SteeringReport.load(path, *beside)
    if kind == PLAN:
        return _plan_report(path, trace)
    if kind == PARALLEL:
        return ParallelReport.load(path)
    if kind == EVALUATION:
        return EvaluationReport.load(path)
    if kind == SIMULATION:
        return SimulationReport.load(path)
    return Report.load(path)


def _kind_of(path: Path) -> str:
    """What a file says that it is; whatever is damaged is left to the readers, by its name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return next((kind for kind, end in ENDINGS.items() if path.name.endswith(end)), RUN)
    said = data.get("format") if isinstance(data, dict) else None
    return next((kind for kind in KINDS if said == f"moe-runtime.{kind}"), RUN)


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _plan_report(path: Path, trace: Path | None) -> PlanReport:
    plan = Plan.load(path)
    if trace is None:
        return PlanReport(plan)
    recording = read_recordings([trace])
    require_plan_like(plan, recording, path, str(trace))
    return PlanReport(plan, affinity_of(recording).transitions)
