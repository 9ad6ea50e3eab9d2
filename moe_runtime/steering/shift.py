"""Routing shift: how two runs over the same tokens differ in the experts that were chosen.

Knows neither models nor what was done to the second run; it compares two recordings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import TraceError
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["LayerShift", "RoutingShift", "routing_shift"]

_CHUNK = 16_384  # rows compared at once: bounds the memory of the [rows, K, K] comparison


@dataclass(frozen=True, kw_only=True)
class LayerShift:
    """One layer of two runs; all measures are between 0 and 1.

    Args:
        layer: absolute Hugging Face layer index.
        changed: share of the (token, slot) choices that the other run did not make for that token.
            The order of a token's experts does not count.
        jaccard: mean over the tokens of |both| / |either|, 1 if all tokens chose alike.
        total_variation: half the sum over the experts of the absolute difference of their shares
            of all choices. 0 with `changed` above 0: tokens exchanged experts, the load is as it
            was.
    """

    layer: int
    changed: float
    jaccard: float
    total_variation: float


@dataclass(frozen=True, kw_only=True)
class RoutingShift:
    """How routing moved between two runs over the same tokens.

    Args:
        tokens: rows compared.
        layers: one for each MoE layer, in order of execution.
    """

    tokens: int
    layers: tuple[LayerShift, ...]

    @property
    def changed(self) -> float:
        """Mean over the layers of the share of choices that changed; 0 without layers."""
        values = [one.changed for one in self.layers]
        return math.fsum(values) / len(values) if values else 0.0

    @property
    def first_changed(self) -> int | None:
        """The first layer in which a choice changed; None if none did."""
        return next((one.layer for one in self.layers if one.changed), None)

    def after(self, layers: Iterable[int]) -> tuple[LayerShift, ...]:
        """The layers that run after the first of `layers`: those that steering can move.

        Steering that multiplies weights leaves its own layer's choice alone; one that forces or
        biases a choice moves that layer too.
        """
        order = [one.layer for one in self.layers]
        places = [order.index(layer) for layer in layers if layer in order]
        return self.layers[min(places) + 1 :] if places else ()


def routing_shift(unsteered: RoutingTrace, steered: RoutingTrace) -> RoutingShift:
    """Compare the choices of two recordings of the same tokens, row by row.

    Both runs have to read the same sequences (teacher forcing): where a run goes on with its own
    tokens, the tokens differ before the routing does. Batches and padding may differ; the order
    of the rows may not.

    Args:
        unsteered: `N` rows, `L` layers, at most `K` experts a token.
        steered: the same rows.

    Raises:
        TraceError: rows, tokens, layers or experts differ; the message says where first.
    """
    _require_same_rows(unsteered, steered)
    layers = []
    for at, layer in enumerate(unsteered.layer_ids):
        first, second = unsteered.topk_ids[:, at], steered.topk_ids[:, at]
        counts = unsteered.experts[at]
        layers.append(
            LayerShift(
                layer=layer,
                **_overlap(first, second),
                total_variation=_total_variation(first, second, counts),
            )
        )
    return RoutingShift(tokens=len(unsteered), layers=tuple(layers))


def _overlap(first: NDArray[np.uint16], second: NDArray[np.uint16]) -> dict[str, float]:
    """`changed` and `jaccard` of one layer; ids `[N, K]` each."""
    kept = most = 0
    jaccard = []
    for a, b in _chunks(first, second):
        used_a, used_b = a != UNUSED, b != UNUSED
        both = ((a[:, :, None] == b[:, None, :]) & used_a[:, :, None]).any(2).sum(1)
        size_a, size_b = used_a.sum(1), used_b.sum(1)
        either = size_a + size_b - both
        kept += int(both.sum())
        most += int(np.maximum(size_a, size_b).sum())
        # A token that neither run routed here was treated alike.
        jaccard.append(float(np.where(either > 0, both / np.maximum(either, 1), 1.0).sum()))
    return {
        "changed": 1.0 - kept / most if most else 0.0,
        "jaccard": math.fsum(jaccard) / len(first) if len(first) else 1.0,
    }


def _chunks(
    first: NDArray[np.uint16], second: NDArray[np.uint16]
) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
    for start in range(0, len(first), _CHUNK):
        yield first[start : start + _CHUNK], second[start : start + _CHUNK]


def _total_variation(first: NDArray[np.uint16], second: NDArray[np.uint16], experts: int) -> float:
    counts = [_counts(ids, experts) for ids in (first, second)]
    sums = [int(one.sum()) for one in counts]
    if not any(sums):
        return 0.0
    if not all(sums):
        return 1.0
    # In whole numbers, so that equal shares differ by exactly 0.
    difference = np.abs(counts[0] * sums[1] - counts[1] * sums[0])
    return float(difference.sum() / (2 * sums[0] * sums[1]))


def _counts(ids: NDArray[np.uint16], experts: int) -> IntArray:
    return np.bincount(ids[ids != UNUSED], minlength=experts).astype(np.int64)


def _require_same_rows(unsteered: RoutingTrace, steered: RoutingTrace) -> None:
    for name in ("layer_ids", "experts", "fingerprint"):
        mine, theirs = getattr(unsteered, name), getattr(steered, name)
        if mine != theirs:
            raise TraceError(
                f"routing shift: the traces have different {name}, {mine!r} and {theirs!r}; "
                "compare two runs of one model"
            )
    if len(unsteered) != len(steered):
        raise TraceError(
            f"routing shift: {len(unsteered)} rows unsteered, {len(steered)} steered; let both "
            "runs read the same sequences instead of generating their own"
        )
    for name in ("token_ids", "sequence_ids", "positions"):
        mine, theirs = getattr(unsteered, name), getattr(steered, name)
        differ = np.flatnonzero(mine != theirs)
        if len(differ):
            row = int(differ[0])
            raise TraceError(
                f"routing shift: {name}[{row}] is {mine[row]} unsteered and {theirs[row]} steered "
                f"({len(differ)} of {len(mine)} rows differ); let both runs read the same "
                "sequences in the same order"
            )
