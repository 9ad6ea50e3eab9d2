"""One layer, its neighbours fixed: the best devices for its experts, exact while no cap binds.

A balanced linear assignment, or a transport program where experts have replicas or devices may
hold different numbers; a load cap is met by prices on load (Lagrangian) and swaps. Knows one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from moe_runtime.placement.problem import LayerLimits
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array, vstack

from moe_runtime.core import FloatArray, IntArray

__all__ = [
    "EPSILON",
    "LayerSlots",
    "assign",
    "balanced_start",
    "improve_by_swaps",
    "overload",
    "relieve",
]

_PRICE_STEPS = 12
EPSILON = 1e-9  # what a load may exceed its cap by; what a swap has to gain


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSlots:
    """The slots of one layer: one for each expert and each further replica.

    Args:
        owner: int64 `[S]`, the expert of each slot, ascending.
        load: float64 `[S]`, the load of each slot (an expert's load shared by its replicas).
        limits: what devices may hold.
    """

    owner: IntArray
    load: FloatArray
    limits: LayerLimits

    @property
    def has_replicas(self) -> bool:
        """Whether some expert has more than one slot."""
        return len(self.owner) > 0 and bool(self.owner[-1] + 1 < len(self.owner))

    def collides(self, device: IntArray) -> bool:
        """Whether two replicas of one expert are on one device."""
        keys = self.owner * len(self.limits.most) + device
        return self.has_replicas and len(np.unique(keys)) < len(keys)

    def held(self, device: IntArray) -> NDArray[np.bool_]:
        """Bool `[E, G]`: whether the device holds the expert."""
        held = np.zeros((int(self.owner[-1]) + 1, len(self.limits.most)), dtype=np.bool_)
        held[self.owner, device] = True
        return held

    def loads(self, device: IntArray) -> FloatArray:
        """float64 `[G]`, the load of each device."""
        loads: FloatArray = np.zeros(len(self.limits.most))
        np.add.at(loads, device, self.load)
        return loads


def overload(slots: LayerSlots, device: IntArray) -> float:
    """By how much the most overloaded device exceeds its cap; 0 or less if all keep it."""
    return float((slots.loads(device) - slots.limits.load).max())


def assign(values: FloatArray, slots: LayerSlots, device: IntArray) -> IntArray:
    """The best devices for the slots of a layer.

    Args:
        values: float64 `[S, G]`, what a slot is worth on each device; equal for replicas.
        device: int64 `[S]`, a placement that keeps the limits; the result is worth no less.

    Returns:
        int64 `[S]`, device of each slot.
    """
    free = _without_cap(values, slots)
    if overload(slots, free) <= EPSILON:
        return free
    best, best_value = device, _worth(values, device)
    if overload(slots, device) > EPSILON:
        best_value = -np.inf
    prices = np.zeros(values.shape[1])
    spread = float((values.max(1) - values.min(1)).mean())
    rate = 4 * spread / max(float(slots.load.mean()), 1e-300)
    chosen = free
    for _ in range(_PRICE_STEPS):
        excess = slots.loads(chosen) / slots.limits.load - 1.0
        prices = np.maximum(0.0, prices + rate * excess)
        rate *= 0.8
        chosen = _without_cap(values - slots.load[:, None] * prices, slots)
        if overload(slots, chosen) <= EPSILON and _worth(values, chosen) > best_value:
            best, best_value = chosen, _worth(values, chosen)
    best = improve_by_swaps(values, slots, best)
    repaired = improve_by_swaps(values, slots, relieve(slots, chosen))
    if overload(slots, repaired) <= EPSILON and _worth(values, repaired) > _worth(values, best):
        best = repaired
    return best


def _worth(values: FloatArray, device: IntArray) -> float:
    return float(values[np.arange(len(device)), device].sum())


def _without_cap(values: FloatArray, slots: LayerSlots) -> IntArray:
    least, most = slots.limits.least, slots.limits.most
    if least.any() and not np.array_equal(least, most):
        return _transport(values, slots)
    # One column for each place on a device; more places than slots leave some empty.
    columns = np.repeat(np.arange(len(most)), most)
    _, place = linear_sum_assignment(values[:, columns], maximize=True)
    chosen: IntArray = columns[place]
    return _transport(values, slots) if slots.collides(chosen) else chosen


def _transport(values: FloatArray, slots: LayerSlots) -> IntArray:
    """The same with replicas on distinct devices and counts between bounds.

    A transport program: its constraint matrix is totally unimodular, so the solution that the
    simplex method ends in is whole.
    """
    experts, first = np.unique(slots.owner, return_index=True)
    replicas = np.bincount(slots.owner, minlength=len(experts)).astype(np.float64)
    count, devices = len(experts), values.shape[1]
    worth = values[first]
    by_expert = csr_array(np.kron(np.eye(count), np.ones((1, devices))))
    by_device = csr_array(np.kron(np.ones((1, count)), np.eye(devices)))
    solution = linprog(
        -worth.ravel(),
        A_eq=by_expert,
        b_eq=replicas,
        A_ub=vstack([by_device, -by_device]),
        b_ub=np.concatenate([slots.limits.most, -slots.limits.least]).astype(np.float64),
        bounds=(0, 1),
        method="highs-ds",
    )
    assert solution.x is not None, "the limits were checked to have a solution"
    held = solution.x.reshape(count, devices) > 0.5
    expert, device = np.nonzero(held)  # row by row: in the order of the slots' owners
    assert np.array_equal(expert, slots.owner), "a vertex of a transport program is whole"
    return device.astype(np.int64)


def improve_by_swaps(
    values: FloatArray,
    slots: LayerSlots,
    device: IntArray,
    together: FloatArray | None = None,
    *,
    limit: int = 200,
) -> IntArray:
    """Swap two slots' devices while that is worth something and keeps the load caps.

    Args:
        values: as for `assign`; with `together` the part of it that `device` itself gives
            included (`together @ onehot(device)`).
        together: float64 `[S, S]`, what two slots of this layer are worth on one device.
        limit: at most so many swaps.
    """
    device = device.copy()
    values = values.copy()
    index = np.arange(len(device))
    cap = slots.limits.load
    load = slots.loads(device)
    gives = slots.load[:, None] - slots.load[None, :]  # what f's device gets more
    same_owner = slots.owner[:, None] == slots.owner[None, :]
    for _ in range(limit):
        own = values[index, device]
        there = values[:, device]  # [e, f]: e on f's device
        gain = there + there.T - own[:, None] - own[None, :]
        if together is not None:
            gain -= 2 * together
        fits = load[device][None, :] + gives <= cap[device][None, :] + EPSILON
        allowed = fits & fits.T & (device[:, None] != device[None, :]) & ~same_owner
        if slots.has_replicas:
            clash = slots.held(device)[slots.owner][
                :, device
            ]  # e's expert is on f's device already
            allowed &= ~clash & ~clash.T
        gain = np.where(allowed, gain, -np.inf)
        e, f = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[e, f] <= EPSILON:
            break
        a, b = device[e], device[f]
        load[a] += slots.load[f] - slots.load[e]
        load[b] += slots.load[e] - slots.load[f]
        device[e], device[f] = b, a
        if together is not None:
            change = together[:, e] - together[:, f]
            values[:, b] += change
            values[:, a] -= change
    return device


def relieve(slots: LayerSlots, device: IntArray, *, limit: int = 400) -> IntArray:
    """Move and swap slots away from overloaded devices until all caps hold, as far as that goes."""
    device = device.copy()
    load, cap = slots.loads(device), slots.limits.load
    count = np.bincount(device, minlength=len(cap))
    for _ in range(limit):
        over = int((load - cap).argmax())
        excess = float(load[over] - cap[over])
        if excess <= EPSILON:
            break
        left, e, f = _best_swap(slots, device, load, over)
        left_by_move, mover, target = _best_move(slots, device, load, count, over)
        if min(left, left_by_move) >= excess - EPSILON:
            break
        changes = [(mover, target)] if left_by_move < left else [(e, int(device[f])), (f, over)]
        for slot, to in changes:
            load[device[slot]] -= slots.load[slot]
            count[device[slot]] -= 1
            load[to] += slots.load[slot]
            count[to] += 1
            device[slot] = to
    return device


def _best_swap(
    slots: LayerSlots, device: IntArray, load: FloatArray, over: int
) -> tuple[float, int, int]:
    """(worst excess of the two devices afterwards, slot on `over`, slot elsewhere)."""
    cap = slots.limits.load
    mine = np.flatnonzero(device == over)[:, None]
    other = np.flatnonzero(device != over)[None, :]
    if not other.size:
        return np.inf, -1, -1
    moved = slots.load[mine] - slots.load[other]
    after = np.maximum(
        load[over] - moved - cap[over], load[device[other]] + moved - cap[device[other]]
    )
    if slots.has_replicas:
        held = slots.held(device)
        clash = held[slots.owner[mine], device[other]] | held[slots.owner[other], over]
        after = np.where(clash, np.inf, after)
    i, j = np.unravel_index(int(after.argmin()), after.shape)
    return float(after[i, j]), int(mine[i, 0]), int(other[0, j])


def _best_move(
    slots: LayerSlots, device: IntArray, load: FloatArray, count: IntArray, over: int
) -> tuple[float, int, int]:
    """(worst excess of the two devices afterwards, slot on `over`, device with room for it)."""
    limits = slots.limits
    mine = np.flatnonzero(device == over)
    places = np.flatnonzero(count < limits.most)
    places = places[places != over]
    if not len(places) or count[over] <= limits.least[over]:
        return np.inf, -1, -1
    moved = slots.load[mine][:, None]
    after = np.maximum(
        load[over] - moved - limits.load[over], load[places] + moved - limits.load[places]
    )
    if slots.has_replicas:
        after = np.where(slots.held(device)[slots.owner[mine]][:, places], np.inf, after)
    i, j = np.unravel_index(int(after.argmin()), after.shape)
    return float(after[i, j]), int(mine[i]), int(places[j])


def balanced_start(slots: LayerSlots, rng: np.random.Generator, noise: float = 0.3) -> IntArray:
    """A placement that keeps the limits and is random otherwise.

    Heaviest first onto the least loaded device with room, loads blurred by `noise`, then swaps
    until the caps hold.
    """
    if not len(slots.owner):  # a node that holds nothing of the layer
        return np.zeros(0, dtype=np.int64)
    most, least, cap = slots.limits.most, slots.limits.least, slots.limits.load
    devices = len(most)
    share = np.where(np.isfinite(cap), cap, 1.0)
    blurred = slots.load * np.exp(noise * rng.standard_normal(len(slots.load)))
    if not np.isfinite(cap).all():
        blurred = rng.random(len(slots.load)) + 1.0
    device = np.full(len(slots.owner), -1, dtype=np.int64)
    load, count = np.zeros(devices), np.zeros(devices, dtype=np.int64)
    held = np.zeros((int(slots.owner[-1]) + 1, devices), dtype=bool)
    names = rng.permutation(devices)
    # Replicas first: they are the ones with few places left at the end.
    many = np.bincount(slots.owner)[slots.owner]
    for slot in np.lexsort((-blurred, -many)).tolist():
        open_ = (count < most) & ~held[slots.owner[slot]]
        if (count < least).any():  # as many slots as are still owed must go where they are owed
            owed = int((least - count).clip(0).sum())
            if owed >= int((device < 0).sum()):
                open_ &= count < least
        places = names[open_[names]]
        if not len(places):
            return _transport(rng.random((len(slots.owner), 1)) * np.ones((1, devices)), slots)
        best = places[int((load[places] / share[places]).argmin())]
        device[slot] = best
        load[best] += blurred[slot]
        count[best] += 1
        held[slots.owner[slot], best] = True
    return relieve(slots, device)
