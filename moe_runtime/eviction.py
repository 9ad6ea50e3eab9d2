"""Eviction policies as pure choosers: given what has been routed, what may leave the cache first.

Knows nothing of slots, tiers, transfers or tensors: a policy sees routing and ranks candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import ConfigError
from moe_runtime.eviction_learned import Echo
from moe_runtime.eviction_predicted import Predicted
from moe_runtime.selection import lowest_few

__all__ = [
    "POLICY_NAMES",
    "Belady",
    "DecayedCount",
    "Echo",
    "EvictionPolicy",
    "LeastRecentlyUsed",
    "Predicted",
    "StaticCounts",
    "choose_victims",
    "make_policy",
]


class EvictionPolicy(Protocol):
    """What the cache asks of a policy. Deterministic: the same calls give the same ranks.

    A policy holds statistics only; it never learns what is resident, so the same policy object
    serves any number of slots. One policy serves one run.
    """

    name: ClassVar[str]

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        """Take in one layer step. Mutates statistics; called before `rank` of the same step.

        Args:
            position: 0-based position of the layer in `grid.layers`.
            experts: int64 `[n]`, distinct expert numbers of that layer, ascending.
            tokens: int64 `[n]`, tokens routed to each.
        """
        ...

    def rank(self, candidates: IntArray) -> FloatArray:
        """Keep-value of each candidate, float64 `[n]`; the lowest leaves first. Never mutates.

        Args:
            candidates: int64 `[n]`, dense indices of residents that this step does not need.
        """
        ...


def choose_victims(policy: EvictionPolicy, candidates: IntArray, count: int) -> IntArray:
    """The `count` candidates of lowest keep-value, lowest first; ties go to the lowest index.

    Args:
        policy: ranks the candidates; is not changed.
        candidates: int64 `[n]`, distinct dense indices, any order.
        count: how many have to leave, `0 <= count <= n`.

    Returns:
        int64 `[count]`, dense indices.
    """
    if not 0 <= count <= len(candidates):
        raise ConfigError(f"cannot choose {count} victims among {len(candidates)} candidates")
    if count == 0:
        return candidates[:0]
    values = policy.rank(candidates)
    chosen = lowest_few(values, count)  # sorting these few is all that is left to do
    order = np.lexsort((candidates[chosen], values[chosen]))
    return candidates[chosen[order[:count]]]


class LeastRecentlyUsed:
    """Keeps what was used last: the keep-value is the number of the step of the last use."""

    name: ClassVar[str] = "lru"

    def __init__(self, grid: ExpertGrid) -> None:
        self._offsets = grid.offsets
        self._last_use = np.zeros(grid.size)
        self._step = 0

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        self._step += 1
        self._last_use[self._offsets[position] + experts] = self._step

    def rank(self, candidates: IntArray) -> FloatArray:
        return self._last_use[candidates]


class DecayedCount:
    """Least frequently used, with decay: counts lose `1 - decay` at each step of their layer.

    A step adds each expert's share of the busiest expert's tokens, so that a long prompt weighs
    as much as one decoded token and not as hundreds.

    Args:
        grid: numbering of the experts.
        decay: kept part of a count per step of its layer, `0 < decay <= 1`.
    """

    name: ClassVar[str] = "lfu"

    def __init__(self, grid: ExpertGrid, decay: float = 0.96) -> None:
        if not 0 < decay <= 1:
            raise ConfigError(f"lfu: decay has to lie in (0, 1], found {decay}")
        self._bounds = [(at, at + n) for at, n in zip(grid.offsets, grid.experts, strict=True)]
        self._decay = decay
        self._counts = np.zeros(grid.size)

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        start, stop = self._bounds[position]
        layer = self._counts[start:stop]
        layer *= self._decay
        layer[experts] += tokens / tokens.max(initial=1)

    def rank(self, candidates: IntArray) -> FloatArray:
        return self._counts[candidates]


class StaticCounts:
    """Keeps what an earlier run used most: the keep-value is a given count and never changes.

    Args:
        grid: numbering of the experts.
        counts: `[grid.size]`, uses of each expert by dense index.
    """

    name: ClassVar[str] = "static"

    def __init__(self, grid: ExpertGrid, counts: Sequence[float] | FloatArray | IntArray) -> None:
        self._counts = np.array(counts, dtype=np.float64)
        if self._counts.shape != (grid.size,):
            raise ConfigError(
                f"static: counts need one number for each of the {grid.size} experts, "
                f"found shape {self._counts.shape}"
            )
        if np.isnan(self._counts).any():
            raise ConfigError("static: counts hold NaN; give a number for each expert")

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        pass

    def rank(self, candidates: IntArray) -> FloatArray:
        return self._counts[candidates]


class Belady:
    """The offline optimum: what is needed again last leaves first. For simulation only.

    With one pool of equal slots, demand loading and experts of a step held together, no policy
    has fewer misses (as long as each step fits into the slots).

    Args:
        grid: numbering of the experts.
        accesses: the whole run; `observe` must be called with exactly these, in this order.
    """

    name: ClassVar[str] = "belady"

    def __init__(self, grid: ExpertGrid, accesses: Sequence[Access]) -> None:
        self._dense = [grid.offsets[access.position] + access.experts for access in accesses]
        self._next_use = np.full(grid.size, np.inf)
        self._following: list[FloatArray] = [np.empty(0)] * len(self._dense)
        upcoming = np.full(grid.size, np.inf)
        for step in range(len(self._dense) - 1, -1, -1):
            self._following[step] = upcoming[self._dense[step]]
            upcoming[self._dense[step]] = step
        self._next_use = upcoming
        self._offsets = grid.offsets
        self._step = 0

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        step = self._step
        if step >= len(self._dense) or not np.array_equal(
            self._dense[step], self._offsets[position] + experts
        ):
            raise ConfigError(
                f"belady: step {step} is not the one that the policy was built for; "
                "replay exactly the accesses given at construction"
            )
        self._next_use[self._dense[step]] = self._following[step]
        self._step += 1

    def rank(self, candidates: IntArray) -> FloatArray:
        return -self._next_use[candidates]


_FACTORIES: dict[str, Callable[..., EvictionPolicy]] = {
    policy.name: policy
    for policy in (LeastRecentlyUsed, DecayedCount, StaticCounts, Echo, Predicted, Belady)
}
POLICY_NAMES: tuple[str, ...] = tuple(_FACTORIES)


def make_policy(name: str, grid: ExpertGrid, **options: Any) -> EvictionPolicy:
    """The policy called `name`, for one run over `grid`.

    Args:
        name: one of `POLICY_NAMES`.
        grid: numbering of the experts.
        options: arguments of the policy's class.

    Raises:
        ConfigError: unknown name, or options that the policy does not take.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(POLICY_NAMES)}")
    try:
        return factory(grid, **options)
    except TypeError as error:
        raise ConfigError(f"eviction policy {name!r}: {error}") from error
