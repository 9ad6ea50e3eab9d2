"""A command that has subcommands and yet works without naming one: `plan T` is `plan make T`.

Knows no command.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["DefaultGroup", "group"]


class DefaultGroup(TyperGroup):
    """A group whose first subcommand runs where the first word names none of them.

    A file or folder that has the name of a subcommand is given as `./name`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, *self.get_help_option_names(ctx)}
        if args and args[0] not in known:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


def group(help_text: str) -> typer.Typer:
    """A Typer application for such a command; the first command registered is the default."""
    return typer.Typer(
        cls=DefaultGroup, no_args_is_help=True, rich_markup_mode="rich", help=help_text
    )
