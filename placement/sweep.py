"""The solver that scales: sweeps over the layers, each solved exactly with its neighbours fixed.

Starts from a spectral embedding and from random placements, improves layer by layer, renames the
devices behind a boundary where that helps, and perturbs the best until time is up. Gives no proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from moe_runtime.placement.assign import (
    EPSILON,
    assign,
    balanced_start,
    improve_by_swaps,
    overload,
    relieve,
)
from moe_runtime.placement.instance import Assignment, Instance
from moe_runtime.placement.spectral import spectral_start
from scipy.optimize import linear_sum_assignment

from moe_runtime.core import FloatArray, IntArray

__all__ = ["Progress", "SweepResult", "improve", "keeping_caps", "sweep"]

Progress = Callable[[float, float], None]  # (seconds, cost of the best so far)
_TOLERANCE = 1e-9
_MOST_ROUNDS = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """The best assignment found; `cost` is its `Instance.cost`, `starts` how many were tried."""

    assignment: Assignment
    cost: float
    starts: int


def sweep(
    instance: Instance,
    *,
    seed: int = 0,
    starts: int = 4,
    perturbations: int = 8,
    time_limit: float = 60.0,
    warm: Assignment | None = None,
    witness: Assignment | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """A good assignment, the same for the same seed while the time limit is not reached.

    Args:
        starts: independent starts: `warm` if given, one spectral, the others random.
        perturbations: how often the best is disturbed and improved again afterwards.
        time_limit: seconds; the first start always gives a result.
        witness: an assignment that keeps all load caps; stands in for layers of a start that do
            not, where swaps cannot mend them. Needed if there are tight caps.
        progress: called with each new best.
    """
    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    best: Assignment | None = None
    best_cost, tried = np.inf, 0

    def out_of_time() -> bool:
        return best is not None and time.perf_counter() - began > time_limit

    def consider(found: Assignment) -> None:
        nonlocal best, best_cost
        cost = instance.cost(found)
        if best is None or cost < best_cost - _TOLERANCE:
            best, best_cost = found, cost
            if progress is not None:
                progress(time.perf_counter() - began, cost)

    begin: list[Callable[[], Assignment]] = [] if warm is None else [lambda: list(warm)]
    begin.append(lambda: spectral_start(instance, rng))
    while len(begin) < max(1, starts):
        begin.append(lambda: [balanced_start(slots, rng) for slots in instance.slots])
    for start in begin[: max(1, starts)]:
        if out_of_time():
            break
        tried += 1
        consider(improve(instance, keeping_caps(instance, start(), witness), out_of_time))
    for _ in range(perturbations):
        if out_of_time():
            break
        tried += 1
        assert best is not None
        disturbed = keeping_caps(instance, _disturb(instance, best, rng), best)
        consider(improve(instance, disturbed, out_of_time))
    assert best is not None
    return SweepResult(assignment=best, cost=float(best_cost), starts=tried)


def keeping_caps(
    instance: Instance, assignment: Assignment, witness: Assignment | None
) -> Assignment:
    """The assignment with every layer that breaks a load cap mended, or taken from the witness."""
    kept = []
    for layer, (slots, device) in enumerate(zip(instance.slots, assignment, strict=True)):
        mended = device if overload(slots, device) <= EPSILON else relieve(slots, device)
        if witness is not None and overload(slots, mended) > EPSILON:
            mended = witness[layer]
        kept.append(mended)
    return kept


def improve(
    instance: Instance,
    assignment: Assignment,
    stop: Callable[[], bool] = lambda: False,
    *,
    rename: bool = True,
) -> Assignment:
    """Sweep forth and back until nothing gets better; the result costs no more.

    Args:
        stop: asked after each layer; True ends the sweep, and what was reached is returned.
        rename: whether devices may be renamed behind a boundary.
    """
    assignment = list(assignment)
    layers = list(range(instance.layers))
    order = layers + layers[-2:0:-1]
    renamable = rename and instance.renamable() and bool(instance.pairs)
    value = instance.value(assignment)
    for _ in range(_MOST_ROUNDS):
        for layer in order:
            _improve_layer(instance, assignment, layer)
            if stop():
                return assignment
        if renamable:
            _rename_tails(instance, assignment)
        now = instance.value(assignment)
        if now <= value + _TOLERANCE * max(1.0, abs(value)):
            break
        value = now
    return assignment


def _improve_layer(instance: Instance, assignment: Assignment, layer: int) -> None:
    """The best devices of one layer, in place; never worse."""
    slots, device = instance.slots[layer], assignment[layer]
    values = instance.values(assignment, layer)
    if not instance.together:
        assignment[layer] = assign(values, slots, device)
        return
    together = instance.together[layer]
    found = improve_by_swaps(values, slots, device, together)
    # The worth of a layer's own pairs is not linear: the best of the linear part is a candidate.
    ones = np.eye(instance.devices)
    linear = values - together @ ones[device]
    jump = assign(values, slots, device)
    jump = improve_by_swaps(linear + together @ ones[jump], slots, jump, together)
    if _own(linear, together, jump) > _own(linear, together, found) + _TOLERANCE:
        found = jump
    assignment[layer] = found


def _own(linear: FloatArray, together: FloatArray, device: IntArray) -> float:
    alike = device[:, None] == device[None, :]
    return float(linear[np.arange(len(device)), device].sum() + 0.5 * (together * alike).sum())


def _rename_tails(instance: Instance, assignment: Assignment) -> None:
    """At each boundary rename the devices of all layers behind it as fits the layers before.

    A sweep cannot: it would have to pass through worse placements of every layer behind.
    """
    devices = instance.devices
    ones = np.eye(devices)
    for boundary in range(1, instance.layers):
        meets = np.zeros((devices, devices))
        for a, b, matrix in instance.pairs:
            if a < boundary <= b:
                meets += ones[assignment[a]].T @ matrix @ ones[assignment[b]]
        before, name = linear_sum_assignment(meets, maximize=True)
        if meets[before, name].sum() > np.trace(meets) + _TOLERANCE:
            renamed = np.empty(devices, dtype=np.int64)
            renamed[name] = before
            for layer in range(boundary, instance.layers):
                assignment[layer] = renamed[assignment[layer]]


def _disturb(instance: Instance, best: Assignment, rng: np.random.Generator) -> Assignment:
    """Another start near the best: a run of layers is placed anew."""
    width = int(rng.integers(1, max(2, instance.layers // 3) + 1))
    first = int(rng.integers(0, max(1, instance.layers - width + 1)))
    disturbed = list(best)
    for layer in range(first, min(first + width, instance.layers)):
        disturbed[layer] = balanced_start(instance.slots[layer], rng)
    return disturbed
