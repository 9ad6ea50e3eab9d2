"""`moe-runtime report`: a run file as a page.

Does not know how a run file is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import DebugOption, JsonOption, outcome_place
from moe_runtime.cli.session import emit_json, session
from moe_runtime.report import Report

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN.json", help="The run file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write, .html.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a run file, or render it as one self-contained HTML page.

    Without --out the report is printed as text.

    Example:  [bold]moe-runtime report run.json -o report.html[/bold]
    """
    with session(as_json=as_json, debug=debug):
        loaded = Report.load(run)
        saved = loaded.save(outcome_place(out)) if out is not None else None
        if as_json:
            emit_json(
                {
                    "outcome": loaded.outcome,
                    "summary": loaded.summary.to_dict(),
                    "report": None if saved is None else str(saved),
                }
            )
        elif saved is not None:
            typer.echo(f"{loaded.outcome}\nwrote {saved}")
        else:
            typer.echo(str(loaded))
