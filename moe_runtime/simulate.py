"""The cache simulator: what a policy would have hit and missed on a recorded run.

Knows nothing of time, tensors or transfers: it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        first_uses: distinct experts requested, which no policy can avoid loading; without those
            that are pinned.
        pinned_hits: the hits of pinned experts.
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
    pinned_hits: int = 0

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
    pinned: IntArray | None = None,
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
        pinned: int64 `[P]`, dense indices of experts that lie in slots from the start and never
            leave; loading them counts as nothing. The policy is not asked about them.

    Raises:
        BudgetError: no slots, or none that is not pinned. ConfigError: `expert_bytes` of another
            length than the layers, or a pinned expert that is not in the grid.
    """
    permanent = _flags(grid, pinned)
    slots_given, slots = slots, slots - int(permanent.sum())
    if slots < 1 and (slots_given < 1 or slots < 0 or not permanent.all()):
        raise BudgetError(
            f"the simulator needs a slot at least besides the pinned experts, found {slots_given} "
            f"slots and {int(permanent.sum())} pinned"
        )
    if expert_bytes is not None and len(expert_bytes) != len(grid.layers):
        raise ConfigError(
            f"expert_bytes need one entry for each of the {len(grid.layers)} layers, "
            f"found {len(expert_bytes)}"
        )
    pool = _Pool(grid.size, slots)
    seen = np.zeros(grid.size, dtype=bool)
    hits, misses = [0] * len(grid.layers), [0] * len(grid.layers)
    waves = pinned_hits = 0
    for access in accesses:
        policy.observe(access.position, access.experts, access.tokens)
        needed = grid.offsets[access.position] + access.experts
        if pinned is not None:
            stays = permanent[needed]
            hits[access.position] += int(stays.sum())
            pinned_hits += int(stays.sum())
            needed = needed[~stays]
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
        slots=slots_given,
        steps=len(accesses),
        hits=sum(hits),
        misses=sum(misses),
        evictions=pool.evictions,
        first_uses=int(seen.sum()),
        waves=waves,
        hits_by_position=tuple(hits),
        misses_by_position=tuple(misses),
        bytes_read=read,
        pinned_hits=pinned_hits,
    )


def _flags(grid: ExpertGrid, pinned: IntArray | None) -> NDArray[np.bool_]:
    flags = np.zeros(grid.size, dtype=np.bool_)
    if pinned is not None and len(pinned):
        if not 0 <= int(pinned.min()) <= int(pinned.max()) < grid.size:
            raise ConfigError(
                f"pinned experts are dense indices 0 to {grid.size - 1}, found "
                f"{int(pinned.min())} to {int(pinned.max())}"
            )
        flags[pinned] = True
    return flags
