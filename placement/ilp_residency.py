"""The integer program of a residency plan where experts differ in bytes or have replicas.

Written in PuLP, solved by HiGHS. Does not know layers or plans, only the packing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import numpy as np
from moe_runtime.placement.packing import Packed, Packing, fractional_bound, greedy

__all__ = ["solve_packing"]


def solve_packing(packing: Packing, *, time_limit: float) -> Packed | None:
    """The best choice found within the time, with a bound on all choices.

    The greedy choice stands in where the solver has none, or one that breaks a limit by its
    tolerance; the bound is the solver's own or the fractional one, whichever is lower.

    Args:
        time_limit: seconds.

    Returns:
        None if the floors cannot be kept.
    """
    import pulp

    problem, variables = _program(packing)
    solver = pulp.HiGHS(msg=False, gapRel=0.0, threads=1, timeLimit=max(time_limit, 0.1))
    with _silenced():
        problem.solve(solver)
    if problem.status == pulp.LpStatusInfeasible:
        return None
    # After a time limit with an incumbent `status` says optimal; only `sol_status` tells.
    proved = problem.sol_status == pulp.LpSolutionOptimal
    found = np.array([(variable.value() or 0.0) > 0.5 for variable in variables], np.bool_)
    fallback = greedy(packing)
    choices = {"HiGHS": found, "greedy by uses a byte": fallback}
    kept = {name: chosen for name, chosen in choices.items() if packing.fits(chosen)}
    if not kept:
        return None
    method = max(kept, key=lambda name: packing.value(kept[name]))
    value = packing.value(kept[method])
    proved = proved and "HiGHS" in kept
    bound = value if proved else max(value, min(fractional_bound(packing), _dual_bound(problem)))
    return Packed(chosen=kept[method], bound=bound, proved=proved, method=method)


def _program(packing: Packing) -> tuple[Any, list[Any]]:
    import pulp

    problem = pulp.LpProblem("residency", pulp.LpMaximize)
    variables = [
        problem.add_variable(f"x{item}", cat="Binary") for item in range(len(packing.uses))
    ]
    # Bytes in units of their greatest common divisor keep the numbers small.
    unit = gcd(*packing.nbytes.tolist())
    sizes = (packing.nbytes // unit).tolist()
    problem += pulp.LpAffineExpression(zip(variables, packing.uses.tolist(), strict=True))
    for memory in np.flatnonzero(np.isfinite(packing.capacity)).tolist():
        items = np.flatnonzero(packing.held[:, memory]).tolist()
        terms = [(variables[item], sizes[item]) for item in items]
        problem += pulp.LpAffineExpression(terms) <= int(packing.capacity[memory]) // unit
    for floor in packing.floors:
        members = [(variables[item], 1) for item in floor.members.tolist()]
        problem += pulp.LpAffineExpression(members) >= floor.least
    return problem, variables


def _dual_bound(problem: Any) -> float:
    """HiGHS's bound on the uses; infinite where it has none."""
    try:
        # The program is handed over as a minimisation of the negative.
        bound = float(problem.solverModel.getInfo().mip_dual_bound)
    except (AttributeError, TypeError, ValueError):
        return float("inf")
    return abs(bound) if np.isfinite(bound) else float("inf")


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep the solver's banner, which it prints whatever it is told, off standard output."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
