"""Small instances solved exactly: dynamic programming along the layers over all their partitions.

Proves; needs pairs of consecutive layers only, and layers that have few enough partitions. Knows
no integer program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
from moe_runtime.placement.assign import EPSILON, LayerSlots
from moe_runtime.placement.instance import Assignment, Instance
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError

__all__ = ["is_chain", "layer_states", "solve_exactly"]

States = NDArray[np.int8]
_SCORES = 1 << 21  # scores computed at once (16 MB)
_CELLS = 1 << 23  # float64 made at once elsewhere (64 MB)
_MOST_DEVICES = 127  # int8
# A load cap kills unfinished states late, so more of them may be under way than finish.
_UNDER_WAY = 8


def solve_exactly(
    instance: Instance,
    *,
    given: Sequence[FloatArray] | None = None,
    most_states: int = 20_000,
    progress: Callable[[int, int], None] | None = None,
) -> Assignment | None:
    """An assignment that no other is worth more than, if the instance is small enough.

    Time grows with the square of the number of states, the placements of one layer that keep its
    limits: 2520 for 8 experts on 4 devices, 12,870 for 16 on 2. The first layer's are fewer by the
    devices' permutations where these change nothing.

    Args:
        given: for each layer float64 `[S, G]`, what a slot is worth on a device besides its pairs.
        most_states: of one layer.
        progress: called with (layers done, layers).

    Returns:
        None if a layer has more states than allowed, or pairs skip a layer.

    Raises:
        PlanError: a layer has no placement that keeps its limits.
    """
    if not is_chain(instance) or instance.devices > _MOST_DEVICES:
        return None
    states = _states_of_layers(instance, most_states, symmetric=given is None)
    if states is None:
        return None
    value = _own(instance, 0, states[0], given)
    back: list[IntArray] = []
    for layer in range(1, instance.layers):
        if progress is not None:
            progress(layer, instance.layers)
        value, came_from = _step(instance, layer, states[layer - 1], states[layer], value)
        value += _own(instance, layer, states[layer], given)
        back.append(came_from)
    at = int(value.argmax())
    assignment = [states[-1][at].astype(np.int64)]
    for layer in range(instance.layers - 2, -1, -1):
        at = int(back[layer][at])
        assignment.append(states[layer][at].astype(np.int64))
    if progress is not None:
        progress(instance.layers, instance.layers)
    return assignment[::-1]


def is_chain(instance: Instance) -> bool:
    """Whether pairs join consecutive layers only."""
    return all(b == a + 1 for a, b, _ in instance.pairs)


# -- states ----------------------------------------------------------------------------------------


def layer_states(slots: LayerSlots, most_states: int, *, renamable: bool = False) -> States | None:
    """Every placement of a layer that keeps its limits; replicas are not told apart.

    Args:
        renamable: one for each set of placements that differ in the devices' names only: the
            first slot is on device 0, a slot that is alone on a device so far on the next one.

    Returns:
        int8 `[N, S]`, N up to `most_states`; None if there are more.
    """
    limits = slots.limits
    devices, capped = len(limits.most), bool(np.isfinite(limits.load).any())
    cap = limits.load + EPSILON
    rows = np.zeros((1, 0), dtype=np.int8)
    counts = np.zeros((1, devices), dtype=np.int16)
    loads = np.zeros((1, devices))
    for expert, copies in enumerate(np.bincount(slots.owner).tolist()):
        load = slots.load[int(np.searchsorted(slots.owner, expert))]
        left = len(slots.owner) - rows.shape[1] - copies
        found: list[tuple[States, NDArray[np.int16], FloatArray]] = []
        size = 0
        for places in combinations(range(devices), copies):
            at = list(places)
            keep = (counts[:, at] < limits.most[at]).all(1)
            if capped:
                keep &= (loads[:, at] + load <= cap[at]).all(1)
            if renamable:
                keep &= _fresh_in_order(at, devices)[(counts > 0).sum(1)]
            kept = np.flatnonzero(keep)
            more = counts[kept]
            more[:, at] += 1
            owed = np.maximum(limits.least - more, 0).sum(1) <= left
            kept, more = kept[owed], more[owed]
            added = np.repeat(np.array([at], dtype=np.int8), len(kept), axis=0)
            loaded = loads[kept]
            loaded[:, at] += load
            found.append((np.hstack([rows[kept], added]), more, loaded))
            size += len(kept)
            if size > _UNDER_WAY * most_states:
                return None
        rows, counts, loads = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows if len(rows) <= most_states else None


def _fresh_in_order(places: list[int], devices: int) -> NDArray[np.bool_]:
    """Bool `[G + 1]`: for u devices in use, whether the new ones of `places` are the next ones."""
    allowed = np.zeros(devices + 1, dtype=bool)
    for used in range(devices + 1):
        fresh = [place for place in places if place >= used]
        allowed[used] = fresh == list(range(used, used + len(fresh)))
    return allowed


def _states_of_layers(
    instance: Instance, most_states: int, *, symmetric: bool
) -> list[States] | None:
    known: dict[tuple[object, ...], States | None] = {}
    symmetric = symmetric and instance.renamable()
    result = []
    for layer, slots in enumerate(instance.slots):
        limits, fresh = slots.limits, symmetric and layer == 0
        loads = (b"", b"")
        if np.isfinite(limits.load).any():
            loads = (slots.load.tobytes(), limits.load.tobytes())
        key = (fresh, *loads, *(a.tobytes() for a in (slots.owner, limits.least, limits.most)))
        if key not in known:
            known[key] = layer_states(slots, most_states, renamable=fresh)
        states = known[key]
        if states is None:
            return None
        if not len(states):
            raise PlanError(
                f"MoE layer number {layer} (counted from 0) has no placement that keeps its "
                f"limits: {len(slots.owner)} slots, at most {limits.most.tolist()} a device with "
                f"loads up to {np.round(limits.load, 3).tolist()}; raise the load cap"
            )
        result.append(states)
    return result


# -- the recursion ---------------------------------------------------------------------------------


def _parts(length: int, cells: int, budget: int) -> Iterator[slice]:
    step = max(1, budget // max(cells, 1))
    return (slice(start, start + step) for start in range(0, length, step))


def _own(
    instance: Instance, layer: int, states: States, given: Sequence[FloatArray] | None
) -> FloatArray:
    """float64 `[N]`: what each state of a layer is worth by itself."""
    worth = np.zeros(len(states))
    slots = np.arange(states.shape[1])
    if given is not None:
        worth += given[layer][slots, states].sum(1)
    if instance.together:
        matrix = instance.together[layer]
        for part in _parts(len(states), matrix.size, _CELLS):
            same = states[part][:, :, None] == states[part][:, None, :]
            worth[part] += 0.5 * np.einsum("nab,ab->n", same, matrix)
    return worth


def _step(
    instance: Instance, layer: int, before: States, after: States, value: FloatArray
) -> tuple[FloatArray, IntArray]:
    """float64 `[N']` and int64 `[N']`: for each state of a layer the best way to come to it."""
    devices, width = instance.devices, after.shape[1]
    pairs = sum(
        (matrix for a, b, matrix in instance.pairs if b == layer),
        np.zeros((before.shape[1], width)),
    )
    # One device's indicator follows from the others': its worth goes into the constant, so that
    # the product below has S (G - 1) + 1 columns.
    from_ = np.empty((len(before), width * (devices - 1) + 1))
    for part in _parts(len(before), devices * max(width, before.shape[1]), _CELLS):
        worth = np.einsum("pag,ab->pbg", instance.near[before[part]], pairs, optimize=True)
        last = worth[:, :, -1]
        from_[part, :-1] = (worth[:, :, :-1] - last[:, :, None]).reshape(len(last), -1)
        from_[part, -1] = last.sum(1) + value[part]
    best, came_from = np.empty(len(after)), np.empty(len(after), dtype=np.int64)
    for part in _parts(len(after), max(len(before), from_.shape[1]), _SCORES):
        at = after[part]
        ones = np.ones((len(at), from_.shape[1]))
        ones[:, :-1] = (at[:, :, None] == np.arange(devices - 1)).reshape(len(at), -1)
        scores = ones @ from_.T
        came_from[part] = scores.argmax(1)
        best[part] = scores[np.arange(len(at)), came_from[part]]
    return best, came_from
