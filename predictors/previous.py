"""Previous token: a sequence tends to keep the experts that its token before chose.

Knows no layer but the one that it forecasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.fitted import Constants, FittedPredictor, positive
from moe_runtime.predictors.frequency import popularity, take_popularity
from moe_runtime.predictors.history import multi_hot
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.rates import STRENGTHS, Rates, shrunk
from moe_runtime.predictors.replay import chosen_experts
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.trace import RoutingTrace

__all__ = ["PreviousTokenPredictor"]

UNFITTED_STAY = 0.3  # share of experts kept, before anything is known
ADD_ONE = 1.0


class PreviousTokenPredictor(FittedPredictor):
    """For each expert the share of tokens that keep it, and of those that take it up anew.

    Where the token before is not known (at a sequence's start, inside a prompt) it is popularity.
    """

    name: ClassVar[str] = "previous token"
    kind: ClassVar[str] = "previous-token"
    candidates: ClassVar[tuple[dict[str, Any], ...]] = tuple({"strength": s} for s in STRENGTHS)

    def __init__(
        self,
        origin: Origin,
        constants: Constants,
        shares: Sequence[NDArray[Any]],
        stay: Sequence[NDArray[Any]],
        fresh: Sequence[NDArray[Any]],
    ) -> None:
        super().__init__(origin, constants)
        weight = [positive(constants, "strength")] * len(shares)
        self._popularity = Rates(shares, weight)
        self._stay = Rates(stay, weight)
        self._fresh = Rates(fresh, weight)

    @classmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """See `FittedPredictor`. Rows stand in order of sequence and position."""
        shares = popularity(origin, trace)
        if trace is None:
            return cls(origin, constants, shares, [0 * s + UNFITTED_STAY for s in shares], shares)
        follows: NDArray[np.bool_] = np.asarray(np.diff(trace.sequence_ids, prepend=-1) == 0)
        follows &= np.diff(trace.positions, prepend=-2) == 1
        stay, fresh = [], []
        for at, count in enumerate(origin.experts):
            now = multi_hot(chosen_experts(trace, at), count).astype(np.float64)
            after, before = now[follows], now[np.flatnonzero(follows) - 1]
            kept, had = (before * after).sum(axis=0), before.sum(axis=0)
            mean = (kept.sum() + UNFITTED_STAY) / (had.sum() + 1)
            stay.append(shrunk(kept, had, np.full(count, mean), ADD_ONE))
            new = after.sum(axis=0) - kept
            fresh.append(np.minimum(shrunk(new, len(after) - had, shares[at], ADD_ONE), 1.0))
        return cls(origin, constants, shares, stay, fresh)

    def learn(self, position: int, topk_ids: IntArray) -> None:
        """See `FittedPredictor`."""
        now = self.rows_hot(position, topk_ids)
        self._popularity.count(position, now.sum(axis=0), len(now))
        previous = self.history.previous(position)
        known = (previous >= 0).any(axis=1)
        after, before = now[known], self.rows_hot(position, previous[known])
        kept, had = (before * after).sum(axis=0), before.sum(axis=0)
        self._stay.count(position, kept, had)
        self._fresh.count(position, after.sum(axis=0) - kept, len(after) - had)

    def forget(self) -> None:
        """See `FittedPredictor`."""
        for rates in (self._popularity, self._stay, self._fresh):
            rates.reset()

    def score(self, position: int) -> NDArray[Any]:
        """See `FittedPredictor`."""
        previous = self.history.previous(position)
        had = self.rows_hot(position, previous) > 0
        guess = np.where(had, self._stay.of(position), self._fresh.of(position))
        known = (previous >= 0).any(axis=1, keepdims=True)
        result: NDArray[Any] = np.where(known, guess, self._popularity.of(position))
        return result

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """See `FittedPredictor`."""
        parts = {"popularity": self._popularity, "stay": self._stay, "fresh": self._fresh}
        return {
            name: np.concatenate(rates.prior).astype(np.float32) for name, rates in parts.items()
        }

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        stay, fresh = (
            np.split(
                take_array(arrays, name, (origin.grid.size,), np.float32).astype(np.float64),
                origin.grid.offsets[1:],
            )
            for name in ("stay", "fresh")
        )
        return cls(origin, constants, take_popularity(origin, arrays), stay, fresh)
