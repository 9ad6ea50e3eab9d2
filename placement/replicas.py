"""Replicas: how many of each expert, and on which devices, so that the heaviest is lightest.

Takes loads, gives who holds what, and how far that can be from the best. Knows neither affinity
nor plans.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from moe_runtime.placement.eplb import eplb
from moe_runtime.placement.replica_search import improve
from numpy.typing import ArrayLike, NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError

__all__ = ["balance", "imbalance", "least_imbalance", "pack", "replica_counts", "replicate"]

BoolArray: TypeAlias = NDArray[np.bool_]

_CLOSE = 1e-4  # relative distance to the bound at which a layer counts as solved


def replica_counts(load: ArrayLike, slots: int, most: int) -> IntArray:
    """How often to hold each expert so that the largest load of a replica is as low as possible.

    Each further replica goes to the expert whose replicas are heaviest and that may have one more;
    no other choice has a lower maximum. Among equals those with fewer replicas come first.

    Args:
        load: `[E]`, tokens of each expert.
        slots: replicas in all, E to E x `most`.
        most: replicas of one expert at most (the devices).

    Returns:
        int64 `[E]`, 1 to `most`, with sum `slots`.

    Raises:
        PlanError: slots out of range, or loads that are negative or not finite.
    """
    loads = _loads(load)
    if not len(loads) <= slots <= len(loads) * most:
        raise PlanError(
            f"{slots} slots for {len(loads)} experts with at most {most} replicas each: give "
            f"{len(loads)} to {len(loads) * most}"
        )
    counts = np.ones(len(loads), dtype=np.int64)
    heaviest = [(-value, 1, expert) for expert, value in enumerate(loads.tolist()) if most > 1]
    heapq.heapify(heaviest)
    for _ in range(slots - len(loads)):
        _, count, expert = heapq.heappop(heaviest)
        counts[expert] = count + 1
        if count + 1 < most:
            heapq.heappush(heaviest, (-loads[expert] / (count + 1), count + 1, expert))
    return counts


def imbalance(load: ArrayLike, copies: ArrayLike, shares: ArrayLike | None = None) -> float:
    """Highest load of a device over what it should have; 1 is perfect.

    Args:
        load: `[E]`, tokens of each expert.
        copies: `[E, G]`, bool or the number of copies; an expert's load is spread evenly over them.
        shares: `[G]`, share of the load that each device should get; equal if not given.
    """
    loads, held = np.asarray(load, dtype=np.float64), np.asarray(copies, dtype=np.float64)
    if not loads.sum():
        return 1.0
    target = _shares(shares, held.shape[1]) * loads.sum()
    return float(((loads / held.sum(axis=1)) @ held / target).max())


def least_imbalance(
    load: ArrayLike, devices: int, redundant: int, shares: ArrayLike | None = None
) -> float:
    """No placement of E experts and `redundant` replicas, equal slots a device, is better.

    The mean is one bound. The other: some replica is as heavy as the optimal counts' heaviest, and
    its device holds further experts, whose replicas weigh as much as the lightest ones at least.
    """
    loads = _loads(load)
    slots = len(loads) + redundant
    if not loads.sum():
        return 1.0
    most = min(devices, redundant + 1)
    heaviest = float((loads / replica_counts(loads, slots, devices)).max())
    beside = float(np.sort(loads / most)[: slots // devices - 1].sum())
    fastest = float(_shares(shares, devices).max())
    return max(1.0, (heaviest + beside) / (fastest * float(loads.sum())))


def pack(
    load: ArrayLike, counts: ArrayLike, devices: int, shares: ArrayLike | None = None
) -> BoolArray:
    """Put each expert's replicas on distinct devices, equally many on each, heaviest first.

    Each replica goes to the device whose load stays lowest among those that have room and do not
    hold its expert; where none is left, a replica moves to make room.

    Args:
        load: `[E]`, tokens of each expert.
        counts: `[E]`, replicas of each expert, 1 to `devices`; their sum a multiple of `devices`.
        devices: G.
        shares: `[G]`, share of the load that each device should get; equal if not given.

    Returns:
        bool `[E, G]`: whether the device holds the expert.

    Raises:
        PlanError: counts out of range or that cannot be dealt out evenly.
    """
    loads, number = _loads(load), np.asarray(counts, dtype=np.int64)
    if number.shape != loads.shape or number.min() < 1 or number.max() > devices:
        raise PlanError(
            f"counts must be {len(loads)} numbers, 1 to {devices} devices; found "
            f"{number.tolist()!s:.80}"
        )
    room = _room(int(number.sum()), devices)
    share = _shares(shares, devices)
    weight = loads / number
    held = np.zeros((len(loads), devices), dtype=np.bool_)
    carried = np.zeros(devices)
    for expert in np.argsort(-weight, kind="stable").tolist():
        for _ in range(int(number[expert])):
            roomy = held.sum(axis=0) < room
            after = (carried + weight[expert]) / share
            after[~roomy | held[expert]] = np.inf
            device = int(after.argmin())
            if after[device] == np.inf:
                device = _make_room(held, weight, expert, roomy)
            held[expert, device] = True
            carried = weight @ held
    return held


def _make_room(held: BoolArray, weight: FloatArray, expert: int, roomy: BoolArray) -> int:
    """Every device with room holds `expert`: a replica that weighs most like it moves to such a
    device from a full one. Returns the one that now has room.
    """
    empty = int(np.flatnonzero(roomy)[0])
    movable = held & ~held[:, [empty]] & ~held[expert]
    experts, devices = np.nonzero(movable)
    # A full device holds more experts than `empty`, and one without `expert` exists.
    assert len(experts)
    best = int(np.abs(weight[experts] - weight[expert]).argmin())
    held[experts[best], devices[best]] = False
    held[experts[best], empty] = True
    return int(devices[best])


def balance(
    load: ArrayLike,
    devices: int,
    redundant: int,
    *,
    shares: ArrayLike | None = None,
    starts: Sequence[Sequence[ArrayLike]] = (),
    shakes: int = 12,
    seed: int = 0,
) -> list[BoolArray]:
    """Place the experts of each layer, some of them several times, so that devices are balanced.

    Starts from the optimal counts packed heaviest first, from EPLB's packing, and from `starts`;
    improves each and keeps the best. So it is never worse than EPLB, except where EPLB puts an
    expert twice on one device, which a plan cannot hold: there EPLB's is repaired first.

    Args:
        load: `[L, E]`, tokens of each expert.
        devices: G; divides E + `redundant`.
        redundant: replicas R beyond the first of each expert.
        shares: `[G]`, share of the load that each device should get; equal if not given.
        starts: further placements, each bool `[E, G]` for every layer.
        shakes: how long to go on where the result is not at its bound.
        seed: of all random choices.

    Returns:
        Bool `[E, G]` for each layer: (E + R) / G experts on each device, no expert twice.

    Raises:
        PlanError: slots that cannot be dealt out evenly or hold too few or too many experts.
    """
    loads = np.asarray(load, dtype=np.float64)
    if loads.ndim != 2:
        raise PlanError(f"loads must be an array [layers, experts], found shape {loads.shape}")
    experts = loads.shape[1]
    _room(experts + redundant, devices)
    counts = [replica_counts(row, experts + redundant, devices) for row in loads]
    rivals = eplb(loads, experts + redundant, 1, 1, devices).copies(devices)
    placed = []
    for number, row in enumerate(loads):
        given = [np.asarray(start[number], dtype=np.bool_) for start in starts]
        found = [
            pack(row, counts[number], devices, shares),
            _repaired(row, rivals[number] > 0, (experts + redundant) // devices),
            *given,
        ]
        bound = least_imbalance(row, devices, redundant, shares)
        rival = imbalance(row, rivals[number], shares)
        enough = max(bound, min(bound * (1 + _CLOSE), rival))
        placed.append(_best(row, found, shares, enough, shakes, seed + number))
    return placed


def replicate(
    load: ArrayLike,
    held: ArrayLike,
    redundant: int,
    *,
    shares: ArrayLike | None = None,
    shakes: int = 12,
    seed: int = 0,
) -> BoolArray:
    """Add replicas to one layer's placement; what it places stays where it is.

    Args:
        load: `[E]`, tokens of each expert.
        held: bool `[E, G]`, a placement with equally many experts on each device.
        redundant: replicas to add; G divides them.
        shares, shakes, seed: as for `balance`.

    Returns:
        bool `[E, G]`, true wherever `held` is.

    Raises:
        PlanError: devices that hold different numbers, or replicas that cannot be dealt out.
    """
    loads, kept = _loads(load), np.asarray(held, dtype=np.bool_)
    devices = kept.shape[1]
    filled = kept.sum(axis=0)
    if len(set(filled.tolist())) != 1 or kept.sum(axis=1).min() < 1:
        raise PlanError(
            f"replicas are added to placements that hold every expert and equally many on each "
            f"device; found {filled.tolist()} on the devices"
        )
    room = _room(int(filled.sum()) + redundant, devices)
    if room > len(loads):
        raise PlanError(f"{room} slots a device for {len(loads)} experts; ask for fewer replicas")
    full = _repaired(loads, kept, room)
    target = _shares(shares, devices) * loads.sum()
    if not loads.sum():
        return full
    added = int(full.sum()) - len(loads)
    bound = least_imbalance(loads, devices, added, shares)
    return improve(
        loads, full, target, free=~kept, enough=bound * (1 + _CLOSE), shakes=shakes, seed=seed
    )


def _best(
    load: FloatArray,
    found: Sequence[BoolArray],
    shares: ArrayLike | None,
    enough: float,
    shakes: int,
    seed: int,
) -> BoolArray:
    """The best of several placements of one layer, after improving each."""
    devices = found[0].shape[1]
    if not load.sum():
        return found[0]
    target = _shares(shares, devices) * load.sum()
    better = [improve(load, held, target, enough=enough) for held in found]
    best = min(better, key=lambda held: imbalance(load, held, shares))
    return improve(load, best, target, enough=enough, shakes=shakes, seed=seed)


def _repaired(load: FloatArray, held: BoolArray, room: int) -> BoolArray:
    """Fill every device to `room` with experts that it lacks, the heaviest replicas first."""
    held = held.copy()
    for _ in range(room * held.shape[1] - int(held.sum())):
        weight = load / held.sum(axis=1)
        carried = np.where(held.sum(axis=0) < room, weight @ held, np.inf)
        device = int(carried.argmin())
        held[int(np.where(held[:, device], -1.0, weight).argmax()), device] = True
    return held


def _loads(load: ArrayLike) -> FloatArray:
    loads = np.asarray(load, dtype=np.float64)
    if loads.ndim != 1 or not len(loads):
        raise PlanError(f"loads of a layer must be an array [experts], found shape {loads.shape}")
    if not np.isfinite(loads).all() or (loads < 0).any():
        expert = int(np.argmin(np.isfinite(loads) & (loads >= 0)))
        raise PlanError(
            f"expert {expert}: a load must be finite and not negative, found {loads[expert]}"
        )
    return loads


def _shares(shares: ArrayLike | None, devices: int) -> FloatArray:
    """float64 `[G]`, positive, with sum 1."""
    if shares is None:
        return np.full(devices, 1 / devices)
    share = np.asarray(shares, dtype=np.float64)
    if share.shape != (devices,) or not np.isfinite(share).all() or (share <= 0).any():
        raise PlanError(f"shares must be {devices} positive numbers, found {share.tolist()!s:.80}")
    scaled: FloatArray = share / share.sum()
    return scaled


def _room(slots: int, devices: int) -> int:
    """Slots of each device; PlanError if they cannot be dealt out evenly."""
    if devices < 1 or slots % devices:
        raise PlanError(
            f"{slots} slots (experts and replicas) cannot be dealt out evenly to {devices} "
            f"devices; give {-slots % max(devices, 1)} more or {slots % max(devices, 1)} fewer "
            "replicas"
        )
    return slots // devices
