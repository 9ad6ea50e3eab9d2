"""One layer's routing sorted by expert: which tokens each expert works on.

Pure functions of the router's choice; knows no cache and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.core import IntArray

__all__ = ["LayerRouting", "sort_routing"]


@dataclass(frozen=True, eq=False, slots=True)
class LayerRouting:
    """The (token, choice) pairs of one layer step, grouped by expert.

    Args:
        experts: distinct experts with at least one pair, ascending.
        counts: pairs of each.
        pairs: int64 tensor `[pairs]`, places in the choice-major flattening `[K, T]`, expert by
            expert; within one expert by choice, then token, as eager orders them.
        starts: first pair of each expert.
    """

    experts: list[int]
    counts: list[int]
    pairs: torch.Tensor
    starts: list[int]

    def of(self, number: int) -> torch.Tensor:
        """Pairs of the expert at this place in `experts`."""
        start = self.starts[number]
        return self.pairs[start : start + self.counts[number]]


def sort_routing(
    top_k_index: torch.Tensor, num_experts: int, real: torch.Tensor | None
) -> LayerRouting:
    """Group `top_k_index [T, K]` by expert.

    Indices of `num_experts` and more are sentinels (an expert elsewhere) and dropped, as are the
    rows that `real` (bool `[T]`) marks as padding.
    """
    flat = top_k_index.t().reshape(-1).to("cpu").numpy()
    keep = flat < num_experts
    if real is not None:
        keep &= np.tile(real.numpy(), top_k_index.shape[1])
    order = np.argsort(flat, kind="stable").astype(np.int64, copy=False)
    if not keep.all():
        order = order[keep[order]]
    experts, counts = _runs(flat[order])
    starts = np.zeros(len(counts), np.int64)
    if len(counts):
        starts[1:] = np.cumsum(counts)[:-1]
    return LayerRouting(experts.tolist(), counts.tolist(), torch.from_numpy(order), starts.tolist())


def _runs(ordered: IntArray) -> tuple[IntArray, IntArray]:
    """Values and lengths of the runs of a sorted array."""
    if not len(ordered):
        return ordered, np.zeros(0, np.int64)
    edges = np.flatnonzero(np.diff(ordered)) + 1
    starts = np.concatenate(([0], edges))
    lengths = np.diff(np.concatenate((starts, [len(ordered)])))
    return ordered[starts], lengths
