"""One layer's routing sorted by expert: which tokens each expert works on.

Pure functions of the router's choice; knows no cache and no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import numpy as np
import torch

from moe_runtime.access import Access
from moe_runtime.core import IntArray
from moe_runtime.errors import UnsupportedModelError

__all__ = ["LayerRouting", "sort_routing", "sort_single"]


@dataclass(frozen=True, eq=False, slots=True)
class LayerRouting:
    """The (token, choice) pairs of one layer step, grouped by expert.

    A pair is a place in the choice-major flattening `[K, T]` of the router's choice.

    Args:
        access: distinct experts with at least one pair, ascending, and the pairs of each.
        pairs: int64 tensor, pairs expert by expert; within one expert by choice, then token, as
            eager orders them.
        starts: int64 array, first pair of each expert.
    """

    access: Access
    pairs: torch.Tensor
    starts: IntArray

    def of(self, experts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Pairs of these experts, in their order, and how many each has."""
        places = np.searchsorted(self.access.experts, experts)
        counts: list[int] = self.access.tokens[places].tolist()
        if len(counts) == len(self.access.experts) and bool((np.diff(places) > 0).all()):
            return self.pairs, counts
        starts = self.starts[places].tolist()
        runs = zip(starts, counts, strict=True)
        return torch.cat([self.pairs[start : start + count] for start, count in runs]), counts


def sort_routing(
    position: int, top_k_index: torch.Tensor, num_experts: int, real: torch.Tensor | None
) -> LayerRouting:
    """Group `top_k_index [T, K]` by expert.

    Indices of `num_experts` and more are sentinels (an expert elsewhere) and dropped, as are the
    rows that `real` (bool `[T]`) marks as padding.

    Raises:
        UnsupportedModelError: an index below 0.
    """
    flat = top_k_index.t().reshape(-1).to("cpu").numpy()
    keep = flat < num_experts
    if real is not None:
        keep &= np.tile(real.numpy(), top_k_index.shape[1])
    order = np.argsort(flat, kind="stable").astype(np.int64, copy=False)
    if not keep.all():
        order = order[keep[order]]
    if len(order) and flat[order[0]] < 0:
        _refuse(position, int(flat[order[0]]), num_experts)
    experts, counts = _runs(flat[order])
    starts = np.cumsum(counts) - counts
    access = Access(position=position, experts=experts, tokens=counts)
    return LayerRouting(access, torch.from_numpy(order), starts)


def sort_single(position: int, chosen: Sequence[int], num_experts: int) -> Access | None:
    """The access of a single token whose choices are distinct experts, or None if they are not.

    The common step of decode, without the cost of sorting arrays.

    Raises:
        UnsupportedModelError: an index below 0.
    """
    ascending = sorted(chosen)
    if ascending[0] < 0:
        _refuse(position, ascending[0], num_experts)
    if ascending[-1] >= num_experts or len(set(ascending)) != len(ascending):
        return None
    experts = np.array(ascending, np.int64)
    return Access(position=position, experts=experts, tokens=_ones(len(ascending)))


def _refuse(position: int, chosen: int, num_experts: int) -> NoReturn:
    raise UnsupportedModelError(
        f"the router of MoE layer {position} (counted from 0) chose expert {chosen}; experts are "
        f"numbered from 0 to {num_experts - 1}, and what is elsewhere from {num_experts} on"
    )


@lru_cache
def _ones(count: int) -> IntArray:
    ones = np.ones(count, np.int64)
    ones.setflags(write=False)
    return ones


def _runs(ordered: IntArray) -> tuple[IntArray, IntArray]:
    """Values and lengths of the runs of a sorted array."""
    if not len(ordered):
        return ordered, np.zeros(0, np.int64)
    edges = np.flatnonzero(np.diff(ordered)) + 1
    starts = np.concatenate(([0], edges))
    lengths = np.diff(np.concatenate((starts, [len(ordered)])))
    return ordered[starts], lengths
