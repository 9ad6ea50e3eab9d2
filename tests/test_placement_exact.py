"""The dynamic program against trying everything, and the parts that are cut out of instances."""

from __future__ import annotations

from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.assign import LayerSlots, balanced_start
from moe_runtime.placement.exact import layer_states, solve_exactly
from moe_runtime.placement.instance import Instance, make_instance
from moe_runtime.placement.problem import LayerLimits, Objective, Problem
from moe_runtime.placement.subproblem import part_of
from moe_runtime.placement.sweep import sweep
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from placements import (
    all_assignments,
    check_limits,
    instances,
    least_cost,
    planted,
    planted_instance,
)


def even_slots(experts: int, devices: int, copies: dict[int, int] | None = None) -> LayerSlots:
    counts = np.ones(experts, dtype=np.int64)
    for expert, count in (copies or {}).items():
        counts[expert] = count
    owner = np.repeat(np.arange(experts), counts)
    share = np.full(devices, len(owner) // devices)
    limits = LayerLimits(least=share, most=share, slots=len(owner), load=np.full(devices, np.inf))
    return LayerSlots(owner=owner, load=np.ones(len(owner)), limits=limits)


@settings(max_examples=80, deadline=None)
@given(instance=instances())
def test_no_assignment_costs_less(instance: Instance) -> None:
    least = least_cost(instance)
    if least is None:
        with pytest.raises(PlanError, match="no placement that keeps its limits"):
            solve_exactly(instance)
        return
    found = solve_exactly(instance)
    assert found is not None
    check_limits(instance, found)
    assert instance.cost(found) == pytest.approx(least, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(instance=instances(), seed=st.integers(0, 1000))
def test_worth_of_single_slots_counts(instance: Instance, seed: int) -> None:
    rng = np.random.default_rng(seed)
    worth = [
        rng.integers(0, 9, (len(slots.owner), 2))[np.searchsorted(slots.owner, slots.owner)] * 1.0
        for slots in instance.slots
    ]

    def value(assignment: list[np.ndarray]) -> float:
        single = sum(w[np.arange(len(d)), d].sum() for w, d in zip(worth, assignment, strict=True))
        return instance.value(assignment) + float(single)

    everything = [value(assignment) for assignment in all_assignments(instance)]
    if everything:
        found = solve_exactly(instance, given=worth)
        assert found is not None
        assert value(found) == pytest.approx(max(everything), abs=1e-9)


def test_states_are_counted_by_the_multinomial() -> None:
    states = layer_states(even_slots(8, 4), 3000)
    assert states is not None
    assert len(states) == factorial(8) // 2**4
    assert len(np.unique(states, axis=0)) == len(states)
    renamed = layer_states(even_slots(8, 4), 3000, renamable=True)
    assert renamed is not None
    assert len(renamed) * factorial(4) == len(states)
    assert layer_states(even_slots(8, 4), 2519) is None


def test_replicas_are_on_distinct_devices_and_not_told_apart() -> None:
    slots = even_slots(4, 3, {0: 2, 2: 2})  # 6 slots, 2 a device
    states = layer_states(slots, 1000)
    assert states is not None
    sets = {tuple(frozenset(row[slots.owner == e].tolist()) for e in range(4)) for row in states}
    assert len(sets) == len(states)
    assert all(len(places[0]) == len(places[2]) == 2 for places in sets)


def test_what_is_too_large_or_no_chain_is_left_alone() -> None:
    large = planted_instance(2, 16, 4, stay=0.5)
    assert solve_exactly(large, most_states=5000) is None
    affinity, _ = planted(3, 4, 2, stay=0.5, pairs=500)
    skipping = make_instance(
        Problem(layer_ids=(0, 1, 2), experts=(4,) * 3, topology=Topology.of(2)), affinity
    )
    skipping = Instance(
        slots=skipping.slots,
        pairs=(*skipping.pairs, (0, 2, np.ones((4, 4)))),
        near=skipping.near,
    )
    assert solve_exactly(skipping) is None


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_planted_placement_is_found(nodes: int) -> None:
    affinity, homes = planted(6, 8, 4, stay=0.9, pairs=6000)
    problem = Problem(
        layer_ids=affinity.layer_ids,
        experts=affinity.experts,
        topology=Topology.of(4, nodes),
        objective=Objective.parse("time" if nodes > 1 else "crossing"),
    )
    instance = make_instance(problem, affinity)
    calls: list[tuple[int, int]] = []
    found = solve_exactly(instance, progress=lambda done, layers: calls.append((done, layers)))
    assert found is not None
    check_limits(instance, found)
    assert instance.cost(found) <= instance.cost(homes) + 1e-12
    assert instance.cost(found) == pytest.approx(instance.cost(homes), rel=0.02)
    assert calls == [(done, 6) for done in range(1, 7)]


def test_a_load_cap_is_kept_and_costs() -> None:
    free = planted_instance(5, 8, 2, stay=0.4)
    capped = planted_instance(5, 8, 2, stay=0.4, load_cap=1.02)
    costs = []
    for instance in (free, capped):
        found = solve_exactly(instance)
        assert found is not None
        check_limits(instance, found)
        costs.append(instance.cost(found))
        assert costs[-1] <= sweep(instance, seed=3).cost + 1e-12
    assert costs[0] < costs[1]


def test_states_of_a_cap_are_those_that_keep_it() -> None:
    slots = even_slots(10, 2)
    load = np.arange(10.0)
    limits = LayerLimits(
        least=slots.limits.least, most=slots.limits.most, slots=10, load=np.full(2, 23.0)
    )
    capped = layer_states(LayerSlots(owner=slots.owner, load=load, limits=limits), 1000)
    every = layer_states(slots, 1000)
    assert capped is not None
    assert every is not None
    assert len(every) == comb(10, 5)
    kept = [row for row in every if all((load * (row == g)).sum() <= 23 for g in (0, 1))]
    assert {tuple(row) for row in capped} == {tuple(row) for row in kept}


# -- parts -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(instance=instances(lag=2), seed=st.integers(0, 1000))
def test_a_part_is_worth_what_it_adds_to_the_whole(instance: Instance, seed: int) -> None:
    """Any two fillings of a part differ by as much as the wholes do, and keep the limits."""
    rng = np.random.default_rng(seed)
    keeping = list(all_assignments(instance))
    if not keeping:
        return
    whole = keeping[int(rng.integers(len(keeping)))]
    chosen = rng.permutation(instance.layers)[: rng.integers(1, instance.layers + 1)]
    part = part_of(instance, whole, layers=sorted(chosen.tolist()), devices=[1, 0])
    before = part.restrict(whole)
    check_limits(part.instance, before)
    fillings = list(all_assignments(part.instance))
    for filling in fillings[:40]:
        other = part.insert(whole, filling)
        check_limits(instance, other)
        assert part.value(filling) - part.value(before) == pytest.approx(
            instance.value(other) - instance.value(whole), abs=1e-9
        )


def test_a_part_of_some_slots_leaves_the_others_where_they_are() -> None:
    instance = planted_instance(4, 12, 3, stay=0.4, load_cap=1.3)
    rng = np.random.default_rng(1)
    whole = [balanced_start(slots, rng) for slots in instance.slots]
    free = [np.flatnonzero(np.isin(whole[layer], [0, 2]))[:5] for layer in (1, 2)]
    part = part_of(instance, whole, layers=(1, 2), devices=(0, 2), free=free)
    found = solve_exactly(part.instance, given=part.given)
    assert found is not None
    other = part.insert(whole, found)
    check_limits(instance, other)
    assert instance.cost(other) <= instance.cost(whole)
    for layer in range(4):
        fixed = np.ones(12, dtype=bool)
        if layer in (1, 2):
            fixed[free[layer - 1]] = False
        assert np.array_equal(whole[layer][fixed], other[layer][fixed])
