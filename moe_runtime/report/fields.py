"""Fields of a run record or a simulation: read from plain data, checked, refused by name.

Does not know which fields there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_runtime.errors import MoERuntimeError

__all__ = ["RunError", "count", "mapping", "number", "share"]

RUN = "run record"


class RunError(MoERuntimeError, ValueError):
    """A run record or simulation is damaged or of another version; the message names the field."""


def mapping(data: Mapping[str, Any], name: str, what: str = RUN) -> Mapping[str, Any]:
    """A section that has to be there."""
    value = data.get(name)
    if not isinstance(value, Mapping):
        found = "it is missing" if name not in data else f"found {type(value).__name__}"
        raise RunError(f"{what}: {name!r} must be an object, {found}")
    return value


def number(data: Mapping[str, Any], name: str, where: str, what: str = RUN) -> float:
    """A finite number of at least 0."""
    value = data.get(name)
    if name not in data:
        raise RunError(f"{what}: {where}.{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RunError(f"{what}: {where}.{name} must be a number, found {value!r}")
    if not math.isfinite(value) or value < 0:
        raise RunError(f"{what}: {where}.{name} must be finite and not negative, found {value}")
    return value


def count(data: Mapping[str, Any], name: str, where: str, what: str = RUN) -> int:
    """A whole number of at least 0."""
    value = number(data, name, where, what)
    if value != int(value):
        raise RunError(f"{what}: {where}.{name} must be a whole number, found {value}")
    return int(value)


def share(data: Mapping[str, Any], name: str, where: str, what: str = RUN) -> float | None:
    """A number of 0 to 1, or None where the field is null or missing."""
    if data.get(name) is None:
        return None
    value = number(data, name, where, what)
    if value > 1:
        raise RunError(f"{what}: {where}.{name} must be a share of 0 to 1, found {value}")
    return value
