"""`moe-runtime export`: a plan in the form of another engine.

Does not know the engines' forms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import DebugOption, JsonOption
from moe_runtime.cli.session import emit_json, session
from moe_runtime.errors import ConfigError
from moe_runtime.placement.export_base import Extras
from moe_runtime.placement.export_registry import (
    EXPORTERS,
    check_export,
    exporter,
    write_export,
)
from moe_runtime.placement.export_sglang import counts_for
from moe_runtime.placement.plan import Plan

__all__ = ["export"]


def _known(name: str) -> str:
    try:
        return exporter(name).name
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def export(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan, *.plan.json.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ENGINE",
            callback=_known,
            help=f"The engine's form: {', '.join(EXPORTERS)}. counts: SGLang's logical_count.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            metavar="FILE",
            help="Write nothing: check this file by the engine's rules and against the plan.",
        ),
    ] = None,
    num_hidden_layers: Annotated[
        int | None,
        typer.Option(
            "--num-hidden-layers",
            min=1,
            help="All hidden layers of the model, dense ones included (sglang, counts, "
            "ktransformers).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Read that number from this model's config instead."),
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(
            "--counts", metavar="TRACE", help="A trace or a logical_count file (only --to counts)."
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a plan as the file that an engine reads, checked by that engine's own rules.

    The options to start the engine with, and what it would silently ignore, are printed.

    Example:  [bold]moe-runtime export x.plan.json --to sglang --num-hidden-layers 27
    -o placement.json[/bold]
    """
    if (out is None) == (check is None):
        raise typer.BadParameter("give exactly one of --out and --check")
    if num_hidden_layers is not None and model is not None:
        raise typer.BadParameter("give --num-hidden-layers or --model, not both")
    with session(as_json=as_json, debug=debug):
        loaded, engine = Plan.load(plan), exporter(to)
        extras = Extras(
            hidden_layers=num_hidden_layers if model is None else _hidden_layers(model),
            counts=None if counts is None else counts_for(loaded, counts),
        )
        if out is not None:
            path, advice = out, write_export(loaded, engine, out, extras)
        else:
            assert check is not None
            path, advice = check, check_export(loaded, engine, check, extras)
        if as_json:
            emit_json(
                {
                    "file": str(path),
                    "written": out is not None,
                    "engine": engine.engine,
                    "version": engine.version,
                    "flags": list(advice.flags),
                    "notes": list(advice.notes),
                }
            )
            return
        done = "wrote" if out is not None else "fits the plan:"
        typer.echo(f"{done} {path} ({engine.engine}, {engine.version})")
        typer.echo("start the engine with:")
        for flag in advice.flags:
            typer.echo(f"  {flag}")
        for note in advice.notes:
            typer.echo(f"note: {note}")


def _hidden_layers(model: str) -> int:
    """Number of hidden layers in a model's config, a folder's or a hub model's."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    number = getattr(config, "num_hidden_layers", None)
    if type(number) is not int:
        raise ConfigError(f"{model}: its config has no num_hidden_layers; give --num-hidden-layers")
    return number
