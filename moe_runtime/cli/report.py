"""`moe-runtime report`: a run file or a plan file as a page.

Does not know how either is made.
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
from moe_runtime.report import PlanReport, Report

__all__ = ["report"]


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN.json", help="The run file, or a plan: *.plan.json.")
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
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a run file or a plan, or render it as one self-contained HTML page.

    Without --out the report is printed as text.

    Example:  [bold]moe-runtime report run.json -o report.html[/bold]
    """
    with session(as_json=as_json, debug=debug):
        loaded: Report | PlanReport
        if _is_plan(run):
            loaded = _plan_report(run, trace)
            summary = loaded.facts()
        elif trace is not None:
            raise typer.BadParameter("--trace goes with a plan, and this is a run file")
        else:
            loaded = Report.load(run)
            summary = loaded.summary.to_dict() | {"prediction": loaded.prediction}
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


def _is_plan(path: Path) -> bool:
    """Whether a file says that it is a plan; whatever is damaged is left to the readers."""
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return path.name.endswith(".plan.json")
    return isinstance(data, dict) and data.get("format") == "moe-runtime.plan"


def _plan_report(path: Path, trace: Path | None) -> PlanReport:
    plan = Plan.load(path)
    if trace is None:
        return PlanReport(plan)
    recording = read_recordings([trace])
    require_plan_like(plan, recording, path, str(trace))
    return PlanReport(plan, affinity_of(recording).transitions)
