"""Fields of a steering file's JSON: taken if they are there and of their kind, refused by name.

Knows JSON's kinds; does not know what a field means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.errors import ConfigError

__all__ = [
    "finite",
    "flag",
    "items",
    "number",
    "objects",
    "section",
    "take",
    "text",
    "whole",
    "whole_list",
]


def take(data: Any, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """The field, ConfigError unless it is of this kind (a bool is no number)."""
    value = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"field {name!r} has to be {wanted}, found {value!r:.80}")
    return value


def text(data: Any, name: str) -> str:
    """A text."""
    return str(take(data, name, str, "a text"))


def flag(data: Any, name: str) -> bool:
    """True or false."""
    return bool(take(data, name, bool, "true or false"))


def whole(data: Any, name: str, *, least: int = 0) -> int:
    """A whole number of at least `least`."""
    value = int(take(data, name, int, "a whole number"))
    if value < least:
        raise ConfigError(f"field {name!r} has to be {least} or more, found {value}")
    return value


def number(data: Any, name: str) -> float:
    """A finite number."""
    value = take(data, name, (int, float), "a number")
    return finite(value, name)


def finite(value: Any, name: str) -> float:
    """A finite number; ConfigError names the field."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"field {name!r} has to be a number, found {value!r:.80}")
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond every float
        found = math.inf
    if not math.isfinite(found):
        raise ConfigError(f"field {name!r} has to be a finite number, found {found}")
    return found


def section(data: Any, name: str) -> Mapping[str, Any]:
    """An object."""
    found: Mapping[str, Any] = take(data, name, dict, "an object")
    return found


def items(data: Any, name: str) -> Sequence[Any]:
    """A list."""
    found: Sequence[Any] = take(data, name, (list, tuple), "a list")
    return found


def objects(data: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """A list of objects."""
    found = items(data, name)
    for item in found:
        if not isinstance(item, dict):
            raise ConfigError(f"field {name!r} has to be a list of objects, found {item!r:.80}")
    return found


def whole_list(data: Any, name: str) -> tuple[int, ...]:
    """A list of whole numbers of at least 0."""
    found = items(data, name)
    for item in found:
        if type(item) is not int or item < 0:
            raise ConfigError(
                f"field {name!r} has to be a list of whole numbers of at least 0, found "
                f"{item!r:.80} in it"
            )
    return tuple(found)
