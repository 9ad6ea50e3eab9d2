"""`PinnedExperts`: what a plan keeps resident, what it predicted of it and what was observed.

Does not know how plans are made, nor how the comparison is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.core import ExpertGrid
from moe_runtime.report.fields import RunError, count, share

__all__ = ["PinnedExperts", "PinnedLayer", "read_pinned"]


@dataclass(frozen=True, kw_only=True)
class PinnedLayer:
    """One MoE layer, by its absolute index: experts that stay, and the shares of its uses that
    they should serve and did; None where the plan says nothing, or where nothing was used.
    """

    layer: int
    pinned: int
    predicted: float | None
    observed: float | None


@dataclass(frozen=True, kw_only=True)
class PinnedExperts:
    """The same for the whole run, with the plan's name and the bytes that stay."""

    name: str
    pinned: int
    nbytes: int
    predicted: float | None
    observed: float | None
    layers: tuple[PinnedLayer, ...]


def read_pinned(data: Any, grid: ExpertGrid) -> PinnedExperts | None:
    """The section `plan` of a run record; None if it was left out.

    Raises:
        RunError: a field is missing or malformed, or names a layer that the model lacks.
    """
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise RunError(f"run record: plan must be an object, found {type(data).__name__}")
    entries = data.get("layers")
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise RunError("run record: plan.layers must be a list")
    layers = []
    for at, entry in enumerate(entries):
        where = f"plan.layers[{at}]"
        if not isinstance(entry, Mapping):
            raise RunError(f"run record: {where} must be an object, found {type(entry).__name__}")
        row = PinnedLayer(
            layer=count(entry, "layer", where),
            pinned=count(entry, "pinned", where),
            predicted=share(entry, "predicted_share", where),
            observed=share(entry, "observed_share", where),
        )
        if row.layer not in grid.position:
            raise RunError(f"run record: {where} is of layer {row.layer}, which model.layers lacks")
        layers.append(row)
    return PinnedExperts(
        name=str(data.get("name") or "unnamed plan"),
        pinned=count(data, "pinned", "plan"),
        nbytes=count(data, "pinned_bytes", "plan"),
        predicted=share(data, "predicted_share", "plan"),
        observed=share(data, "observed_share", "plan"),
        layers=tuple(layers),
    )
