"""`Facts`: what the user says about a recorded model; which of a recording's layers have experts.

Knows no engine and no file form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["MOST_LAYERS", "Facts", "Note", "Piece", "choose_layers", "experts_of", "recorded_top_k"]

MOST_LAYERS = 65536  # more layers than this in a file are damage
Note = Callable[[str], None]  # takes a sentence about the recording that its user should know


class Piece(NamedTuple):
    """Some rows of a recording and the file that they are from."""

    path: Path
    rows: RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about the recorded model; a form needs those that its files do not say.

    Args:
        hidden_layers: all decoder layers, dense ones included; 0 if unknown.
        first_dense: so many layers at the beginning are dense, all others have experts.
        moe_layers: absolute indices of the layers with experts, in order; () if unknown.
        experts: routed experts a layer: one number for all layers, or one for each of them.
        top_k: experts a token, the same in each layer; 0 if unknown.
        model_id, fingerprint: of the model; "" if unknown. They go into the result.

    Raises:
        ConfigError: numbers that no model has, or both `first_dense` and `moe_layers`.
    """

    hidden_layers: int = 0
    first_dense: int | None = None
    moe_layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    top_k: int = 0
    model_id: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.first_dense is not None and self.moe_layers:
            raise ConfigError("give the dense layers' number or the list of MoE layers, not both")
        if self.hidden_layers < 0 or self.top_k < 0 or (self.first_dense or 0) < 0:
            raise ConfigError("layers, dense layers and top-k must be 0 or more")
        if any(not 1 <= count < UNUSED for count in self.experts):
            raise ConfigError(f"experts must be 1 to {UNUSED - 1}, found {list(self.experts)}")
        layers = self.moe_layers
        if len(set(layers)) != len(layers) or any(not 0 <= at < MOST_LAYERS for at in layers):
            raise ConfigError(f"MoE layers must be distinct and 0 or more, found {list(layers)}")


def choose_layers(
    path: Path, rows: int, used: NDArray[np.bool_], facts: Facts, *, sure: bool = True
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Which of a recording's layer rows have experts, and their absolute layer indices.

    Args:
        path: the file, for messages.
        rows: layer rows of the recording.
        used: bool `[rows]`, whether any token has experts in a row.
        facts: what the user says. Without it, rows are all hidden layers and the used ones count.
        sure: whether an unused row tells a dense layer from one with experts.

    Returns:
        positions int64 `[L]` among the rows, and as many layer indices.

    Raises:
        TraceError: layers are missing or too many, or none is used.
    """
    if facts.hidden_layers and rows not in {facts.hidden_layers, len(facts.moe_layers)}:
        raise TraceError(
            f"{path}: has {rows} layers, but the model is said to have {facts.hidden_layers}; "
            "correct the number of layers, or take another file"
        )
    layers = _said_layers(path, rows, facts)
    if layers is None:
        if not used.any():
            raise TraceError(f"{path}: no layer has experts; the recording is empty")
        if not (sure or used.all()):
            raise TraceError(
                f"{path}: layer {int(np.argmin(used))} holds only expert 0, which with top-1 may "
                "be a dense layer or a choice; say which layers have experts (--moe-layers, "
                "--first-dense)"
            )
        chosen = np.flatnonzero(used)
        return chosen, tuple(chosen.tolist())
    if len(layers) == rows and max(layers) >= rows:  # the rows are the MoE layers alone
        return np.arange(rows), layers
    others = used.copy()
    others[list(layers)] = False
    if others.any():
        raise TraceError(
            f"{path}: layer {int(np.argmax(others))} has experts in the file, but is not among the "
            f"MoE layers given; correct --moe-layers or --first-dense"
        )
    return np.array(layers, np.int64), layers


def _said_layers(path: Path, rows: int, facts: Facts) -> tuple[int, ...] | None:
    """The MoE layers that the user names, None if nothing is said."""
    if facts.first_dense is not None:
        if facts.first_dense >= rows:
            raise TraceError(
                f"{path}: has {rows} layers, but {facts.first_dense} are said to be dense; none "
                "with experts is left"
            )
        return tuple(range(facts.first_dense, rows))
    if not facts.moe_layers:
        return None
    if max(facts.moe_layers) >= rows and len(facts.moe_layers) != rows:
        raise TraceError(
            f"{path}: has {rows} layers, so layer {max(facts.moe_layers)} of the "
            f"{len(facts.moe_layers)} MoE layers given is missing; give one index a row, or "
            "indices of its rows"
        )
    return facts.moe_layers


def experts_of(
    path: Path, layer_ids: Sequence[int], facts: Facts, found: int = 0
) -> tuple[int, ...]:
    """Experts of each layer: what the file says (`found`, 0 if nothing), else what the user says.

    Raises:
        TraceError: neither says it, or they differ.
    """
    said = facts.experts * len(layer_ids) if len(facts.experts) == 1 else facts.experts
    if said and len(said) != len(layer_ids):
        raise TraceError(
            f"{path}: {len(said)} numbers of experts for {len(layer_ids)} MoE layers; give one for "
            "each, or one for all"
        )
    if not said and not found:
        raise TraceError(
            f"{path}: does not say how many experts a layer has; give it (--experts, or --model)"
        )
    for layer, count in zip(layer_ids, said, strict=False):
        if found and count != found:
            raise TraceError(
                f"{path}: layer {layer} has {found} experts, but {count} are said; is it another "
                "model's recording?"
            )
    return said or (found,) * len(layer_ids)


def recorded_top_k(path: Path, facts: Facts, found: int) -> int:
    """Experts a token; TraceError if the file has another number than the user says."""
    if facts.top_k and facts.top_k != found:
        raise TraceError(
            f"{path}: has {found} experts a token, but top-k {facts.top_k} is said; correct "
            "--top-k, or is it another model's recording?"
        )
    return found
