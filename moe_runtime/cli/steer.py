"""`moe-runtime steer`: the group of its commands.

Knows no command's options.
"""

from __future__ import annotations

import typer

from moe_runtime.cli.steer_cost import cost
from moe_runtime.cli.steer_eval import evaluate
from moe_runtime.cli.steer_find import find

__all__ = ["steer"]

steer = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Find the experts that a model thinks with, to reinforce them while it runs.\n\n"
    "Example:  [bold]moe-runtime steer find probe.trace.safetensors --tokenizer ./model "
    "-o think.steer.json[/bold]",
)


@steer.callback()
def _root() -> None:
    pass  # a group even where it has one command


# A new command is one file and one line.
steer.command("find")(find)
steer.command("cost")(cost)
steer.command("eval")(evaluate)
