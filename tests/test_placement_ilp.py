"""The integer programs against trying everything; honest status; the polish."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.assign import balanced_start
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.ilp import SOLVERS, solve_in_stages, solve_program
from moe_runtime.placement.ilp_program import keeps_limits
from moe_runtime.placement.instance import Instance, make_instance
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.sweep import sweep
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.windows import POLISHERS, polish

from moe_runtime.errors import ConfigError, PlanError
from placements import (
    all_assignments,
    check_limits,
    instances,
    least_cost,
    planted,
    planted_instance,
)


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=15, deadline=None)
@given(instance=instances(lag=2), seed=st.integers(0, 99))
def test_the_program_is_exact(solver: str, instance: Instance, seed: int) -> None:
    least = least_cost(instance)
    if least is None:
        with pytest.raises(PlanError, match="no assignment keeps all limits"):
            solve_program(instance, solver=solver)
        return
    keeping = list(all_assignments(instance))
    warm = keeping[seed % len(keeping)] if seed % 2 else None
    result = solve_program(instance, solver=solver, seed=seed, warm=warm)
    assert result.assignment is not None
    check_limits(instance, result.assignment)
    assert result.proved
    assert result.cost == pytest.approx(least, abs=1e-6)
    assert instance.cost(result.assignment) == pytest.approx(result.cost, abs=1e-9)
    assert result.bound == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_program_and_recursion_agree_on_a_topology(solver: str) -> None:
    affinity, _ = planted(3, 4, 4, stay=0.6, pairs=300)
    problem = Problem(
        layer_ids=affinity.layer_ids,
        experts=affinity.experts,
        topology=Topology.of(4, 2),
        objective=Objective.parse("crossing+0.5*time"),
    )
    instance = make_instance(problem, affinity)
    exact = solve_exactly(instance)
    assert exact is not None
    result = solve_program(instance, solver=solver, time_limit=60)
    assert result.proved
    assert result.cost == pytest.approx(instance.cost(exact), abs=1e-7)


def test_worth_of_single_slots_is_part_of_the_program() -> None:
    instance = planted_instance(3, 4, 2, stay=0.5, pairs=400)
    rng = np.random.default_rng(0)
    worth = [rng.normal(size=(4, 2)) for _ in range(3)]
    exact = solve_exactly(instance, given=worth)
    result = solve_program(instance, given=worth)
    assert exact is not None
    assert result.assignment is not None
    for mine, theirs in zip(exact, result.assignment, strict=True):
        assert np.array_equal(mine, theirs)
    single = sum(w[np.arange(4), d].sum() for w, d in zip(worth, exact, strict=True))
    assert result.cost == pytest.approx(instance.cost(exact) - single, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_time_gives_no_proof(solver: str) -> None:
    instance = planted_instance(6, 12, 3, stay=0.2)
    result = solve_program(instance, solver=solver, time_limit=0.0)
    assert not result.proved
    if result.assignment is None:
        assert result.cost == np.inf
    else:
        check_limits(instance, result.assignment)
        assert result.cost == pytest.approx(instance.cost(result.assignment))
    assert result.bound is None or result.bound <= result.cost
    rng = np.random.default_rng(0)
    warm = [balanced_start(slots, rng) for slots in instance.slots]
    kept = solve_program(instance, solver=solver, time_limit=0.0, warm=warm)
    assert kept.assignment is not None
    assert kept.cost <= instance.cost(warm) + 1e-12
    assert not kept.proved


def test_a_bound_after_the_time_limit_is_valid() -> None:
    instance = planted_instance(8, 8, 2, stay=0.3)
    exact = solve_exactly(instance)
    assert exact is not None
    for seconds in (2.0, 60.0):  # as many as a busy machine needs for a bound
        result = solve_program(instance, solver="highs", time_limit=seconds, warm=exact)
        if result.bound is not None:
            break
    assert result.bound is not None
    assert result.bound <= instance.cost(exact) + 1e-9
    assert result.cost == pytest.approx(instance.cost(exact), abs=1e-9)  # the warm start


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_seed_gives_the_same(solver: str) -> None:
    instance = planted_instance(3, 6, 2, stay=0.5, pairs=300)
    first, second = (solve_program(instance, solver=solver, seed=4) for _ in range(2))
    assert first.proved
    assert first.assignment is not None
    assert second.assignment is not None
    for mine, theirs in zip(first.assignment, second.assignment, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_is_printed(solver: str, capfd: pytest.CaptureFixture[str]) -> None:
    instance = planted_instance(2, 4, 2, stay=0.5, pairs=100)
    print(json.dumps({"before": 1}))
    solve_program(instance, solver=solver)
    print(json.dumps({"after": 2}))
    out, err = capfd.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [{"before": 1}, {"after": 2}]
    assert not err


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(ConfigError, match=r"gurobi.*highs, cbc"):
        solve_program(planted_instance(2, 4, 2, stay=0.5), solver="gurobi")


# -- two stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("redundant", [0, 4])
def test_two_stages_keep_the_limits(solver: str, redundant: int) -> None:
    affinity, _ = planted(3, 4, 4, stay=0.9, pairs=2000)
    problem = Problem(
        layer_ids=affinity.layer_ids,
        experts=affinity.experts,
        topology=Topology.of(4, 2),
        redundant=redundant,
    )
    instance = make_instance(problem, affinity)
    result = solve_in_stages(instance, problem.topology, solver=solver, time_limit=20)
    assert result.assignment is not None
    check_limits(instance, result.assignment)
    assert keeps_limits(instance, result.assignment)
    assert not result.proved
    assert result.cost == pytest.approx(instance.cost(result.assignment))
    exact = solve_exactly(instance)
    assert exact is not None
    assert result.cost >= instance.cost(exact) - 1e-9
    if result.bound is not None:
        assert result.bound <= instance.cost(exact) + 1e-9
    if not redundant:  # a strong signal: the stages' optima are the whole's
        assert result.cost == pytest.approx(instance.cost(exact), abs=1e-9)


def test_one_node_is_one_stage() -> None:
    instance = planted_instance(3, 4, 2, stay=0.7, pairs=300)
    result = solve_in_stages(instance, Topology.of(2), time_limit=20)
    assert result.proved


# -- the polish ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", POLISHERS)
@settings(max_examples=10, deadline=None)
@given(instance=instances(lag=2), seed=st.integers(0, 99))
def test_a_polish_is_never_worse_and_keeps_limits(
    solver: str, instance: Instance, seed: int
) -> None:
    keeping = list(all_assignments(instance))
    if not keeping:
        return
    start = keeping[seed % len(keeping)]
    before = [device.copy() for device in start]
    found, improvements = polish(instance, start, time_limit=0.3, seed=seed, solver=solver)
    check_limits(instance, found)
    if improvements:
        assert instance.cost(found) < instance.cost(start)
    else:
        assert instance.cost(found) == pytest.approx(instance.cost(start), abs=1e-12)
    for mine, theirs in zip(before, start, strict=True):
        assert np.array_equal(mine, theirs)


def test_a_polish_of_all_slots_ends_at_the_optimum() -> None:
    """Two devices, few experts: the first window is the whole instance."""
    instance = planted_instance(6, 8, 2, stay=0.2, load_cap=1.15)
    rng = np.random.default_rng(5)
    start = [balanced_start(slots, rng) for slots in instance.slots]
    found, improvements = polish(instance, start, time_limit=20)
    exact = solve_exactly(instance)
    assert exact is not None
    check_limits(instance, found)
    assert improvements == 1
    assert instance.cost(found) == pytest.approx(instance.cost(exact), abs=1e-9)


def test_a_polish_improves_what_a_capped_sweep_left() -> None:
    instance = planted_instance(6, 24, 4, stay=0.1, load_cap=1.04)
    swept = sweep(instance, seed=0, starts=1, perturbations=0).assignment
    costs: list[float] = []
    for seconds in (3, 60):  # as many as a busy machine needs
        costs.clear()
        found, improvements = polish(
            instance, swept, time_limit=seconds, progress=lambda _, cost: costs.append(cost)
        )
        if improvements:
            break
    check_limits(instance, found)
    assert improvements == len(costs) > 0
    assert sorted(costs, reverse=True) == costs
    assert instance.cost(found) == pytest.approx(costs[-1])
    assert costs[0] < instance.cost(swept)


@pytest.mark.parametrize("solver", SOLVERS)
def test_integer_programs_polish_too(solver: str) -> None:
    instance = planted_instance(4, 12, 3, stay=0.5, load_cap=1.2)
    rng = np.random.default_rng(3)
    start = [balanced_start(slots, rng) for slots in instance.slots]
    for seconds in (2, 60):  # as many as a busy machine needs
        found, improvements = polish(instance, start, time_limit=seconds, solver=solver)
        if improvements:
            break
    check_limits(instance, found)
    assert improvements > 0
    assert instance.cost(found) < instance.cost(start)


def test_a_cap_that_is_exceeded_is_exceeded_by_no_more() -> None:
    instance = planted_instance(4, 8, 2, stay=0.3)
    start = [np.repeat([0, 1], 4) for _ in range(4)]
    tight = replace(
        instance,
        slots=tuple(
            replace(slots, limits=replace(slots.limits, load=slots.loads(device) * 0.95))
            for slots, device in zip(instance.slots, start, strict=True)
        ),
    )
    found, _ = polish(tight, start, time_limit=2)
    for slots, before, after in zip(tight.slots, start, found, strict=True):
        assert (slots.loads(after) <= slots.loads(before) + 1e-9).all()


def test_a_polish_is_the_same_for_the_same_seed() -> None:
    instance = planted_instance(4, 12, 3, stay=0.1, load_cap=1.1)
    rng = np.random.default_rng(1)
    start = [balanced_start(slots, rng) for slots in instance.slots]
    first, second = (polish(instance, start, time_limit=60, seed=2) for _ in range(2))
    assert first[1] == second[1] > 0
    for mine, theirs in zip(first[0], second[0], strict=True):
        assert np.array_equal(mine, theirs)


def test_a_polish_has_a_time_limit_and_known_solvers() -> None:
    instance = planted_instance(6, 24, 4, stay=0.1)
    start = sweep(instance, seed=0, starts=1, perturbations=0).assignment
    found, improvements = polish(instance, start, time_limit=0.0)
    assert improvements == 0
    assert instance.cost(found) == instance.cost(start)
    with pytest.raises(ConfigError, match=r"scip.*chain, highs, cbc"):
        polish(instance, start, solver="scip")
