"""The methods that look for a placement, which of them is asked for, and what each proves.

Puts the parts together; each algorithm has a file of its own. Does not know what a plan is worth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from moe_runtime.placement.affinity import Affinity
from moe_runtime.placement.bounds import Bound, lower_bound
from moe_runtime.placement.cost import load_of
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.ilp import solve_in_stages as solve_program_in_stages
from moe_runtime.placement.ilp import solve_program
from moe_runtime.placement.instance import Assignment, Instance, make_instance
from moe_runtime.placement.plan import BoolArray, Certificate
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.recordings import Recording
from moe_runtime.placement.smoothing import Smoothing, level_called
from moe_runtime.placement.sweep import keeping_caps, sweep
from moe_runtime.placement.two_stage import solve_in_stages
from moe_runtime.placement.windows import polish

from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace

__all__ = ["METHODS", "Progress", "SolveOptions", "Solved", "solve"]

# Called with what is being done, the best cost so far and the bound so far.
Progress: TypeAlias = Callable[[str, float | None, float | None], None]

METHODS = ("auto", "sweep", "exact", "highs", "cbc")
# Of the time limit: the sweeps, the polish by exact windows, the rest for the bound.
_SWEEP_SHARE, _POLISH_SHARE = 0.45, 0.2
_EQUAL = 1e-6  # relative: bounds give away some rounding of singular values


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """How a plan is looked for.

    Args:
        method: `"auto"` (dynamic programming where a layer has few placements, else sweeps and
            exact windows), `"sweep"` (neither), `"exact"` (dynamic programming
            or an error), `"highs"` or `"cbc"` (ExFlow's integer program, that solver).
        stages: 1, or 2: nodes first, then the devices inside each (ExFlow).
        smoothing: `"auto"`, or a name in `LEVELS`.
        weighted: count uses by the router's weights.
        seed: of all random choices.
        time_limit: seconds for solving and the bound together.
        starts: starts of the sweeps.
    """

    method: str = "auto"
    stages: int = 1
    smoothing: str = "auto"
    weighted: bool = False
    seed: int = 0
    time_limit: float = 60.0
    starts: int = 8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PlanError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        if self.stages not in (1, 2):
            raise PlanError(f"stages must be 1 or 2, found {self.stages}")
        if not (np.isfinite(self.time_limit) and self.time_limit > 0):
            raise PlanError(f"the time limit must be positive seconds, found {self.time_limit}")
        if self.starts < 1:
            raise PlanError(f"starts must be 1 or more, found {self.starts}")
        if self.smoothing != "auto":
            level_called(self.smoothing)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """A placement, bool `[experts, devices]` for each layer, and what is proved of it."""

    placement: list[BoolArray]
    certificate: Certificate


def solve(
    problem: Problem,
    train: Recording,
    raw: Affinity,
    level: Smoothing,
    options: SolveOptions,
    witness: list[BoolArray],
    caps: list[float] | None,
    say: Progress,
    began: float,
) -> Solved:
    """Solve a problem by the method asked for.

    Args:
        train: what the counts are made from again where they are smoothed.
        raw: its counts as they are.
        level: how they are smoothed.
        witness: a placement that keeps the caps: bool `[experts, devices]` for each layer.
        caps: the load cap of each layer; None if there is none.
        began: when the time limit began, in seconds of `time.perf_counter`.

    Raises:
        PlanError: the method finds nothing, or not in the time it has.
    """
    if problem.objective.is_load:
        return _balanced_only(problem, raw, witness, options, began)
    counts = raw
    if level.repeats or len(level.lag_weights) > 1:
        assert isinstance(train, RoutingTrace)
        within = problem.objective.distinct > 0
        counts = level.count(train, weighted=options.weighted, within=within)
        # Loads are capped as they are, whatever is done to the affinity.
        counts = replace(counts, load=raw.load)
    instance = make_instance(
        problem,
        counts,
        lag_weights=level.lag_weights,
        power=level.power,
        witness=witness,
        load_caps=caps,
    )
    start = instance.assignment(witness)
    assignment, bound, method, proved = _search(problem, instance, start, options, say, began)
    cost = instance.cost(assignment)
    smoothed = "" if level.name == "none" else f", counts smoothed ({level.name})"
    certificate = Certificate(
        objective=f"{problem.objective} on the training tokens{smoothed}",
        value=cost,
        bound=cost if proved else min(bound.cost, cost),
        bound_method=bound.method,
        status="optimal" if proved or cost - bound.cost <= _EQUAL * cost else "feasible",
        method=method,
        seconds=time.perf_counter() - began,
        seed=options.seed,
    )
    return Solved(placement=instance.placement(assignment), certificate=certificate)


def _search(
    problem: Problem,
    instance: Instance,
    witness: Assignment,
    options: SolveOptions,
    say: Progress,
    began: float,
) -> tuple[Assignment, Bound, str, bool]:
    """(assignment, bound, how found, whether proved optimal)."""
    if options.method in ("auto", "exact") and options.stages == 1:
        say("dynamic programming", None, None)
        most = 20_000 if options.method == "exact" else 3_000
        found = solve_exactly(instance, most_states=most)
        if found is not None:
            bound = Bound(cost=instance.cost(found), method="dynamic programming over the layers")
            return found, bound, "dynamic programming", True
        if options.method == "exact":
            raise PlanError(
                "a layer has too many placements for dynamic programming, or layers further apart "
                "count; use --method sweep, highs or cbc"
            )
    if options.method in ("highs", "cbc"):
        return _program(problem, instance, witness, options, say)

    def best(cost: float) -> None:
        say("sweep", cost, None)

    limit = options.time_limit

    def swept(one: Instance, start: Assignment | None = None) -> Assignment:
        share = (
            _SWEEP_SHARE * limit / (1 if options.stages == 1 else problem.topology.node_count + 1)
        )
        return sweep(
            one,
            seed=options.seed,
            starts=options.starts,
            perturbations=3 * options.starts,
            time_limit=share,
            witness=start,
            progress=lambda _, cost: best(cost),
        ).assignment

    method = "sweeps with exact layers"
    if options.stages == 2 and problem.topology.node_count > 1:
        assignment = solve_in_stages(instance, problem.topology, swept)
        # Inside a node there may be no way to keep a cap that the whole can keep.
        assignment = keeping_caps(instance, assignment, witness)
        method += ", nodes then devices"
    else:
        assignment = swept(instance, witness)
    if options.method == "auto" and options.stages == 1:
        say("polish", instance.cost(assignment), None)
        assignment, accepted = polish(
            instance, assignment, time_limit=_POLISH_SHARE * limit, seed=options.seed
        )
        method += f", exact windows ({accepted} improvements)"
    cost = instance.cost(assignment)
    left = max(0.05 * limit, limit - (time.perf_counter() - began))
    bound = lower_bound(instance, time_limit=left, progress=lambda low: say("bound", cost, low))
    return assignment, bound, method, False


def _program(
    problem: Problem,
    instance: Instance,
    witness: Assignment,
    options: SolveOptions,
    say: Progress,
) -> tuple[Assignment, Bound, str, bool]:
    say(f"integer program ({options.method})", None, None)
    asked: dict[str, Any] = {
        "solver": options.method,
        "time_limit": options.time_limit,
        "seed": options.seed,
    }
    if options.stages == 2:
        found = solve_program_in_stages(instance, problem.topology, **asked)
    else:
        found = solve_program(instance, warm=witness, **asked)
    if found.assignment is None:
        raise PlanError(
            f"{options.method} found no placement within {options.time_limit:g} seconds; give it "
            "more time, or use --method sweep"
        )
    bound = lower_bound(instance, time_limit=0.2 * options.time_limit)
    if found.bound is not None and found.bound > bound.cost:
        bound = Bound(cost=found.bound, method=f"dual bound of {options.method}")
    return found.assignment, bound, f"integer program ({options.method})", found.proved


def _balanced_only(
    problem: Problem,
    raw: Affinity,
    witness: list[BoolArray],
    options: SolveOptions,
    began: float,
) -> Solved:
    """A plan for the load alone; what it proves is the mean of the layers' highest loads."""
    loads = [
        load_of(held, load, problem.topology) for held, load in zip(witness, raw.load, strict=True)
    ]
    value, bound = float(np.mean(loads)), 1.0
    return Solved(
        placement=witness,
        certificate=Certificate(
            objective="load on the training tokens (highest over mean, mean of the layers)",
            value=value,
            bound=bound,
            bound_method="the mean load",
            status="optimal" if value - bound < 1e-9 else "feasible",
            method="optimal replica counts, packing by local search",
            seconds=time.perf_counter() - began,
            seed=options.seed,
        ),
    )
