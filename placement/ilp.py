"""ExFlow's integer program (arXiv 2401.08383) on aggregated counts, solved by HiGHS or CBC.

States the program, asks the solver and reads its answer with suspicion; knows no heuristic. For
sizes where it proves something: see `exact` and `windows` for the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from moe_runtime.placement.ilp_program import Program
from moe_runtime.placement.ilp_solvers import SOLVERS, check_solver, run
from moe_runtime.placement.instance import Assignment, Instance
from moe_runtime.placement.subproblem import part_of
from moe_runtime.placement.topology import Topology

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError

__all__ = ["SOLVERS", "IlpResult", "solve_in_stages", "solve_program"]


@dataclass(frozen=True, kw_only=True, eq=False)
class IlpResult:
    """What an integer program gave.

    Args:
        assignment: the best found; None if none was found in time.
        cost: its `Instance.cost` (less what `given` gives); infinite if there is none.
        bound: no assignment costs less; None where the solver tells none.
        proved: whether the assignment is optimal for the whole instance, by the solver's word.
        seconds: building the program included.
        solver: `"highs"` or `"cbc"`.
    """

    assignment: Assignment | None
    cost: float
    bound: float | None
    proved: bool
    seconds: float
    solver: str


def solve_program(
    instance: Instance,
    *,
    solver: str = "highs",
    time_limit: float = 60.0,
    seed: int = 0,
    warm: Assignment | None = None,
    given: Sequence[FloatArray] | None = None,
    most_copies: IntArray | None = None,
) -> IlpResult:
    """The one-level program: x[layer, slot, device] binary, one cost variable a pair of slots.

    Deterministic for a seed unless the time limit ends it: one thread, fixed random seeds.

    Args:
        time_limit: seconds, building the program included (which is not cut short).
        warm: an assignment that keeps the limits: where the search starts, and what the result is
            never worse than.
        given: for each layer float64 `[S, G]`, what a slot is worth on a device besides its pairs.
        most_copies: int64 `[G]`, how many slots of one expert a device may hold; 1 unless given.

    Raises:
        ConfigError: no such solver.
        PlanError: the limits cannot be kept; the solver failed.
    """
    began = time.perf_counter()
    check_solver(solver)
    program = Program(instance, given, most_copies)
    start = None if warm is None else program.start(warm)
    left = time_limit - (time.perf_counter() - began)
    answer = run(program.problem, solver, time_limit=left, seed=seed, start=start)
    if answer.infeasible:
        raise PlanError(
            "no assignment keeps all limits (proved by the integer program); raise the load cap, "
            "or add redundant slots"
        )
    found = program.read() if answer.has_solution else None
    cost = np.inf if found is None else instance.cost(found) - _beside(given, found)
    if warm is not None:
        warm_cost = instance.cost(warm) - _beside(given, warm)
        if warm_cost < cost:
            found, cost = [device.copy() for device in warm], warm_cost
    proved = answer.proved and found is not None
    bound = float(cost) if proved else None
    if answer.bound is not None and not proved:
        bound = min(max(program.least_cost, program.cost_of(answer.bound)), float(cost))
    return IlpResult(
        assignment=found,
        cost=float(cost),
        bound=bound,
        proved=proved,
        seconds=time.perf_counter() - began,
        solver=solver,
    )


def solve_in_stages(
    instance: Instance,
    topology: Topology,
    *,
    solver: str = "highs",
    time_limit: float = 60.0,
    seed: int = 0,
) -> IlpResult:
    """ExFlow's two stages: experts over nodes, then inside each node over its devices.

    Each program is much smaller than the whole; the stages' optima together need not be the
    whole's, so nothing is proved (unless there is one node). Half of the time is for the nodes.

    Returns:
        The bound is that of the first stage, which no assignment undercuts: what crosses nodes
        crosses devices. No assignment where a stage found none, or where the first stage's choice
        leaves a node no placement under its load cap.
    """
    nodes = topology.by_node()
    if len(nodes) == 1:
        return solve_program(instance, solver=solver, time_limit=time_limit, seed=seed)
    began = time.perf_counter()
    first = solve_program(
        _over_nodes(instance, nodes),
        solver=solver,
        time_limit=time_limit / 2,
        seed=seed,
        most_copies=np.array([len(devices) for devices in nodes]),
    )
    found = first.assignment
    if found is not None:
        # Every slot on its node's first device: the second stage frees all slots of a node.
        found = [np.array([node[0] for node in nodes])[device] for device in found]
        for at, devices in enumerate(nodes):
            left = time_limit - (time.perf_counter() - began)
            found = _inside(instance, found, devices, solver, left / (len(nodes) - at), seed)
            if found is None:
                break
    return IlpResult(
        assignment=found,
        cost=np.inf if found is None else instance.cost(found),
        bound=first.bound,
        proved=False,
        seconds=time.perf_counter() - began,
        solver=solver,
    )


def _beside(given: Sequence[FloatArray] | None, assignment: Assignment) -> float:
    if given is None:
        return 0.0
    return sum(
        float(worth[np.arange(len(device)), device].sum())
        for worth, device in zip(given, assignment, strict=True)
    )


# -- two stages ------------------------------------------------------------------------------------


def _over_nodes(instance: Instance, nodes: Sequence[Sequence[int]]) -> Instance:
    """The instance with nodes as devices: a relaxation, every placement on devices is one."""
    slots = []
    for layer in instance.slots:
        limits = layer.limits
        least, most, load = (
            np.array([values[list(devices)].sum() for devices in nodes])
            for values in (limits.least, limits.most, limits.load)
        )
        slots.append(replace(layer, limits=replace(limits, least=least, most=most, load=load)))
    near = np.array([[instance.near[np.ix_(a, b)].max() for b in nodes] for a in nodes])
    return replace(instance, slots=tuple(slots), near=near)


def _inside(
    instance: Instance,
    assignment: Assignment,
    devices: Sequence[int],
    solver: str,
    time_limit: float,
    seed: int,
) -> Assignment | None:
    """One node's slots over its devices; None if the solver found no way."""
    free = [np.flatnonzero(np.isin(device, devices)) for device in assignment]
    layers = [layer for layer, mine in enumerate(free) if len(mine)]
    if not layers or len(devices) == 1:
        return assignment
    part = part_of(
        instance, assignment, layers=layers, devices=devices, free=[free[n] for n in layers]
    )
    # Slots of other nodes are not on their devices yet, and count the same from all of these.
    try:
        found = solve_program(part.instance, solver=solver, time_limit=time_limit, seed=seed)
    except PlanError:
        return None
    return None if found.assignment is None else part.insert(assignment, found.assignment)
