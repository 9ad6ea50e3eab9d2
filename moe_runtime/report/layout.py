"""What all pages are laid out with: the templates, and the parts that each of them shows.

Does not know what a page is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment, Template

__all__ = ["Figure", "Tile", "present", "template"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its heading; `full` is what a heat map's full colour stands for."""

    title: str
    note: str
    svg: str
    full: str = ""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One figure of the headline."""

    label: str
    value: str
    note: str


def present(*drawn: Figure) -> list[Figure]:
    """The figures that have something to show."""
    return [figure for figure in drawn if figure.svg]


def template(name: str) -> Template:
    """A template of this package by its file name."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("moe_runtime.report") / "templates"
    return Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
