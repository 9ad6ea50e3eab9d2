"""Frozen dataclasses from plain JSON data, each field checked by its declared type.

Knows no profile.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from moe_runtime.errors import ConfigError

__all__ = ["read_value"]

_T = TypeVar("_T")


def read_value(cls: type[_T], data: Any, where: str) -> _T:
    """A dataclass from a JSON object, nested dataclasses and tuples of them included.

    Args:
        where: name of the object, for errors.

    Raises:
        ConfigError: a field is missing, unknown or of another type; names it.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object, found {data!r:.60}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cast(Any, cls))]
    unknown = sorted(set(map(str, data)) - set(names))
    missing = [name for name in names if name not in data]
    if unknown or missing:
        fault = f"has no {missing[0]!r}" if missing else f"has an unknown field {unknown[0]!r}"
        raise ConfigError(f"{where} {fault}")
    values = {name: _read(hints[name], data[name], f"{where}.{name}") for name in names}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return read_value(cast(type[Any], kind), data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ConfigError(f"{where} must be a list, found {data!r:.60}")
        return tuple(_read(inner[0], item, f"{where}[{at}]") for at, item in enumerate(data))
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in inner:
            return None
        return _read(next(one for one in inner if one is not type(None)), data, where)
    if origin is typing.Literal:
        if data not in inner:
            raise ConfigError(f"{where} must be one of {', '.join(inner)}, found {data!r:.60}")
        return data
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise ConfigError(f"{where} must be {kind.__name__}, found {data!r:.60}")
    if kind in (int, float) and not 0 <= data < 1 << 63:
        raise ConfigError(f"{where} must be finite and not negative, found {data!r}")
    return data
