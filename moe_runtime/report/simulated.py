"""`Simulated`: the outcome of `moe-runtime simulate`, read from plain data and checked.

Does not know how it was simulated, nor how it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moe_runtime.report.fields import RunError, count, mapping, number, share

__all__ = ["SIMULATION_FORMAT", "SIMULATION_VERSION", "Contender", "Simulated", "read_simulated"]

SIMULATION_FORMAT, SIMULATION_VERSION = "moe-runtime.simulation", 1

_WHAT = "simulation"
# Predictors that know the run, or stand in for a gate that does; those that others use too. What
# is left is this runtime's own, as are its policies.
_KNOWING = {"oracle", "pre-gated"}
_COMMON = {"popularity", "previous-token", "previous-layer", "token-table", "pair-counts"}
_OWN_POLICIES = {"echo", "predicted"}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One policy, with or without a predictor; times are simulated seconds, sizes bytes.

    `wasted` is read ahead of need and never used, and part of `read`. Ratios are None where there
    was nothing to divide by.
    """

    title: str
    policy: str
    predictor: str | None
    summary: str
    state: str
    uses: int
    resident: int
    in_time: int
    late: int
    missed: int
    evictions: int
    read: int
    wasted: int
    hit_rate: float
    seconds: float
    stall_seconds: float
    predictor_seconds: float
    tokens_per_second: float
    bytes_over_belady: float | None
    speed_over_lru: float | None

    @property
    def role(self) -> str:
        """`lru`, `bound` (Belady's), `oracle` (knows the run), `ours`, or empty for others."""
        if self.predictor is None and self.policy in {"lru", "belady"}:
            return "bound" if self.policy == "belady" else "lru" if self.title == "lru" else ""
        if self.predictor in _KNOWING:
            return "oracle"
        own = self.predictor is not None and self.predictor not in _COMMON
        return "ours" if own or self.policy in _OWN_POLICIES else ""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """All contenders in one setting.

    Args:
        data: the plain data that it was read from.
        setting: the section of that name; `link` and `compute` in it are objects.
        left_out: (title, why) of contenders that could not run.
    """

    data: Mapping[str, Any]
    model_id: str
    tokens: int
    traces: tuple[str, ...]
    fit: tuple[str, ...]
    setting: Mapping[str, Any]
    slots: tuple[int, ...]
    experts: int
    expert_bytes: tuple[int, ...]
    contenders: tuple[Contender, ...]
    left_out: tuple[tuple[str, str], ...]

    @classmethod
    def load(cls, path: str | Path) -> Simulated:
        """A file of `simulate -o`; RunError names the file, the field and what was found."""
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        try:
            return read_simulated(json.loads(text))
        except ValueError as error:
            raise RunError(f"{path}: {error}; simulate again") from None

    def of(self, role: str) -> list[Contender]:
        """Contenders of a role, the fastest first."""
        found = [one for one in self.contenders if one.role == role]
        return sorted(found, key=lambda one: -one.tokens_per_second)


def read_simulated(data: Any) -> Simulated:
    """Plain data as `docs/formats.md`, section Simulation, has it.

    Raises:
        RunError: damaged, incomplete or of another version; the message names the field.
    """
    if not isinstance(data, Mapping) or data.get("format") != SIMULATION_FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise RunError(f"{_WHAT}: 'format' must be {SIMULATION_FORMAT!r}, found {found!r}")
    if data.get("version") != SIMULATION_VERSION:
        raise RunError(
            f"{_WHAT}: 'version' is {data.get('version')!r}, this release reads "
            f"{SIMULATION_VERSION}"
        )
    setting = mapping(data, "setting", _WHAT)
    for name in ("link", "compute"):
        mapping(setting, name, _WHAT)
    number(setting["link"], "bytes_per_second", "setting.link", _WHAT)
    rows = _list(data, "contenders")
    return Simulated(
        data=data,
        model_id=_text(data, "model_id", _WHAT),
        tokens=count(data, "tokens", _WHAT, _WHAT),
        traces=tuple(map(str, _list(data, "traces"))),
        fit=tuple(map(str, _list(data, "fit"))),
        setting=setting,
        slots=_counts(setting, "slots"),
        experts=count(setting, "experts", "setting", _WHAT),
        expert_bytes=_counts(setting, "expert_bytes"),
        contenders=tuple(_contender(row, f"contenders[{at}]") for at, row in enumerate(rows)),
        left_out=tuple(_left_out(row, at) for at, row in enumerate(_list(data, "left_out"))),
    )


def _contender(row: Any, where: str) -> Contender:
    if not isinstance(row, Mapping):
        raise RunError(f"{_WHAT}: {where} must be an object, found {type(row).__name__}")
    moved = mapping(row, "bytes", f"{_WHAT}: {where}")
    values: dict[str, Any] = {name: _text(row, name, where) for name in ("title", "policy")}
    for name in ("summary", "state"):
        values[name] = _text(row, name, where)
    values["predictor"] = None if row.get("predictor") is None else _text(row, "predictor", where)
    for name in ("read", "wasted"):
        values[name] = count(moved, name, f"{where}.bytes", _WHAT)
    hit_rate = share(row, "hit_rate", where, _WHAT)
    values["hit_rate"] = 0.0 if hit_rate is None else hit_rate
    for name in ("bytes_over_belady", "speed_over_lru"):
        values[name] = None if row.get(name) is None else number(row, name, where, _WHAT)
    for item in fields(Contender):
        if item.name not in values:
            read = count if item.type == "int" else number
            values[item.name] = read(row, item.name, where, _WHAT)
    found = Contender(**values)
    if found.uses != found.resident + found.in_time + found.late + found.missed:
        raise RunError(
            f"{_WHAT}: {where}.uses is {found.uses}, but resident, in_time, late and missed add up "
            f"to {found.resident + found.in_time + found.late + found.missed}"
        )
    if found.wasted > found.read:
        raise RunError(f"{_WHAT}: {where}.bytes has more wasted than read")
    return found


def _left_out(row: Any, at: int) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        raise RunError(f"{_WHAT}: left_out[{at}] must be an object, found {type(row).__name__}")
    return _text(row, "title", f"left_out[{at}]"), _text(row, "why", f"left_out[{at}]")


def _text(data: Mapping[str, Any], name: str, where: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise RunError(f"{_WHAT}: {where}.{name} must be a text, found {value!r}")
    return value


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list):
        raise RunError(f"{_WHAT}: {name!r} must be a list, found {type(value).__name__}")
    return value


def _counts(setting: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = _list(setting, name)
    items = ({name: value} for value in values)
    return tuple(count(item, name, "setting", _WHAT) for item in items)
