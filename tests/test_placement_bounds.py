"""Certificates: no assignment undercuts a bound, and planted instances are certified closely."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.bounds import lower_bound, pair_bound, within_bound
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.instance import Instance, make_instance
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.topology import Topology

from placements import instances, least_cost
from planted import planted_trace


@settings(max_examples=60, deadline=None)
@given(instance=instances(), steps=st.sampled_from([0, 3, 30]))
def test_no_assignment_costs_less_than_the_bound(instance: Instance, steps: int) -> None:
    optimum = least_cost(instance)
    assume(optimum is not None)
    assert optimum is not None
    bound = lower_bound(instance, steps=steps, time_limit=5.0)
    assert bound.cost <= optimum + 1e-9


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("objective", ["crossing", "time", "distinct", "crossing+0.5*distinct"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bounds_hold_for_each_objective_and_topology(nodes: int, objective: str, seed: int) -> None:
    trace, _ = planted_trace(4, 8, 4, tokens=60, stay=0.4, seed=seed)
    problem = Problem(
        layer_ids=trace.layer_ids,
        experts=trace.experts,
        topology=Topology.of(4, nodes),
        objective=Objective.parse(objective),
    )
    instance = make_instance(problem, affinity_of(trace))
    best = solve_exactly(instance)
    assert best is not None
    quick, tight = (lower_bound(instance, time_limit=limit).cost for limit in (0.0, 5.0))
    assert quick <= tight + 1e-12
    assert 0 <= tight <= instance.cost(best) + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_two_layers_are_bounded_as_brute_force_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.exponential(size=(6, 4)) ** 2
    firsts = {tuple(p) for p in itertools.permutations([0, 0, 0, 1, 1, 1])}
    seconds = {tuple(p) for p in itertools.permutations([0, 0, 1, 1])}
    best = max(
        float((matrix * (np.array(a)[:, None] == np.array(b)[None, :])).sum())
        for a in firsts
        for b in seconds
    )
    values = [pair_bound(matrix, 3, 2, True, 2, steps=steps) for steps in (0, 5, 60)]
    assert values == sorted(values, reverse=True)
    assert values[-1] >= best - 1e-9
    assert values[-1] < matrix.sum()
    # Without equal counts more is allowed, so the bound cannot be lower.
    assert pair_bound(matrix, 3, 2, False, 2, steps=60) >= values[-1] - 1e-9


def test_pairs_inside_a_layer_are_bounded() -> None:
    trace, _ = planted_trace(2, 8, 4, tokens=80, top_k=3, seed=5)
    problem = Problem(
        layer_ids=trace.layer_ids,
        experts=trace.experts,
        topology=Topology.of(4),
        objective=Objective.parse("distinct"),
    )
    instance = make_instance(problem, affinity_of(trace))
    for layer, matrix in enumerate(instance.together):
        best = max(
            0.5 * float((matrix * (np.array(p)[:, None] == np.array(p)[None, :])).sum())
            for p in set(itertools.permutations([0, 0, 1, 1, 2, 2, 3, 3]))
        )
        assert best - 1e-12 <= within_bound(instance, layer) <= 0.5 * matrix.sum() + 1e-12


def test_planted_homes_are_certified_closely() -> None:
    trace, homes = planted_trace(12, 32, 4, tokens=4000, stay=0.6)
    problem = Problem(layer_ids=trace.layer_ids, experts=trace.experts, topology=Topology.of(4))
    instance = make_instance(problem, affinity_of(trace))
    cost = instance.cost(homes)
    bound = lower_bound(instance, time_limit=20.0)
    assert bound.cost <= cost + 1e-9
    assert (cost - bound.cost) / cost < 0.05


def test_progress_tells_bounds_that_never_fall() -> None:
    trace, _ = planted_trace(6, 16, 4, tokens=300, stay=0.5)
    problem = Problem(layer_ids=trace.layer_ids, experts=trace.experts, topology=Topology.of(4))
    told: list[float] = []
    instance = make_instance(problem, affinity_of(trace))
    bound = lower_bound(instance, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == bound.cost


def test_a_decomposition_that_gives_up_is_made_the_slow_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = np.random.default_rng(0).random((8, 6))
    usual = pair_bound(matrix, 4, 3, True, 2)

    def gives_up(*args: object, **options: object) -> None:
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", gives_up)
    assert pair_bound(matrix, 4, 3, True, 2) == pytest.approx(usual)
