"""How much a trace is smoothed before a plan is fitted to it, and what little data can carry.

A short trace over-counts what it happened to be about. Smoothing trusts repeated tokens less, tames
cells that few tokens filled, and lets layers further apart speak too. Whether that helps is decided
by fitting on some sequences and measuring on the others. Knows nothing of time limits or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from moe_runtime.placement.affinity import Affinity, affinity_of, repeated_tokens

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace

__all__ = ["LEVELS", "Smoothing", "choose_smoothing", "folds"]

_MOST_TOKENS = 20_000  # above, counts carry themselves


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """One way to count.

    Args:
        name: how it is called.
        lag_weights: weight of pairs of layers 1, 2, ... apart.
        power: counts are raised to it.
        repeats: whether tokens count less the more often they occur.
    """

    name: str
    lag_weights: tuple[float, ...] = (1.0,)
    power: float = 1.0
    repeats: bool = False

    def count(
        self, trace: RoutingTrace, *, weighted: bool = False, within: bool = True
    ) -> Affinity:
        """The counts of a trace, before the power."""
        return affinity_of(
            trace,
            weighted=weighted,
            lags=len(self.lag_weights),
            token_weights=repeated_tokens(trace) if self.repeats else None,
            within=within,
        )


# From weak to strong.
LEVELS = {
    level.name: level
    for level in (
        Smoothing(name="none"),
        Smoothing(name="some", lag_weights=(1.0, 0.3), power=0.8, repeats=True),
        Smoothing(name="strong", lag_weights=(1.0, 0.5, 0.25), power=0.6, repeats=True),
    )
}


def folds(trace: RoutingTrace, count: int = 4) -> list[IntArray]:
    """Rows of the parts that are held out in turn: whole sequences, or runs of rows of a few.

    Returns:
        int64 row numbers of each part; the parts cover the trace.
    """
    sequences, inverse = np.unique(trace.sequence_ids, return_inverse=True)
    if len(sequences) >= 3:
        part = inverse % min(count, len(sequences))
    else:
        part = np.arange(len(trace)) * count // max(len(trace), 1)
    parts = [np.flatnonzero(part == number) for number in range(int(part.max(initial=0)) + 1)]
    return [rows for rows in parts if len(rows)]


def choose_smoothing(
    trace: RoutingTrace,
    fit: Callable[[RoutingTrace, Smoothing], Callable[[RoutingTrace], float]],
) -> tuple[Smoothing, dict[str, float]]:
    """The strongest level whose plans are as good as the best on what they were not fitted to.

    As good: within one standard error of the difference over the parts (the usual rule for
    choosing a penalty). Parts of one recording resemble each other more than tomorrow's tokens
    will, so that the best itself would smooth too little.

    Args:
        fit: makes a plan from a trace with a level, and gives a function that measures its cost on
            another trace.

    Returns:
        The level, and the mean held-out cost of each level that was tried (none for long traces,
        which are not smoothed).
    """
    if len(trace) > _MOST_TOKENS:
        return LEVELS["none"], {}
    parts = list(_splits(trace))
    if not parts:
        return LEVELS["none"], {}
    costs = {
        name: np.array([fit(train, level)(test) for train, test in parts])
        for name, level in LEVELS.items()
    }
    means = {name: float(each.mean()) for name, each in costs.items()}
    best = min(means, key=lambda name: means[name])
    for name in reversed(LEVELS):  # strongest first
        behind = costs[name] - costs[best]
        if behind.mean() <= behind.std(ddof=1) / np.sqrt(len(parts)):
            return LEVELS[name], means
    return LEVELS[best], means


def _splits(trace: RoutingTrace) -> Iterator[tuple[RoutingTrace, RoutingTrace]]:
    parts = folds(trace)
    if len(parts) < 2:
        return
    for rows in parts:
        rest = np.setdiff1d(np.arange(len(trace)), rows)
        yield trace.select(rows=rest), trace.select(rows=rows)


def level_called(name: str) -> Smoothing:
    """The level of a name; PlanError lists the known ones."""
    if name not in LEVELS:
        raise PlanError(f"unknown smoothing {name!r}; known: auto, {', '.join(LEVELS)}")
    return LEVELS[name]
