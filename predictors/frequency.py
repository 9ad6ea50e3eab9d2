"""Popularity: experts are as likely as they were often chosen.

Knows no order of tokens or layers. The fall-back of all other predictors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.fitting import (
    as_probabilities,
    best_strength,
    chosen_experts,
    first_half,
    joined,
    log_loss,
    shrunk,
)
from moe_runtime.predictors.history import RunHistory, multi_hot
from moe_runtime.predictors.origin import Origin
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["PopularityPredictor", "PopularityTable"]

FIT_ROWS = 4096  # rows that the weight of the prior is chosen on
UNFITTED = 1.0  # weight, in tokens, of the even prior where nothing was fitted: add-one


class PopularityTable:
    """Share of tokens that chose each expert: a fitted rate and a run's own counts, combined.

    Args:
        prior: for each layer the fitted rates `[E]`; a layer's sum is about its top-k.
        strength: how many tokens of the run weigh as much as the fitted rates.
    """

    def __init__(self, prior: Sequence[FloatArray], strength: float) -> None:
        self.prior = tuple(prior)
        self.strength = strength
        self.reset()

    def reset(self) -> None:
        """Forget the run. Mutates."""
        self._counts = [np.zeros(len(layer)) for layer in self.prior]
        self._tokens = [0] * len(self.prior)

    def observe(self, position: int, topk_ids: IntArray) -> None:
        """Count the choices `[T, K]` of a layer. Mutates."""
        chosen = topk_ids[topk_ids >= 0]
        self._counts[position] += np.bincount(chosen, minlength=len(self.prior[position]))
        self._tokens[position] += len(topk_ids)

    def rates(self, position: int) -> FloatArray:
        """`[E]`: the probability of each expert to be chosen by a token at a layer."""
        return shrunk(
            self._counts[position],
            np.float64(self._tokens[position]),
            self.prior[position],
            self.strength,
        )

    @classmethod
    def even(cls, origin: Origin) -> PopularityTable:
        """All experts of a layer alike."""
        return cls(_even(origin.experts, origin.top_k), UNFITTED)

    @classmethod
    def fit(cls, trace: RoutingTrace) -> PopularityTable:
        """Rates of a trace, and the weight that best carries them over to other sequences.

        The weight is the one of `STRENGTHS` under which one half of the sequences is likeliest,
        each taken as a run of its own with the rates of the other half as its prior.
        """
        half = first_half(trace)
        even = _even(trace.experts, trace.top_k)
        layers = range(len(trace.layer_ids))
        known = [
            _rates(chosen_experts(trace, at)[half], trace.experts[at], even[at]) for at in layers
        ]
        held = np.flatnonzero(~half)[:FIT_ROWS]
        starts = np.flatnonzero(np.diff(trace.sequence_ids[held], prepend=-1))
        outcomes = [
            multi_hot(chosen_experts(trace, at)[held], trace.experts[at]).astype(np.float64)
            for at in layers
        ]
        earlier = [_counts_before(hot, starts) for hot in outcomes]
        run = np.arange(len(held)) - np.repeat(starts, np.diff([*starts, len(held)]))

        def loss(strength: float) -> float:
            rows = run[:, None].astype(np.float64)
            return sum(
                log_loss(shrunk(earlier[at], rows, known[at][None], strength), outcomes[at])
                for at in layers
            )

        strength = best_strength(loss) if len(held) else UNFITTED
        prior = [_rates(chosen_experts(trace, at), trace.experts[at], even[at]) for at in layers]
        return cls(prior, strength)


class PopularityPredictor:
    """Each expert with the share of tokens that chose it, in training and in this run."""

    name: ClassVar[str] = "popularity"
    kind: ClassVar[str] = "popularity"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, origin: Origin, table: PopularityTable) -> None:
        self.origin = origin
        self.grid = origin.grid
        self._table = table
        self._history = RunHistory(self.grid)

    @classmethod
    def fit(cls, traces: Sequence[RoutingTrace]) -> Self:
        """Fitted to traces of one model. PredictorError without rows, TraceError if they differ."""
        return cls(Origin.of(traces), PopularityTable.fit(joined(traces)))

    @classmethod
    def unfitted(cls, origin: Origin) -> Self:
        """That knows nothing yet and learns from its run alone."""
        return cls(origin, PopularityTable.even(origin))

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`."""
        self._history.begin_step(rows)

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """See `Predictor`."""
        del hidden
        self._history.observe(position, topk_ids)
        self._table.observe(position, topk_ids)

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`."""
        rates = as_probabilities(self._table.rates(position))
        return np.repeat(rates[None], len(self._history.rows), axis=0)

    def reset(self) -> None:
        """See `Predictor`."""
        self._history.reset()
        self._table.reset()

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """See `StoredPredictor`."""
        return popularity_arrays(self._table)

    @classmethod
    def from_arrays(cls, origin: Origin, arrays: Arrays, constants: Mapping[str, Any]) -> Self:
        """See `StoredPredictor`."""
        return cls(origin, popularity_from(origin, arrays, constants))


def popularity_arrays(table: PopularityTable) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """A table's part of a predictor file."""
    rates = np.concatenate(table.prior).astype(np.float32)
    return {"popularity": rates}, {"popularity_strength": table.strength}


def popularity_from(
    origin: Origin, arrays: Arrays, constants: Mapping[str, Any]
) -> PopularityTable:
    """The table again; PredictorError if it is none of this model."""
    rates = take_array(arrays, "popularity", (origin.grid.size,), np.float32).astype(np.float64)
    strength = float(constants["popularity_strength"])
    if not 0 < strength < np.inf or (rates < 0).any() or (rates > 1).any():
        raise PredictorError(
            f"popularity must be 0 to 1 and its strength above 0, found {rates.min()} to "
            f"{rates.max()} and {strength}"
        )
    return PopularityTable(np.split(rates, origin.grid.offsets[1:]), strength)


def _even(experts: Sequence[int], top_k: Sequence[int]) -> list[FloatArray]:
    """For each layer the rates `[E]` of a router that favours no expert."""
    return [np.full(count, k / count) for count, k in zip(experts, top_k, strict=True)]


def _rates(ids: IntArray, experts: int, even: FloatArray) -> FloatArray:
    """Share of rows `[N, K]` that chose each expert, shrunk to even by one token."""
    counts = np.bincount(ids[ids >= 0], minlength=experts).astype(np.float64)
    return np.minimum(shrunk(counts, np.float64(len(ids)), even, UNFITTED), 1.0)


def _counts_before(outcomes: FloatArray, starts: IntArray) -> FloatArray:
    """For each row `[N, E]` the sum of the rows before it in its run; runs begin at `starts`."""
    before = np.cumsum(outcomes, axis=0) - outcomes
    lengths = np.diff([*starts, len(outcomes)])
    return before - np.repeat(before[starts], lengths, axis=0)
