"""Filling memories with experts so that they serve the most uses: the problem, exact sorting,
greedy filling, and a bound.

Arrays in, a choice out. Does not know layers, plans or solvers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError

__all__ = ["Floor", "Packed", "Packing", "fractional_bound", "greedy", "pack"]

BoolArray: TypeAlias = NDArray[np.bool_]

PROVED_BY_SORTING = "sorted by uses"


@dataclass(frozen=True, kw_only=True, eq=False)
class Floor:
    """`least` of the items `members` (int64, ascending) have to be chosen."""

    members: IntArray
    least: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Choose items of the most uses; every memory that holds an item pays its bytes.

    Args:
        uses: float64 `[N]`, what choosing an item is worth; not negative.
        nbytes: int64 `[N]`, more than 0.
        held: bool `[N, G]`, which memories hold the item if it is chosen; one at least.
        capacity: float64 `[G]`, bytes; `inf` where there is no limit.
        floors: what has to be chosen whatever it is worth.
    """

    uses: FloatArray
    nbytes: IntArray
    held: BoolArray
    capacity: FloatArray
    floors: tuple[Floor, ...] = ()

    @property
    def separate(self) -> bool:
        """Whether no item lies in two memories, so that each memory is a problem of its own."""
        return bool((self.held.sum(axis=1) <= 1).all())

    def load(self, chosen: BoolArray) -> IntArray:
        """int64 `[G]`: bytes in each memory."""
        loads: IntArray = self.nbytes[chosen] @ self.held[chosen].astype(np.int64)
        return loads

    def fits(self, chosen: BoolArray) -> bool:
        """Whether a choice keeps every capacity and every floor, by exact arithmetic."""
        return bool((self.load(chosen) <= self.capacity).all()) and all(
            int(chosen[floor.members].sum()) >= floor.least for floor in self.floors
        )

    def value(self, chosen: BoolArray) -> float:
        """Uses that a choice serves."""
        return float(self.uses[chosen].sum())

    def within(self, items: IntArray, memory: int) -> Packing:
        """The problem of one memory and the items that only it holds."""
        place = np.full(len(self.uses), -1, np.int64)
        place[items] = np.arange(len(items))
        return Packing(
            uses=self.uses[items],
            nbytes=self.nbytes[items],
            held=self.held[items][:, [memory]],
            capacity=self.capacity[[memory]],
            floors=tuple(
                Floor(members=place[floor.members], least=floor.least)
                for floor in self.floors
                if len(floor.members) and (place[floor.members] >= 0).all()
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A choice, bool `[N]`, and what is known of it.

    Args:
        bound: no choice serves more uses.
        proved: whether this one serves as many as any.
        method: how it was found.
    """

    chosen: BoolArray
    bound: float
    proved: bool
    method: str = field(default=PROVED_BY_SORTING)


def pack(packing: Packing, *, time_limit: float) -> Packed:
    """Choose items: exactly by sorting where all have the same bytes, else by integer program.

    Items without uses are left out, unless their memory holds everything or a floor wants them.

    Args:
        time_limit: seconds for the integer programs together.

    Raises:
        PlanError: the floors do not fit.
    """
    if not packing.separate:
        return _pack_joined(packing, time_limit)
    chosen = np.zeros(len(packing.uses), np.bool_)
    parts = []
    memories = packing.held.shape[1]
    for memory in range(memories):
        items = np.flatnonzero(packing.held[:, memory])
        if len(items):
            part = _pack_joined(packing.within(items, memory), time_limit / memories)
            chosen[items] = part.chosen
            parts.append(part)
    return Packed(
        chosen=chosen,
        bound=sum(part.bound for part in parts),
        proved=all(part.proved for part in parts),
        method=", ".join(sorted({part.method for part in parts})) or PROVED_BY_SORTING,
    )


def _pack_joined(packing: Packing, time_limit: float) -> Packed:
    everything = np.ones(len(packing.uses), np.bool_)
    if packing.fits(everything):
        return Packed(chosen=everything, bound=packing.value(everything), proved=True)
    if packing.held.shape[1] == 1 and len(set(packing.nbytes.tolist())) == 1:
        chosen = greedy(packing)
        if not packing.fits(chosen):
            raise _floors_do_not_fit()
        return Packed(chosen=chosen, bound=packing.value(chosen), proved=True)
    from moe_runtime.placement.ilp_residency import solve_packing

    solved = solve_packing(packing, time_limit=time_limit)
    if solved is None:
        raise _floors_do_not_fit()
    return Packed(
        chosen=_without_idle(packing, solved.chosen),
        bound=solved.bound,
        proved=solved.proved,
        method=solved.method,
    )


def _floors_do_not_fit() -> PlanError:
    return PlanError(
        "the residents asked for in every layer do not fit into the memory; lower the floor or "
        "give more memory"
    )


def greedy(packing: Packing) -> BoolArray:
    """The floors' best items, then by uses a byte whatever still fits.

    For one memory and items of equal bytes this is optimal: a best choice can be changed into it
    item by item, none of the exchanges serving less.
    """
    chosen = np.zeros(len(packing.uses), np.bool_)
    for floor in packing.floors:
        by_uses = np.argsort(-packing.uses[floor.members], kind="stable")
        chosen[floor.members[by_uses[: floor.least]]] = True
    left = packing.capacity - packing.load(chosen)
    order = np.argsort(-packing.uses / packing.nbytes, kind="stable")
    for item in order[packing.uses[order] > 0].tolist():
        need = packing.held[item] * packing.nbytes[item]
        if not chosen[item] and (need <= left).all():
            chosen[item] = True
            left = left - need
    return chosen


def fractional_bound(packing: Packing) -> float:
    """Uses that no choice exceeds: each memory filled alone, its last item cut to fit.

    The linear relaxation's value for one memory without floors. An item in several memories may
    count in each, so the bound is valid for any number of them, not tight.
    """
    total = 0.0
    for memory in range(packing.held.shape[1]):
        items = np.flatnonzero(packing.held[:, memory])
        order = items[np.argsort(-packing.uses[items] / packing.nbytes[items], kind="stable")]
        before = np.cumsum(packing.nbytes[order]) - packing.nbytes[order]
        room = np.clip((packing.capacity[memory] - before) / packing.nbytes[order], 0.0, 1.0)
        total += float(packing.uses[order] @ room)
    return min(total, float(packing.uses.sum()))


def _without_idle(packing: Packing, chosen: BoolArray) -> BoolArray:
    """The choice less its items without uses that no floor wants."""
    needed = np.zeros(len(chosen), np.bool_)
    for floor in packing.floors:
        idle = floor.members[chosen[floor.members] & (packing.uses[floor.members] == 0)]
        spare = int(chosen[floor.members].sum()) - floor.least
        needed[idle[: max(0, len(idle) - spare)]] = True
    kept: BoolArray = chosen & ((packing.uses > 0) | needed)
    return kept
