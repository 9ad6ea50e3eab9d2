"""The polish: an assignment improved by exact solutions of small windows, all else fixed.

A window is a few devices in some layers: along all layers by dynamic programming, or one to three
layers by an integer program. Never worse; proves nothing of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from moe_runtime.placement.assign import EPSILON, overload
from moe_runtime.placement.exact import is_chain, solve_exactly
from moe_runtime.placement.ilp import SOLVERS, solve_program
from moe_runtime.placement.instance import Assignment, Instance
from moe_runtime.placement.subproblem import Part, part_of

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import ConfigError

__all__ = ["POLISHERS", "polish"]

POLISHERS = ("chain", *SOLVERS)
_TOLERANCE = 1e-9
# Free slots of a layer in a window of so many devices: under a thousand states for the chain, and
# integer programs that are mostly proved in a second.
_CHAIN_FREE = {2: 12, 3: 8}
_PROGRAM_FREE = {2: 8, 3: 6}
_MOST_PROGRAM_SECONDS = 2.0
_IDLE_PASSES, _IDLE_WINDOWS = 3, 100  # tried without an improvement, both, before giving up
_MOST_WINDOWS = 400  # of a pass


def polish(
    instance: Instance,
    assignment: Assignment,
    *,
    time_limit: float = 30.0,
    seed: int = 0,
    solver: str = "chain",
    progress: Callable[[float, float], None] | None = None,
) -> tuple[Assignment, int]:
    """Improve an assignment window by window, those that lose most first.

    Deterministic for a seed while the time limit is not reached; ends before it when several
    passes over all windows found nothing.

    Args:
        assignment: keeps the limits, and is not changed. Where it exceeds a load cap, it is
            exceeded by no more afterwards.
        time_limit: seconds; exceeded by one window's at most.
        solver: `"chain"`, the dynamic program over all layers (`"highs"` is used where pairs skip
            layers), or the integer program's `"highs"` or `"cbc"`, warm-started.
        progress: called with (seconds, cost) after each improvement.

    Returns:
        The assignment, which costs no more, and how many windows improved it.

    Raises:
        ConfigError: no such solver.
    """
    if solver not in POLISHERS:
        raise ConfigError(f"unknown solver {solver!r}; known: {', '.join(POLISHERS)}")
    if solver == "chain" and not is_chain(instance):
        solver = SOLVERS[0]
    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    instance = _as_loaded(instance, assignment)
    best, cost = [device.copy() for device in assignment], instance.cost(assignment)
    improvements = idle = passes = 0
    while passes < _IDLE_PASSES or idle < _IDLE_WINDOWS:
        passes += 1
        windows = _windows(instance, best, solver, rng)
        if not windows:
            break
        for layers, devices in windows:
            left = time_limit - (time.perf_counter() - began)
            if left <= 0:
                return best, improvements
            idle += 1
            part = _cut(instance, best, layers, devices, solver, rng)
            found = None if part is None else _solve(part, best, solver, left, seed)
            if part is None or found is None:
                continue
            candidate = part.insert(best, found)
            now = instance.cost(candidate)
            if now < cost - _TOLERANCE and _keeps_caps(instance, candidate, layers):
                best, cost, idle, passes = candidate, now, 0, 0
                improvements += 1
                if progress is not None:
                    progress(time.perf_counter() - began, cost)
    return best, improvements


def _as_loaded(instance: Instance, assignment: Assignment) -> Instance:
    """The instance with caps raised to the loads that are there, where these exceed them."""
    slots = tuple(
        replace(
            layer,
            limits=replace(layer.limits, load=np.maximum(layer.limits.load, layer.loads(device))),
        )
        for layer, device in zip(instance.slots, assignment, strict=True)
    )
    return replace(instance, slots=slots)


def _keeps_caps(instance: Instance, candidate: Assignment, layers: Sequence[int]) -> bool:
    """Whether all caps are kept: sums of parts round otherwise than the whole's."""
    return all(
        overload(slots, device) <= EPSILON
        for slots, device in ((instance.slots[layer], candidate[layer]) for layer in layers)
    )


def _windows(
    instance: Instance, assignment: Assignment, solver: str, rng: np.random.Generator
) -> list[tuple[list[int], tuple[int, ...]]]:
    """One pass: (layers, devices) of each window, what they lose between them first."""
    lost = _lost(instance, assignment)  # [L, G, G]
    spans = [range(instance.layers)]
    if solver != "chain":
        spans = [
            range(first, first + width)
            for width in (1, 2, 3)
            for first in range(instance.layers - width + 1)
        ]
    sizes = [size for size in _CHAIN_FREE if size <= instance.devices]
    ranked = []
    for span in spans:
        inside = lost[span.start : span.stop].sum(0) / len(span)
        for size in sizes:
            groups = list(combinations(range(instance.devices), size))
            if len(groups) > _MOST_WINDOWS:
                chosen = rng.choice(len(groups), _MOST_WINDOWS, replace=False)
                groups = [groups[at] for at in np.sort(chosen)]
            for group in groups:
                pairs = size * (size - 1)
                promise = float(inside[np.ix_(group, group)].sum()) / pairs
                ranked.append((-promise, size, list(span), group))
    ranked.sort(key=lambda window: (window[0], window[1], window[2], window[3]))
    return [(layers, group) for _, _, layers, group in ranked[:_MOST_WINDOWS]]


def _lost(instance: Instance, assignment: Assignment) -> FloatArray:
    """float64 `[L, G, G]`: worth missed between two devices by pairs that a layer is part of."""
    ones = np.eye(instance.devices)
    lost = np.zeros((instance.layers, instance.devices, instance.devices))
    for a, b, matrix in instance.pairs:
        met = ones[assignment[a]].T @ matrix @ ones[assignment[b]] * (1.0 - instance.near)
        for layer in (a, b):
            lost[layer] += met + met.T
    for layer, matrix in enumerate(instance.together):
        met = ones[assignment[layer]].T @ matrix @ ones[assignment[layer]]
        lost[layer] += met * (1.0 - np.eye(instance.devices))
    return lost


def _cut(
    instance: Instance,
    assignment: Assignment,
    layers: list[int],
    devices: tuple[int, ...],
    solver: str,
    rng: np.random.Generator,
) -> Part | None:
    """The window with as many free slots as can be; None if there are none."""
    most = (_CHAIN_FREE if solver == "chain" else _PROGRAM_FREE)[len(devices)]
    kept, free = [], []
    for layer in layers:
        mine = _restless(instance, assignment, layer, np.array(devices), most, rng)
        if len(mine) > 1:
            kept.append(layer)
            free.append(mine)
    if not kept:
        return None
    return part_of(instance, assignment, layers=kept, devices=devices, free=free)


def _restless(
    instance: Instance,
    assignment: Assignment,
    layer: int,
    devices: IntArray,
    most: int,
    rng: np.random.Generator,
) -> IntArray:
    """The slots on some devices that lose least by moving to another of them, with some chance."""
    slots, device = instance.slots[layer], assignment[layer]
    mine = np.flatnonzero(np.isin(device, devices))
    copies = np.bincount(slots.owner[mine], minlength=int(slots.owner[-1]) + 1)
    mine = mine[copies[slots.owner[mine]] == 1]  # a part frees all of an expert's slots or none
    if len(mine) <= most:
        return np.asarray(mine, dtype=np.int64)
    values = instance.values(assignment, layer)[mine][:, devices]
    here = np.searchsorted(devices, device[mine])
    index = np.arange(len(mine))
    own = values[index, here]
    values[index, here] = -np.inf
    gain = values.max(1) - own
    gain = gain / (gain.std() + 1e-300) + rng.gumbel(size=len(mine))
    chosen: IntArray = np.sort(mine[np.argsort(-gain, kind="stable")[:most]])
    return chosen


def _solve(
    part: Part, assignment: Assignment, solver: str, left: float, seed: int
) -> Assignment | None:
    if solver == "chain":
        return solve_exactly(part.instance, given=part.given, most_states=5000)
    return solve_program(
        part.instance,
        solver=solver,
        time_limit=min(left, _MOST_PROGRAM_SECONDS),
        seed=seed,
        warm=part.restrict(assignment),
        given=part.given,
    ).assignment
