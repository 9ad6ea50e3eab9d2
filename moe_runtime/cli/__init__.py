"""The command line: one file for each command, registered below.

Knows no algorithm; every command calls the library and shows what came of it.
"""

import typer

from moe_runtime.cli.bake import bake
from moe_runtime.cli.demo import demo
from moe_runtime.cli.evaluate_predictor import evaluate_predictor
from moe_runtime.cli.export import export
from moe_runtime.cli.generate import generate
from moe_runtime.cli.hardware import hardware
from moe_runtime.cli.inspect import inspect
from moe_runtime.cli.plan import plan
from moe_runtime.cli.report import report
from moe_runtime.cli.simulate import simulate
from moe_runtime.cli.steer import steer
from moe_runtime.cli.topology import topology
from moe_runtime.cli.trace import trace
from moe_runtime.cli.train_predictor import train_predictor
from moe_runtime.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="moe-runtime",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run mixture-of-experts models inside a memory budget for their experts.",
    epilog="Exit codes: 0 done, 1 error, 2 wrong usage or unusable trace, plan or predictor, "
    "130 interrupted.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_show_version
    ),
) -> None:
    pass


# In the order in which `--help` lists them. A new command is one file and one line.
app.command("demo")(demo)
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("hardware")(hardware)
app.command("report")(report)
app.add_typer(trace, name="trace")
app.add_typer(plan, name="plan")
app.command("simulate")(simulate)
app.command("export")(export)
app.command("bake")(bake)
app.command("topology")(topology)
app.add_typer(steer, name="steer")
app.command("train-predictor")(train_predictor)
app.command("evaluate-predictor")(evaluate_predictor)


def main() -> None:
    """Entry point of the `moe-runtime` script."""
    app()
