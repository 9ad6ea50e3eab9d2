"""Counts of which experts follow which, from a layer to each of the next few.

Knows no predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.history import RunHistory, multi_hot
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.rates import Rates, shrunk
from moe_runtime.predictors.replay import chosen_experts
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["REACH", "PairTables"]

REACH = 4  # layers ahead that have a table of their own

Array: TypeAlias = NDArray[Any]


class PairTables:
    """For each distance and layer the share of tokens with expert i that choose expert j there.

    Args:
        grid: the layers and experts.
        shares: by distance - 1 and position of the later layer float32 `[E before, E]`; where
            there is no such layer before, `[0, E]`.
        weights: of the same nesting float32 `[E before, 1]`: trials that the shares weigh.
    """

    def __init__(
        self,
        grid: ExpertGrid,
        shares: Sequence[Sequence[Array]],
        weights: Sequence[Sequence[Array]],
    ) -> None:
        self.grid = grid
        self._rates = [Rates(s, w) for s, w in zip(shares, weights, strict=True)]

    @classmethod
    def make(
        cls,
        origin: Origin,
        trace: RoutingTrace | None,
        popularity: Sequence[Array],
        strength: float,
        cap: float,
    ) -> PairTables:
        """Of a trace; of None tables that say what popularity does.

        Args:
            origin: the model.
            trace: rows that ran; each layer's choices follow those of the layers before.
            popularity: for each layer the shares `[E]` that rare experts are drawn to.
            strength: how many trials these weigh.
            cap: how many trials a fitted share weighs against the run's at the most.
        """
        layers = range(len(origin.layer_ids))
        hot = [
            None if trace is None else multi_hot(chosen_experts(trace, at), origin.experts[at])
            for at in layers
        ]
        shares: list[list[Array]] = []
        weights: list[list[Array]] = []
        for distance in range(1, REACH + 1):
            shares.append([])
            weights.append([])
            for at in layers:
                count, before = origin.experts[at], at - distance
                rows = origin.experts[before] if before >= 0 else 0
                pairs: Array = np.zeros((rows, count), np.float32)
                trials: Array = np.zeros((rows, 1), np.float32)
                first, second = hot[before] if before >= 0 else None, hot[at]
                if first is not None and second is not None:
                    pairs = first.T @ second
                    trials = first.sum(axis=0)[:, None]
                share = shrunk(pairs, trials, popularity[at][None], strength)
                shares[-1].append(np.minimum(share, 1.0).astype(np.float32))
                weights[-1].append(np.minimum(trials + strength, cap).astype(np.float32))
        return cls(origin.grid, shares, weights)

    def reset(self) -> None:
        """Forget the run. Mutates."""
        for rates in self._rates:
            rates.reset()

    def learn(self, history: RunHistory, position: int) -> None:
        """A layer has been observed: count its pairs with the layers before. Mutates."""
        after = history.chosen[position]
        for distance, rates in enumerate(self._rates, start=1):
            before = history.chosen.get(position - distance)
            if before is None:
                continue
            if len(after) == 1:
                rates.count_pairs(position, before[0][before[0] >= 0], after[0][after[0] >= 0])
                continue
            first = multi_hot(before, self.grid.experts[position - distance])
            second = multi_hot(after, self.grid.experts[position])
            rates.count(position, first.T @ second, first.sum(axis=0)[:, None])

    def share(self, history: RunHistory, position: int) -> Array | None:
        """float32 `[T, E]`: the mean share over the experts chosen at the newest layer.

        None if no layer within reach has been observed in this step.
        """
        newest = history.newest
        distance = position - newest
        if newest < 0 or not 1 <= distance <= REACH:
            return None
        chosen = history.chosen[newest]
        rates = self._rates[distance - 1]
        if len(chosen) == 1 and (chosen >= 0).all():
            mean: Array = rates.of(position, chosen[0]).mean(axis=0, keepdims=True)
            return mean
        hot = multi_hot(chosen, self.grid.experts[newest])
        return np.asarray((hot @ rates.of(position)) / np.maximum(hot.sum(axis=1), 1)[:, None])

    def to_arrays(self) -> dict[str, Array]:
        """Their part of a predictor file: all cells one after another."""
        return {
            "pairs": np.concatenate([s.ravel() for r in self._rates for s in r.prior]),
            "pair_weights": np.concatenate([np.ravel(w) for r in self._rates for w in r.weight]),
        }

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays) -> PairTables:
        """Again; PredictorError if they are none of this model."""
        before = [
            [origin.experts[at - distance] if at >= distance else 0 for at in _layers(origin)]
            for distance in range(1, REACH + 1)
        ]
        cells = sum(b * e for row in before for b, e in zip(row, origin.experts, strict=True))
        pairs = take_array(arrays, "pairs", (cells,), np.float32)
        held = take_array(arrays, "pair_weights", (sum(map(sum, before)),), np.float32)
        if (pairs < 0).any() or (pairs > 1).any() or (held <= 0).any():
            raise PredictorError("pairs must be shares of 0 to 1 with weights above 0")
        shares: list[list[Array]] = []
        weights: list[list[Array]] = []
        cell = row = 0
        for counts in before:
            shares.append([])
            weights.append([])
            for rows, experts in zip(counts, origin.experts, strict=True):
                shares[-1].append(pairs[cell : cell + rows * experts].reshape(rows, experts))
                weights[-1].append(held[row : row + rows].reshape(rows, 1))
                cell, row = cell + rows * experts, row + rows
        return cls(origin.grid, shares, weights)


def _layers(origin: Origin) -> range:
    return range(len(origin.layer_ids))
