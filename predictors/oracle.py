"""Forecasts for comparison: the recorded run itself, right or partly wrong, and the layer before.

Nothing here is fitted, and none of it but the last can serve a real run: a trace says what comes.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.history import multi_hot
from moe_runtime.predictors.replay import chosen_experts, steps_of

from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["OraclePredictor", "PreGatePredictor", "PreviousLayerPredictor"]


class OraclePredictor:
    """Forecasts what the trace says, with certainty, for all layers of a call.

    Args:
        trace: the run that is served, call by call. Calls are recognised by their rows, so that a
            predictor that was not asked for a while finds its place again.
    """

    name: ClassVar[str] = "oracle"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    _call: int  # number of the present forward call, -1 before the first
    _newest: int  # position of the layer observed last in it, -1 before the first

    def __init__(self, trace: RoutingTrace) -> None:
        self.grid = trace.grid
        self._chosen = [chosen_experts(trace, position) for position in range(len(trace.experts))]
        self._calls = list(steps_of(trace))
        self.reset()

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`. PredictorError if the trace has no such call after the present one."""
        for call in range(self._call + 1, len(self._calls)):
            known = self._calls[call][0]
            if all(
                np.array_equal(getattr(known, name), getattr(rows, name))
                for name in ("token_ids", "positions")
            ):
                self._call, self._newest = call, -1
                return
        raise PredictorError(
            f"the {self.name} predictor knows one recorded run, and after its call {self._call} "
            f"none of it has these {len(rows)} tokens; use it on that run only"
        )

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """See `Predictor`."""
        del topk_ids, hidden
        self._newest = position

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`."""
        return multi_hot(self._recorded(position), self.grid.experts[position])

    def reset(self) -> None:
        """See `Predictor`."""
        self._call = -1
        self._newest = -1

    def _recorded(self, position: int) -> IntArray:
        """int64 `[T, K]` of the present call."""
        if self._call < 0:
            raise PredictorError(f"the {self.name} predictor is asked before a call has begun")
        return self._chosen[position][self._calls[self._call][1]]


class PreGatePredictor(OraclePredictor):
    """Stands in for the next layer's gate applied one layer early, whose input no trace holds.

    One layer ahead each of a token's experts is found with probability `recall`, and else another
    one is named in its place; farther ahead and before the first layer it says nothing. The errors
    are drawn anew for each token and layer, independently, where a real gate's have their pattern.

    Args:
        trace: the run that is served.
        recall: 0 to 1; also the probability that it gives to what it names.
        seed: of the errors.
    """

    name: ClassVar[str] = "pre-gated"

    def __init__(self, trace: RoutingTrace, recall: float, seed: int = 0) -> None:
        if not 0 <= recall <= 1:
            raise PredictorError(f"recall has to lie in 0..1, found {recall!r}")
        self._recall = recall
        self._seed = seed
        super().__init__(trace)

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`."""
        count = self.grid.experts[position]
        true = self._recorded(position)
        if self._newest < 0 or position != self._newest + 1:
            return np.zeros((len(true), count), np.float32)
        random = np.random.default_rng((self._seed, self._call, position))
        found = multi_hot(true, count)
        # The places of an order of all experts, the chosen ones last: a wrong name is one of the
        # first, so never an expert that the token did choose, and no two are the same.
        order = np.argsort(random.random(found.shape) + found, axis=1)
        wrong = (random.random(true.shape) >= self._recall) & (true >= 0)
        others = order[:, : true.shape[1]]
        others[:, max(count - true.shape[1], 0) :] = -1  # so many others there are not
        named = np.where(wrong, others, true)
        result: Probabilities = multi_hot(named, count) * np.float32(self._recall)
        return result


class PreviousLayerPredictor:
    """The experts that the newest layer chose, by number, again: ExpertFlow (He)'s baseline SLP."""

    name: ClassVar[str] = "previous layer"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    _newest: IntArray  # what was chosen last, [T, K]

    def __init__(self, grid: ExpertGrid) -> None:
        self.grid = grid
        self.reset()

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`."""
        self._newest = np.full((len(rows), 1), -1, np.int64)

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """See `Predictor`."""
        del position, hidden
        self._newest = topk_ids

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`. Numbers that the layer does not have are left out."""
        count = self.grid.experts[position]
        return multi_hot(np.where(self._newest < count, self._newest, -1), count)

    def reset(self) -> None:
        """See `Predictor`."""
        self._newest = np.full((0, 1), -1, np.int64)
