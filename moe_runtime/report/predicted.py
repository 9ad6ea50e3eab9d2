"""`Predicted`: what prediction did in a run, read from the record's section and checked.

Does not know predictors, nor how it is drawn or worded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moe_runtime.core import ExpertGrid
from moe_runtime.report.fields import RunError, count, number, share

__all__ = ["AheadBytes", "AheadLoads", "Predicted", "PredictedLayer", "TrialStep", "read_predicted"]

_STATES = ("trial", "predicting", "plain")


@dataclass(frozen=True, kw_only=True)
class TrialStep:
    """At which decode step the trial of prediction went into which state, and why.

    `ratio` is seconds a step with prediction over without, `error` the standard error of its
    logarithm; both None where nothing had been compared.
    """

    step: int
    state: str
    ratio: float | None
    error: float | None
    why: str


@dataclass(frozen=True, kw_only=True)
class AheadLoads:
    """Experts loaded ahead of need, `ahead` in all, by what became of them."""

    ahead: int
    in_time: int
    late: int
    unused: int
    withdrawn: int
    pending: int
    evictions: int


@dataclass(frozen=True, kw_only=True)
class AheadBytes:
    """The same in bytes; `withdrawn` was read in vain of loads that were called off."""

    ahead: int
    in_time: int
    late: int
    unused: int
    withdrawn: int

    @property
    def wasted(self) -> int:
        """Read and never used: unused and withdrawn."""
        return self.unused + self.withdrawn


@dataclass(frozen=True, kw_only=True)
class PredictedLayer:
    """Outcomes of one MoE layer's uses, by its absolute index; recall 1, 2, ... layers ahead."""

    layer: int
    resident: int
    in_time: int
    late: int
    missed: int
    recall: tuple[float | None, ...]

    @property
    def uses(self) -> int:
        """Experts that the layer needed."""
        return self.resident + self.in_time + self.late + self.missed


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Prediction in a run; `seconds` were spent in the predictor, `failure` is empty if none."""

    predictor: str
    rules: Mapping[str, Any]
    seconds: float
    failure: str
    state: str
    decisions: tuple[TrialStep, ...]
    loads: AheadLoads
    nbytes: AheadBytes
    layers: tuple[PredictedLayer, ...]

    def total(self, fate: str) -> int:
        """Sum over the layers of `resident`, `in_time`, `late`, `missed` or `uses`."""
        return sum(getattr(layer, fate) for layer in self.layers)


def read_predicted(data: Any, grid: ExpertGrid) -> Predicted | None:
    """The section `prediction` of a run record; None if it was left out.

    Raises:
        RunError: a field is missing or malformed, or names a layer that the model lacks.
    """
    if data is None:
        return None
    data = _object(data, "prediction")
    name = data.get("predictor")
    if not isinstance(name, str):
        raise RunError(f"run record: prediction.predictor must be a name, found {name!r}")
    return Predicted(
        predictor=name or "unnamed predictor",
        rules=_object(data.get("rules", {}), "prediction.rules"),
        seconds=number(data, "seconds", "prediction"),
        failure=str(data.get("failure") or ""),
        state=_state(data, "prediction"),
        decisions=tuple(
            _decision(entry, where) for where, entry in _entries(data, "decisions", "prediction")
        ),
        loads=AheadLoads(**_counts(data, "loads", AheadLoads)),
        nbytes=AheadBytes(**_counts(data, "bytes", AheadBytes)),
        layers=tuple(
            _layer(entry, where, grid) for where, entry in _entries(data, "layers", "prediction")
        ),
    )


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RunError(f"run record: {where} must be an object, found {type(value).__name__}")
    return value


def _entries(data: Mapping[str, Any], name: str, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a list, each with its place in the record."""
    entries = data.get(name)
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise RunError(f"run record: {where}.{name} must be a list")
    places = [f"{where}.{name}[{at}]" for at in range(len(entries))]
    return [(place, _object(entry, place)) for place, entry in zip(places, entries, strict=True)]


def _counts(data: Mapping[str, Any], name: str, kind: type[Any]) -> dict[str, int]:
    section = _object(data.get(name), f"prediction.{name}")
    return {one.name: count(section, one.name, f"prediction.{name}") for one in fields(kind)}


def _state(data: Mapping[str, Any], where: str) -> str:
    state = data.get("state")
    if state not in _STATES:
        raise RunError(f"run record: {where}.state must be one of {_STATES}, found {state!r}")
    return str(state)


def _decision(data: Mapping[str, Any], where: str) -> TrialStep:
    def optional(name: str) -> float | None:
        return None if data.get(name) is None else number(data, name, where)

    return TrialStep(
        step=count(data, "step", where),
        state=_state(data, where),
        ratio=optional("ratio"),
        error=optional("error"),
        why=str(data.get("why") or ""),
    )


def _layer(data: Mapping[str, Any], where: str, grid: ExpertGrid) -> PredictedLayer:
    recall = data.get("recall")
    if not isinstance(recall, Sequence) or isinstance(recall, str):
        raise RunError(f"run record: {where}.recall must be a list of shares")
    names = ("layer", "resident", "in_time", "late", "missed")
    counts = {name: count(data, name, where) for name in names}
    if counts["layer"] not in grid.position:
        raise RunError(
            f"run record: {where} is of layer {counts['layer']}, which model.layers lacks"
        )
    return PredictedLayer(
        **counts,
        recall=tuple(
            share({f"recall[{at}]": value}, f"recall[{at}]", where)
            for at, value in enumerate(recall)
        ),
    )
