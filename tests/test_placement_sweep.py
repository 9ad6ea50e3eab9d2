"""One layer's assignment, sweeps over layers, and two stages, against trying everything."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.assign import (
    LayerSlots,
    assign,
    balanced_start,
    improve_by_swaps,
    overload,
    relieve,
)
from moe_runtime.placement.cost import measure
from moe_runtime.placement.instance import Assignment, Instance, make_instance
from moe_runtime.placement.problem import LayerLimits, Objective, Problem
from moe_runtime.placement.spectral import spectral_start
from moe_runtime.placement.sweep import improve, keeping_caps, sweep
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.two_stage import inside_node, over_nodes, solve_in_stages

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError
from placements import (
    all_assignments,
    check_limits,
    instances,
    least_cost,
    planted,
    planted_instance,
)
from planted import planted_trace

ROUNDING = 1e-9


@st.composite
def layers(draw: st.DrawFn, *, kinds: tuple[str, ...], capped_load: bool = False) -> LayerSlots:
    """The slots of one layer: up to 6 on 2 or 3 devices."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    devices = draw(st.integers(2, 3))
    kind = draw(st.sampled_from(kinds))
    experts = {"equal": devices * int(rng.integers(1, 3))}.get(kind, int(rng.integers(3, 6)))
    copies = np.ones(experts, dtype=np.int64)
    if kind == "replicas":
        experts = 2 * devices - 1
        copies = np.ones(experts, dtype=np.int64)
        copies[rng.integers(experts)] = 2
    owner = np.repeat(np.arange(experts), copies)
    share = -(-len(owner) // devices)
    least, most = (0, min(share + 1, experts)) if kind == "capped" else (share, share)
    load = (rng.integers(0, 20, experts) / copies)[owner]
    cap = load.sum() / devices * rng.choice([1.02, 1.1, 1.4]) if capped_load else np.inf
    limits = LayerLimits(
        least=np.full(devices, least),
        most=np.full(devices, most),
        slots=len(owner),
        load=np.full(devices, cap),
    )
    return LayerSlots(owner=owner, load=load, limits=limits)


def alone(slots: LayerSlots) -> Instance:
    return Instance(slots=(slots,), pairs=(), near=np.eye(len(slots.limits.most)))


def worth(values: np.ndarray, device: IntArray) -> float:
    return float(values[np.arange(len(device)), device].sum())


def values_for(slots: LayerSlots, rng: np.random.Generator) -> np.ndarray:
    """What a slot is worth on each device, the same for an expert's replicas."""
    return rng.integers(-5, 9, (len(slots.owner), len(slots.limits.most)))[slots.owner] * 1.0


# -- one layer -------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(slots=layers(kinds=("equal", "capped", "replicas")), seed=st.integers(0, 999))
def test_assigning_is_exact_where_no_load_is_capped(slots: LayerSlots, seed: int) -> None:
    values = values_for(slots, np.random.default_rng(seed))
    keeping = [state for (state,) in all_assignments(alone(slots))]
    found = assign(values, slots, keeping[seed % len(keeping)])
    check_limits(alone(slots), [found])
    assert worth(values, found) == pytest.approx(max(worth(values, state) for state in keeping))


@settings(max_examples=80, deadline=None)
@given(
    slots=layers(kinds=("equal", "capped", "replicas"), capped_load=True), seed=st.integers(0, 999)
)
def test_assigning_keeps_caps_and_is_never_worse(slots: LayerSlots, seed: int) -> None:
    values = values_for(slots, np.random.default_rng(seed))
    keeping = [state for (state,) in all_assignments(alone(slots))]
    if not keeping:
        return
    before = keeping[seed % len(keeping)]
    kept = before.copy()
    found = assign(values, slots, before)
    check_limits(alone(slots), [found])
    best = max(worth(values, state) for state in keeping)
    assert worth(values, before) - ROUNDING <= worth(values, found) <= best + ROUNDING
    assert np.array_equal(before, kept)


def test_assigning_under_caps_is_near_the_best() -> None:
    shares = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        load = rng.integers(1, 20, 8).astype(float)
        four = np.array([4, 4])
        limits = LayerLimits(least=four, most=four, slots=8, load=np.full(2, load.sum() * 0.55))
        slots = LayerSlots(owner=np.arange(8), load=load, limits=limits)
        values = rng.random((8, 2))
        keeping = [state for (state,) in all_assignments(alone(slots))]
        found = worth(values, assign(values, slots, keeping[0]))
        best = max(worth(values, state) for state in keeping)
        shares.append(found / best)
    assert np.mean(shares) > 0.98
    assert np.mean(np.array(shares) > 1 - 1e-9) > 0.6


@settings(max_examples=80, deadline=None)
@given(instance=instances(lag=2), seed=st.integers(0, 999), limit=st.integers(1, 9))
def test_a_swap_gains_what_it_claims(instance: Instance, seed: int, limit: int) -> None:
    """Swaps stop where the instance's own value says that no swap gains; each before did."""
    keeping = list(all_assignments(instance))
    if not keeping:
        return
    rng = np.random.default_rng(seed)
    before = keeping[int(rng.integers(len(keeping)))]
    layer = int(rng.integers(instance.layers))
    together = instance.together[layer] if instance.together else None
    values = instance.values(before, layer)
    slots, at = instance.slots[layer], before[layer]

    def whole(device: IntArray) -> float:
        return instance.value([*before[:layer], device, *before[layer + 1 :]])

    # One swap after another gives what several in one call give: values are kept up to date.
    once, reached = at, [whole(at)]
    for _ in range(limit):
        now = [*before[:layer], once, *before[layer + 1 :]]
        once = improve_by_swaps(instance.values(now, layer), slots, once, together, limit=1)
        reached.append(whole(once))
    assert all(a <= b + ROUNDING for a, b in pairwise(reached))
    many = improve_by_swaps(values, slots, at, together, limit=limit)
    check_limits(instance, [*before[:layer], many, *before[layer + 1 :]])
    assert whole(many) == pytest.approx(reached[-1], abs=1e-7)
    # The first swap is the best of all.
    best = whole(at)
    for e in range(len(at)):
        for f in range(e):
            other = at.copy()
            other[[e, f]] = other[[f, e]]
            try:
                check_limits(alone(slots), [other])
            except AssertionError:
                continue
            best = max(best, whole(other))
    assert reached[1] == pytest.approx(best, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    slots=layers(kinds=("equal", "capped", "replicas"), capped_load=True), seed=st.integers(0, 999)
)
def test_starts_keep_counts_and_relief_never_overloads_more(slots: LayerSlots, seed: int) -> None:
    free = replace(slots, limits=replace(slots.limits, load=np.full(len(slots.limits.most), 1e9)))
    start = balanced_start(slots, np.random.default_rng(seed))
    check_limits(alone(free), [start])
    states = [state for (state,) in all_assignments(alone(free))]
    before = states[seed % len(states)]
    after = relieve(slots, before)
    check_limits(alone(free), [after])
    assert overload(slots, after) <= max(overload(slots, before), 0) + ROUNDING


# -- sweeps ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(instance=instances(lag=2), seed=st.integers(0, 999), rename=st.booleans())
def test_improving_keeps_limits_and_never_costs_more(
    instance: Instance, seed: int, rename: bool
) -> None:
    keeping = list(all_assignments(instance))
    if not keeping:
        return
    before = keeping[seed % len(keeping)]
    kept = [device.copy() for device in before]
    after = improve(instance, before, rename=rename)
    check_limits(instance, after)
    assert instance.cost(after) <= instance.cost(before) + ROUNDING
    for mine, theirs in zip(before, kept, strict=True):
        assert np.array_equal(mine, theirs)


@settings(max_examples=60, deadline=None)
@given(instance=instances(lag=2), seed=st.integers(0, 99))
def test_a_sweep_is_never_below_the_optimum(instance: Instance, seed: int) -> None:
    keeping = list(all_assignments(instance))
    if not keeping:
        return
    witness = keeping[seed % len(keeping)]
    found = sweep(instance, seed=seed, starts=2, perturbations=1, witness=witness)
    check_limits(instance, found.assignment)
    assert found.cost == pytest.approx(instance.cost(found.assignment), abs=1e-9)
    least = least_cost(instance)
    assert least is not None
    assert found.cost >= least - ROUNDING


def test_most_small_instances_are_solved() -> None:
    solved = []
    for seed in range(25):
        instance = planted_instance(3, 6, 2, stay=0.3, pairs=300, seed=seed)
        least = least_cost(instance)
        assert least is not None
        cost = sweep(instance, seed=seed).cost
        assert cost >= least - ROUNDING
        solved.append(cost <= least + ROUNDING)
    assert np.mean(solved) >= 0.9


def same_groups(found: Assignment, homes: Assignment) -> bool:
    """Whether one renaming of the devices makes the two equal."""
    name = dict(zip(found[0].tolist(), homes[0].tolist(), strict=True))
    return all(
        [name[device] for device in mine.tolist()] == theirs.tolist()
        for mine, theirs in zip(found, homes, strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "experts", "devices"), [(8, 16, 4), (12, 32, 4)])
def test_planted_partitions_are_recovered(
    count: int, experts: int, devices: int, seed: int
) -> None:
    affinity, homes = planted(count, experts, devices, stay=0.6, pairs=200 * experts, seed=seed)
    problem = Problem(
        layer_ids=affinity.layer_ids, experts=affinity.experts, topology=Topology.of(devices)
    )
    instance = make_instance(problem, affinity)
    found = sweep(instance, seed=seed, starts=2, perturbations=2)
    check_limits(instance, found.assignment)
    assert same_groups(found.assignment, homes)
    # The embedding alone is near already: it is what makes the sweeps end there.
    start = spectral_start(instance, np.random.default_rng(seed))
    check_limits(instance, start)
    assert instance.cost(start) < 0.6 * np.mean(
        [
            instance.cost([balanced_start(s, np.random.default_rng(n)) for s in instance.slots])
            for n in range(3)
        ]
    )


def test_a_sweep_is_the_same_for_the_same_seed() -> None:
    instance = planted_instance(6, 24, 4, stay=0.1, load_cap=1.1)
    first, second = (sweep(instance, seed=5, starts=3, perturbations=3) for _ in range(2))
    assert first.cost == second.cost
    assert first.starts == second.starts == 6
    for mine, theirs in zip(first.assignment, second.assignment, strict=True):
        assert np.array_equal(mine, theirs)


def test_more_starts_do_not_cost_more_and_progress_tells_each_best() -> None:
    instance = planted_instance(6, 24, 4, stay=0.05)
    told: list[float] = []
    one = sweep(instance, seed=1, starts=1, perturbations=0)
    many = sweep(
        instance, seed=1, starts=3, perturbations=6, progress=lambda _, cost: told.append(cost)
    )
    assert told == sorted(told, reverse=True)
    assert told[0] == pytest.approx(one.cost)  # the same first start
    assert told[-1] == pytest.approx(many.cost)
    assert many.cost < one.cost


def test_a_warm_start_is_never_lost() -> None:
    affinity, homes = planted(5, 16, 4, stay=0.9, pairs=5000)
    problem = Problem(
        layer_ids=affinity.layer_ids, experts=affinity.experts, topology=Topology.of(4)
    )
    instance = make_instance(problem, affinity)
    found = sweep(instance, seed=0, starts=1, perturbations=0, warm=homes)
    assert found.starts == 1
    assert found.cost <= instance.cost(homes) + ROUNDING


def test_no_time_gives_the_first_start() -> None:
    instance = planted_instance(5, 16, 4, stay=0.3)
    found = sweep(instance, seed=0, starts=9, perturbations=9, time_limit=0.0)
    assert found.starts == 1
    check_limits(instance, found.assignment)


def test_renaming_leaves_an_optimum_of_a_sweep() -> None:
    """Layers behind a boundary have each the right groups under wrong names."""
    affinity, homes = planted(6, 12, 3, stay=0.95, pairs=4000)
    problem = Problem(
        layer_ids=affinity.layer_ids, experts=affinity.experts, topology=Topology.of(3)
    )
    instance = make_instance(problem, affinity)
    wrong = [home if layer < 3 else (home + 1) % 3 for layer, home in enumerate(homes)]
    stuck = improve(instance, wrong, rename=False)
    assert instance.cost(stuck) > instance.cost(homes) + 0.01
    found = improve(instance, wrong)
    assert instance.cost(found) == pytest.approx(instance.cost(homes))


def test_layers_that_break_a_cap_are_mended_or_taken_from_the_witness() -> None:
    two = np.array([2, 2])
    layer = LayerSlots(
        owner=np.arange(4),
        load=np.array([4.0, 3.0, 2.0, 1.0]),
        limits=LayerLimits(least=two, most=two, slots=4, load=np.full(2, 5.0)),
    )
    tight = replace(layer, load=np.array([9.0, 3.0, 2.0, 8.0]))
    tight = replace(tight, limits=replace(tight.limits, load=np.array([10.9, 11.1])))
    instance = Instance(slots=(layer, layer, tight), pairs=(), near=np.eye(2))
    good = np.array([0, 1, 1, 0])
    bad = np.array([0, 0, 1, 1])
    witness = [good, good, np.array([1, 0, 1, 0])]  # 11 to 11: the cap of device 0 is broken
    kept = keeping_caps(instance, [good, bad, bad], witness)
    assert np.array_equal(kept[0], good)
    assert overload(layer, kept[1]) <= ROUNDING
    assert overload(layer, bad) > 1
    assert np.array_equal(kept[2], witness[2])
    alone_ = keeping_caps(instance, [good, bad, bad], None)
    assert overload(tight, alone_[2]) > ROUNDING


# -- two stages ------------------------------------------------------------------------------------


def two_levels(seed: int, **options: object) -> tuple[Problem, Instance, object]:
    trace, _ = planted_trace(
        5, 16, 4, tokens=2500, stay=0.45, nodes=2, stay_in_node=0.75, seed=seed, heavy=0.3
    )
    problem = Problem(
        layer_ids=trace.layer_ids,
        experts=trace.experts,
        topology=Topology.of(4, 2),
        **options,  # type: ignore[arg-type]
    )
    return problem, make_instance(problem, affinity_of(trace)), trace


def quick(one: Instance) -> Assignment:
    return sweep(one, seed=0, starts=3, perturbations=3).assignment


@pytest.mark.parametrize("seed", range(3))
def test_two_stages_cross_nodes_no_more(seed: int) -> None:
    problem, instance, trace = two_levels(seed)
    staged = solve_in_stages(instance, problem.topology, quick)
    check_limits(instance, staged)
    crossing = []
    for assignment in (staged, quick(instance)):
        found = measure(instance.placement(assignment), problem.topology, trace)  # type: ignore[arg-type]
        assert found.node_crossing is not None
        crossing.append(found.node_crossing)
    assert crossing[0] <= crossing[1] + ROUNDING
    assert crossing[0] < 0.2  # a random one: half


@pytest.mark.parametrize("text", ["crossing", "time+0.5*distinct"])
def test_stages_of_capped_counts_keep_limits(text: str) -> None:
    for slack in (1.25, 2.0):  # 2: a node may get all experts of a layer, another none
        problem, instance, _ = two_levels(
            1, counts="capped", slack=slack, objective=Objective.parse(text)
        )
        check_limits(instance, solve_in_stages(instance, problem.topology, quick))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999))
def test_nodes_are_a_relaxation_and_a_node_is_a_part(seed: int) -> None:
    """Over nodes an assignment is worth no less; with nodes free, exactly what they keep."""
    rng = np.random.default_rng(seed)
    problem, instance, _ = two_levels(0, objective=Objective.parse("crossing+time"))
    groups = problem.topology.by_node()
    assignment = [balanced_start(slots, rng) for slots in instance.slots]
    nodes = [problem.topology.node_of[device] for device in assignment]
    coarse = over_nodes(instance, groups)
    check_limits(coarse, nodes)
    assert coarse.value(nodes) >= instance.value(assignment) - ROUNDING
    # What pairs inside the nodes are worth, and those between nodes.
    inner = 0.0
    for number, devices in enumerate(groups):
        members = [np.flatnonzero(node == number) for node in nodes]
        part = inside_node(instance, devices, members)
        mine = [
            np.searchsorted(devices, device[rows])
            for device, rows in zip(assignment, members, strict=True)
        ]
        check_limits(part, mine)
        inner += part.value(mine)
    between = instance.value(assignment) - inner
    far = sum(
        float((matrix * (nodes[a][:, None] != nodes[b][None, :])).sum())
        for a, b, matrix in instance.pairs
    )
    assert between == pytest.approx(far * float(instance.near[0, 2]), abs=1e-9)


def test_replicas_have_one_stage() -> None:
    trace, _ = planted_trace(3, 8, 4, tokens=400)
    problem = Problem(
        layer_ids=trace.layer_ids, experts=trace.experts, topology=Topology.of(4, 2), redundant=4
    )
    instance = make_instance(problem, affinity_of(trace))
    with pytest.raises(PlanError, match="two stages are for plans without replicas"):
        solve_in_stages(instance, problem.topology, quick)


# -- instances -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(instance=instances(lag=2), seed=st.integers(0, 999))
def test_values_of_a_layer_are_differences_of_the_whole(instance: Instance, seed: int) -> None:
    keeping = list(all_assignments(instance))
    if not keeping:
        return
    assignment = keeping[seed % len(keeping)]
    for layer, device in enumerate(assignment):
        values = instance.values(assignment, layer)
        slot = seed % len(device)
        for other in range(instance.devices):
            moved = [one.copy() for one in assignment]
            moved[layer][slot] = other
            change = instance.value(moved) - instance.value(assignment)
            gain = values[slot, other] - values[slot, device[slot]]
            assert gain == pytest.approx(change, abs=1e-9)
    placement = instance.placement(assignment)
    again = instance.assignment(placement)
    assert instance.value(again) == pytest.approx(instance.value(assignment))
