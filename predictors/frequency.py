"""Popularity: experts are as likely as they were often chosen.

Knows no order of tokens or layers. The fall-back of all other predictors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.fitted import Constants, FittedPredictor, positive
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.rates import STRENGTHS, Rates, shrunk
from moe_runtime.predictors.replay import chosen_experts
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["PopularityPredictor", "popularity", "take_popularity"]

ADD_ONE = 1.0  # what the even share weighs where nothing was fitted, in tokens


class PopularityPredictor(FittedPredictor):
    """Each expert with the share of tokens that chose it, in training and in this run."""

    name: ClassVar[str] = "popularity"
    kind: ClassVar[str] = "popularity"
    candidates: ClassVar[tuple[dict[str, Any], ...]] = tuple({"strength": s} for s in STRENGTHS)

    def __init__(self, origin: Origin, constants: Constants, shares: Sequence[NDArray[Any]]):
        super().__init__(origin, constants)
        strength = positive(constants, "strength")
        self._rates = Rates(shares, [strength] * len(shares))

    @classmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        return cls(origin, constants, popularity(origin, trace))

    def learn(self, position: int, topk_ids: IntArray) -> None:
        """See `FittedPredictor`."""
        chosen = topk_ids[topk_ids >= 0]
        hits = np.bincount(chosen, minlength=self.grid.experts[position])
        self._rates.count(position, hits, len(topk_ids))

    def forget(self) -> None:
        """See `FittedPredictor`."""
        self._rates.reset()

    def score(self, position: int) -> NDArray[Any]:
        """See `FittedPredictor`."""
        return np.repeat(self._rates.of(position)[None], len(self.history.rows), axis=0)

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """See `FittedPredictor`."""
        return {"popularity": np.concatenate(self._rates.prior).astype(np.float32)}

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        return cls(origin, constants, take_popularity(origin, arrays))


def popularity(origin: Origin, trace: RoutingTrace | None) -> list[NDArray[np.float64]]:
    """For each layer the share `[E]` of rows that chose each expert, add-one-smoothed to even."""
    shares = []
    for at, (count, k) in enumerate(zip(origin.experts, origin.top_k, strict=True)):
        even = np.full(count, k / count)
        if trace is None:
            shares.append(even)
            continue
        ids = chosen_experts(trace, at)
        hits = np.bincount(ids[ids >= 0], minlength=count)
        ran = int((ids >= 0).any(axis=1).sum())
        shares.append(np.minimum(shrunk(hits, ran, even, ADD_ONE), 1.0))
    return shares


def take_popularity(origin: Origin, arrays: Arrays) -> list[NDArray[np.float64]]:
    """The shares of a predictor file; PredictorError if they are none of this model."""
    shares = take_array(arrays, "popularity", (origin.grid.size,), np.float32).astype(np.float64)
    if (shares < 0).any() or (shares > 1).any():
        raise PredictorError(
            f"popularity must be shares of 0 to 1, found {shares.min()} to {shares.max()}"
        )
    return np.split(shares, origin.grid.offsets[1:])
