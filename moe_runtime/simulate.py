"""The cache simulator: what a policy would have hit and missed on a recorded run.

Knows nothing of time, tensors or transfers: it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.eviction import EvictionPolicy, choose_victims

__all__ = ["Access", "SimulationResult", "simulate"]


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """Counts of one simulated run.

    Args:
        slots: size of the pool, in experts.
        steps: layer steps.
        hits, misses: requests for experts found in the pool, and loaded.
        evictions: experts that left the pool.
        first_uses: distinct experts requested, which no policy can avoid loading.
        waves: rounds of loading; more than one in a step that needs more experts than slots.
        hits_by_position, misses_by_position: the same counts by position in `ExpertGrid.layers`.
        bytes_read: bytes of all misses, if bytes per expert were given.
    """

    slots: int
    steps: int
    hits: int
    misses: int
    evictions: int
    first_uses: int
    waves: int
    hits_by_position: tuple[int, ...]
    misses_by_position: tuple[int, ...]
    bytes_read: int | None

    @property
    def requests(self) -> int:
        """Experts asked for, summed over layer steps."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits over requests; 0 for an empty run."""
        return self.hits / self.requests if self.requests else 0.0


class _Pool:
    """The residents of one pool of slots, over all layers."""

    def __init__(self, size: int, slots: int) -> None:
        self.resident = np.zeros(size, dtype=bool)
        self.free = slots
        self.evictions = 0

    def admit(self, policy: EvictionPolicy, arrivals: IntArray, held: IntArray) -> None:
        """Load `arrivals` (not resident); nothing of `held` (resident) leaves for them."""
        surplus = len(arrivals) - self.free
        if surplus > 0:
            self.resident[held] = False
            candidates = np.flatnonzero(self.resident)
            self.resident[held] = True
            self.resident[choose_victims(policy, candidates, surplus)] = False
            self.evictions += surplus
        self.free = max(-surplus, 0)
        self.resident[arrivals] = True


def simulate(
    policy: EvictionPolicy,
    grid: ExpertGrid,
    accesses: Sequence[Access],
    slots: int,
    *,
    expert_bytes: Sequence[int] | None = None,
) -> SimulationResult:
    """Replay `accesses` through one pool of `slots` experts over all layers, cold at first.

    Loading is on demand only. Experts that the present layer step needs are not evicted. A step
    that needs more than `slots` runs in waves: first the hits with as many of the missing (in
    ascending order) as fit, then the next missing; what earlier waves have computed may leave.

    Args:
        policy: is asked for victims; takes in every access. Give a fresh one to each call.
        grid: numbering of the experts.
        accesses: the run, in order.
        slots: size of the pool, in experts, 1 or more.
        expert_bytes: bytes of one expert of each layer, to count `bytes_read`.

    Raises:
        BudgetError: no slots. ConfigError: `expert_bytes` of another length than the layers.
    """
    if slots < 1:
        raise BudgetError(f"the simulator needs a slot at least, found {slots}")
    if expert_bytes is not None and len(expert_bytes) != len(grid.layers):
        raise ConfigError(
            f"expert_bytes need one entry for each of the {len(grid.layers)} layers, "
            f"found {len(expert_bytes)}"
        )
    pool = _Pool(grid.size, slots)
    seen = np.zeros(grid.size, dtype=bool)
    hits, misses = [0] * len(grid.layers), [0] * len(grid.layers)
    waves = 0
    for access in accesses:
        policy.observe(access.position, access.experts, access.tokens)
        needed = grid.offsets[access.position] + access.experts
        seen[needed] = True
        found = pool.resident[needed]
        held, missing = needed[found], needed[~found]
        hits[access.position] += len(held)
        misses[access.position] += len(missing)
        while len(missing):
            # If the hits alone fill the pool they are computed first, and may leave after that.
            arrivals = missing[: slots - len(held)]
            if len(arrivals):
                pool.admit(policy, arrivals, held)
                missing = missing[len(arrivals) :]
                waves += 1
            held = held[:0]
    read = None
    if expert_bytes is not None:
        read = sum(count * size for count, size in zip(misses, expert_bytes, strict=True))
    return SimulationResult(
        slots=slots,
        steps=len(accesses),
        hits=sum(hits),
        misses=sum(misses),
        evictions=pool.evictions,
        first_uses=int(seen.sum()),
        waves=waves,
        hits_by_position=tuple(hits),
        misses_by_position=tuple(misses),
        bytes_read=read,
    )
