"""Running HiGHS and CBC on a PuLP problem, and what of their answers can be believed.

Knows no placement.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import ConfigError, PlanError

__all__ = ["SOLVERS", "Answer", "check_solver", "run"]

SOLVERS = ("highs", "cbc")
_SHORTEST = 0.01  # seconds; CBC takes 0 for no limit


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a solver said. The values are in the problem's variables.

    Args:
        has_solution: whether the values are a solution.
        proved: whether it is optimal.
        infeasible: whether there is none.
        bound: the dual bound; None where the solver tells none.
    """

    has_solution: bool
    proved: bool
    infeasible: bool
    bound: float | None


def check_solver(solver: str) -> None:
    """ConfigError unless the solver is one of `SOLVERS`."""
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")


def run(
    problem: Any,
    solver: str,
    *,
    time_limit: float,
    seed: int,
    start: dict[Any, float] | None,
) -> Answer:
    """Solve a `pulp.LpProblem` whose objective is minimised.

    Args:
        time_limit: seconds of the solver's own.
        start: the value of every variable in a known solution.

    Raises:
        PlanError: the solver failed.
    """
    import pulp

    for variable, value in (start or {}).items():
        variable.setInitialValue(value)
    limit = max(time_limit, _SHORTEST)
    make = _highs if solver == "highs" else _cbc
    try:
        with _quiet():
            problem.solve(make(limit, seed, warm=start is not None))
    except pulp.PulpError as error:
        raise PlanError(f"the solver {solver} failed: {error}; try another solver") from error
    # `status` says "Optimal" after a time limit too; `sol_status` tells a proof from an incumbent.
    found = problem.sol_status
    bound = None
    if solver == "highs":
        bound = float(problem.solverModel.getInfo().mip_dual_bound)
        if not abs(bound) < 1e30:  # infinite, in HiGHS's way or IEEE's: not begun
            bound = None
    return Answer(
        has_solution=found in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible),
        proved=found == pulp.LpSolutionOptimal,
        infeasible=problem.status == pulp.LpStatusInfeasible,  # CBC's sol_status does not say
        bound=bound,
    )


def _highs(limit: float, seed: int, *, warm: bool) -> Any:
    import pulp

    class WarmHiGHS(pulp.HiGHS):  # type: ignore[misc]
        """PuLP's HiGHS takes no warm start; the solver below it does."""

        def callSolver(self, lp: Any) -> None:  # noqa: N802  PuLP's name
            if warm:
                variables = lp.variables()
                lp.solverModel.setSolution(
                    len(variables),
                    [variable.index for variable in variables],
                    [variable.varValue for variable in variables],
                )
            lp.solverModel.run()

    return WarmHiGHS(
        msg=False,
        timeLimit=limit,
        threads=1,
        gapRel=0.0,
        random_seed=seed % 2**31,
        mip_feasibility_tolerance=1e-9,
    )


def _cbc(limit: float, seed: int, *, warm: bool) -> Any:
    import pulp

    # PULP_CBC_CMD is this command with this path, and a warning that it will go.
    return pulp.COIN_CMD(
        path=pulp.PULP_CBC_CMD.pulp_cbc_path,
        msg=False,
        timeLimit=limit,
        gapRel=0.0,
        warmStart=warm,
        options=[f"randomCbcSeed {seed % 2**31}"],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that a solver prints reaches standard output: HiGHS prints a banner whatever is set.

    Redirects the descriptor, so other threads' output is lost too.
    """
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # closed: nothing to keep clean
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        with suppress(OSError, AttributeError):  # what C's own buffer holds goes there too
            ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
