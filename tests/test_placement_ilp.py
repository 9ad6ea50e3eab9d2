"""The integer programs against trying everything; honest status; the polish."""

from __future__ import annotations

import json

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
from moe_runtime.placement.topology import Topology

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
    result = solve_program(instance, solver="highs", time_limit=2.0, warm=exact)
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
