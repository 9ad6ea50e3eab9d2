"""Frozen values from plain JSON data and its files, each field checked against its annotation.

Knows no particular value.
"""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moe_runtime.errors import ConfigError

__all__ = ["from_plain", "load_plain"]

_T = TypeVar("_T")


def from_plain(kind: type[_T], data: Any, where: str) -> _T:
    """The dataclass `kind` of a JSON object; fields that it does not have are ignored.

    Fields may be texts, whole and finite numbers, booleans, literals, tuples (JSON lists), other
    dataclasses, and any of these or None.

    Raises:
        ConfigError: a field is missing or of another type; names its place, as `arms[2].beta`.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {_short(data)}, not a JSON object")
    hints = get_type_hints(kind)
    found = {}
    for one in fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{one.name}" if where else one.name
        if one.name not in data:
            raise ConfigError(f"{place} is missing")
        found[one.name] = _value(hints[one.name], data[one.name], place)
    return kind(**found)


def load_plain(
    path: str | os.PathLike[str],
    make: Callable[[Mapping[str, Any]], _T],
    *,
    what: str,
    again: str,
) -> _T:
    """What `make` makes of a file's JSON object.

    Args:
        make: raises ConfigError for an object that it does not take.
        what: should be in the file, for messages.
        again: what to do where it is damaged.

    Raises:
        ConfigError: names the file, what was found and what to do.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such {what}; check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON text ({error}); {again}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: no JSON object; this is no {what}")
    try:
        return make(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _value(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return from_plain(kind, data, where)
    if origin in {Union, types.UnionType}:
        if data is None and type(None) in get_args(kind):
            return None
        return _value(next(one for one in get_args(kind) if one is not type(None)), data, where)
    if origin is tuple:
        return _items(get_args(kind), data, where)
    if origin is Literal:
        if data not in get_args(kind):
            known = ", ".join(map(repr, get_args(kind)))
            raise ConfigError(f"{where} is {_short(data)}; known: {known}")
        return data
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    fits = isinstance(data, accepted) and (kind is bool or not isinstance(data, bool))
    if not fits or (kind in {int, float} and not _finite(data)):
        raise ConfigError(f"{where} is {_short(data)}, not {_NAMES.get(kind, kind.__name__)}")
    return float(data) if kind is float else data


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # JSON has whole numbers that no float can hold
        return False


_NAMES: Mapping[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
}


def _items(kinds: Sequence[Any], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise ConfigError(f"{where} is {_short(data)}, not a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = [kinds[0]] * len(data)
    if len(kinds) != len(data):
        raise ConfigError(f"{where} has {len(data)} entries, not {len(kinds)}")
    pairs = enumerate(zip(kinds, data, strict=True))
    return tuple(_value(kind, item, f"{where}[{at}]") for at, (kind, item) in pairs)


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
