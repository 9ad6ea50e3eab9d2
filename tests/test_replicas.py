"""Replicas: optimal counts, valid packings, never worse than EPLB, and close to the bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moe_runtime.placement.eplb import eplb
from moe_runtime.placement.replica_search import improve
from moe_runtime.placement.replicas import (
    balance,
    imbalance,
    least_imbalance,
    pack,
    replica_counts,
    replicate,
)

from moe_runtime.core import FloatArray
from moe_runtime.errors import PlanError

ROUNDING = 1e-9


def some_loads(kind: str, layers: int, experts: int, seed: int) -> FloatArray:
    """Counts of tokens, float64 `[layers, experts]`."""
    random = np.random.default_rng(seed)
    if kind == "uniform":
        return random.integers(50, 150, (layers, experts)).astype(np.float64)
    if kind == "spiky":
        spikes = random.random((layers, experts)) < 0.1
        return np.where(spikes, random.integers(500, 5000, (layers, experts)), 1.0 + 9 * spikes)
    share = 1 / np.arange(1, experts + 1) ** float(kind)
    rows = [
        random.multinomial(100_000, random.permutation(share / share.sum())) for _ in range(layers)
    ]
    return np.stack(rows).astype(np.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[FloatArray, int, int]:
    """Loads of one layer, devices, redundant slots: small, with ties and zeros."""
    devices, room = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    experts = draw(st.integers(room, devices * room))
    load = draw(st.lists(st.integers(0, 99), min_size=experts, max_size=experts))
    return np.array(load, dtype=np.float64), devices, devices * room - experts


# -- counts ----------------------------------------------------------------------------------------


@given(
    load=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    most=st.integers(1, 4),
    extra=st.integers(0, 8),
)
def test_counts_are_optimal(load: list[int], most: int, extra: int) -> None:
    slots = len(load) + extra
    assume(slots <= len(load) * most)
    counts = replica_counts(load, slots, most)
    assert counts.sum() == slots
    assert counts.min() >= 1
    assert counts.max() <= most
    least = min(
        max(value / count for value, count in zip(load, other, strict=True))
        for other in itertools.product(range(1, most + 1), repeat=len(load))
        if sum(other) == slots
    )
    assert (np.array(load) / counts).max() == pytest.approx(least)


def test_idle_experts_share_what_is_left() -> None:
    assert replica_counts([0, 0, 0], 6, 3).tolist() == [2, 2, 2]
    assert replica_counts([9, 0, 0], 6, 3).tolist() == [3, 2, 1]


# -- packings --------------------------------------------------------------------------------------


@given(problem=problems(), seed=st.integers(0, 99))
def test_packings_are_valid(problem: tuple[FloatArray, int, int], seed: int) -> None:
    load, devices, redundant = problem
    slots = len(load) + redundant
    # Any counts, not only good ones.
    counts = replica_counts(np.random.default_rng(seed).permutation(load), slots, devices)
    held = pack(load, counts, devices)
    assert (held.sum(axis=1) == counts).all()
    assert (held.sum(axis=0) == slots // devices).all()


@given(problem=problems())
def test_balance_is_valid_and_never_below_the_bound(
    problem: tuple[FloatArray, int, int],
) -> None:
    load, devices, redundant = problem
    (held,) = balance(load[None], devices, redundant, shakes=3)
    assert (held.sum(axis=0) == (len(load) + redundant) // devices).all()
    assert held.any(axis=1).all()
    assert imbalance(load, held) >= least_imbalance(load, devices, redundant) - ROUNDING


@settings(max_examples=200)
@given(problem=problems())
def test_never_worse_than_eplb(problem: tuple[FloatArray, int, int]) -> None:
    load, devices, redundant = problem
    copies = eplb(load[None], len(load) + redundant, 1, 1, devices).copies(devices)[0]
    assume(copies.max() == 1)  # the other case: the next test
    (held,) = balance(load[None], devices, redundant, shakes=0)
    assert imbalance(load, held) <= imbalance(load, copies) + ROUNDING


def test_where_eplb_wastes_a_slot_a_plan_cannot_follow() -> None:
    # EPLB puts both replicas of expert 0 on one device, as if it had no second one. Equal numbers
    # of distinct experts force a replica that does harm; ours is the best of those.
    load = np.array([100.0, 60.0, 40.0])
    copies = eplb(load[None], 4, 1, 1, 2).copies(2)[0]
    assert copies.max() == 2
    assert imbalance(load, copies) == 1.0
    (held,) = balance(load[None], 2, 1)
    assert imbalance(load, held) == pytest.approx(best_of_all(load, 2, 1))


@pytest.mark.parametrize("kind", ["uniform", "0.5", "1.0", "1.2", "spiky"])
@pytest.mark.parametrize(("experts", "devices", "redundant"), [(64, 8, 0), (64, 8, 8), (32, 4, 8)])
def test_never_worse_than_eplb_at_real_sizes(
    kind: str, experts: int, devices: int, redundant: int
) -> None:
    loads = some_loads(kind, 6, experts, seed=experts + redundant)
    theirs = eplb(loads, experts + redundant, 1, 1, devices).copies(devices)
    ours = balance(loads, devices, redundant)
    for load, held, copies in zip(loads, ours, theirs, strict=True):
        assert imbalance(load, held) <= imbalance(load, copies) + ROUNDING
        if redundant and kind != "spiky":  # a few heavy experts need not fit together
            bound = least_imbalance(load, devices, redundant)
            assert imbalance(load, held) <= bound * 1.002


# -- the best of all, by trying all ----------------------------------------------------------------


def best_of_all(load: FloatArray, devices: int, redundant: int) -> float:
    """Over all placements with equally many distinct experts on each device."""
    room = (len(load) + redundant) // devices
    best = np.inf
    for sets in itertools.product(itertools.combinations(range(len(load)), room), repeat=devices):
        held = np.zeros((len(load), devices), dtype=np.bool_)
        for device, experts in enumerate(sets):
            held[list(experts), device] = True
        if held.any(axis=1).all():
            best = min(best, imbalance(load, held))
    return float(best)


@pytest.mark.parametrize(
    ("experts", "devices", "redundant"), [(6, 2, 0), (5, 3, 1), (6, 3, 0), (4, 2, 2), (5, 2, 1)]
)
def test_small_problems_are_solved(experts: int, devices: int, redundant: int) -> None:
    random = np.random.default_rng(experts)
    for _ in range(6):
        load = random.integers(1, 60, experts).astype(np.float64)
        best = best_of_all(load, devices, redundant)
        (held,) = balance(load[None], devices, redundant, shakes=60)
        assert least_imbalance(load, devices, redundant) <= best + ROUNDING
        assert imbalance(load, held) == pytest.approx(best)


# -- what else is promised -------------------------------------------------------------------------


@given(problem=problems(), seed=st.integers(0, 99))
def test_improving_keeps_slots_and_fixed_cells(
    problem: tuple[FloatArray, int, int], seed: int
) -> None:
    load, devices, redundant = problem
    assume(load.sum() > 0)
    start = pack(load, replica_counts(load, len(load) + redundant, devices), devices)
    kept = start.copy()
    free = np.random.default_rng(seed).random(start.shape) < 0.5
    target = np.full(devices, load.sum() / devices)
    found = improve(load, start, target, free=free, shakes=2, seed=seed)
    assert (start == kept).all()
    assert (found[~free] == start[~free]).all()
    assert (found.sum(axis=0) == start.sum(axis=0)).all()
    assert found.any(axis=1).all()
    assert imbalance(load, found) <= imbalance(load, start) + ROUNDING


@pytest.mark.parametrize("kind", ["0.5", "1.2"])
def test_replicas_are_added_to_a_placement_that_stays(kind: str) -> None:
    (load,) = some_loads(kind, 1, 32, seed=5)
    contiguous = np.kron(np.eye(4), np.ones((8, 1))).astype(np.bool_)
    for redundant in (4, 8, 16):
        held = replicate(load, contiguous, redundant)
        assert held[contiguous].all()
        assert (held.sum(axis=0) == 8 + redundant // 4).all()
        assert imbalance(load, held) < imbalance(load, contiguous)
    assert imbalance(load, held) < 1.01


def test_shares_follow_the_speed_of_devices() -> None:
    (load,) = some_loads("0.5", 1, 32, seed=1)
    shares = np.array([2, 1, 1, 1]) / 5
    (held,) = balance(load[None], 4, 8, shares=shares)
    carried = (load / held.sum(axis=1)) @ held
    assert carried / load.sum() == pytest.approx(shares, rel=0.01)
    assert imbalance(load, held, shares) >= least_imbalance(load, 4, 8, shares) - ROUNDING


def test_the_same_seed_gives_the_same() -> None:
    loads = some_loads("1.0", 2, 32, seed=2)
    first, second = (balance(loads, 4, 4, seed=7) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_further_starts_are_used() -> None:
    load = some_loads("uniform", 1, 16, seed=3)
    best = balance(load, 4, 0, shakes=50)
    again = balance(load, 4, 0, shakes=0, starts=[best])
    assert imbalance(load[0], again[0]) <= imbalance(load[0], best[0]) + ROUNDING


def test_layers_without_load_are_placed() -> None:
    (held,) = balance(np.zeros((1, 6)), 3, 3)
    assert (held.sum(axis=0) == 3).all()
    assert held.any(axis=1).all()
    assert imbalance(np.zeros(6), held) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replica_counts([1, 2], 5, 2), "give 2 to 4"),
        (lambda: replica_counts([1, 2], 1, 2), "give 2 to 4"),
        (lambda: replica_counts([1, np.inf], 2, 2), "expert 1"),
        (lambda: replica_counts([], 2, 2), "shape"),
        (lambda: pack([1, 2], [1, 3], 2), "1 to 2 devices"),
        (lambda: pack([1, 2], [1, 2], 2), "cannot be dealt out evenly to 2 devices; give 1 more"),
        (lambda: balance([1.0, 2.0], 2, 0), "shape"),
        (lambda: balance([[1.0, 2.0]], 2, 1), "cannot be dealt out evenly"),
        (lambda: balance([[1.0, 2.0]], 2, 4), "give 2 to 4"),
        (lambda: balance([[1.0, 2.0]], 2, 0, shares=[1, 0]), "positive"),
        (lambda: replicate([1, 2], [[1, 1], [0, 0]], 2), "hold every expert"),
        (lambda: replicate([1, 2], [[1, 0], [0, 1]], 4), "3 slots a device for 2 experts"),
    ],
)
def test_what_cannot_be(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(PlanError, match=message):
        call()
