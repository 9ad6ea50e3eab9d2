"""`FittedPredictor`: what all predictors share that are fitted to traces and learn on in a run.

Knows how constants are chosen and probabilities calibrated, not what is learnt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.calibration import Calibration, fit_calibration, log_loss
from moe_runtime.predictors.files import Arrays
from moe_runtime.predictors.history import RunHistory, multi_hot
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.replay import as_decode, replay
from moe_runtime.predictors.traces import first_half, joined, require_token_ids
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["Constants", "FittedPredictor", "positive"]

Constants = Mapping[str, Any]

CHOICE_ROWS = 256  # held-out rows on which constants are compared
CALIBRATION_ROWS = 1536  # and on which probabilities are calibrated


class FittedPredictor:
    """Fitted to traces, learning on from the run that it serves; meets `StoredPredictor`.

    A kind says how it is made of a trace (`make`), how it learns (`learn`, `forget`) and what it
    scores (`score`).

    Args:
        origin: the model, and what it was fitted to.
        constants: those of the kind; plain data.
        calibration: from scores to probabilities; None if scores are taken as they are.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    candidates: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    reach: ClassVar[int] = 1  # distances at which it scores differently, so is calibrated apart

    def __init__(
        self, origin: Origin, constants: Constants, calibration: Calibration | None = None
    ) -> None:
        self.origin = origin
        self.grid = origin.grid
        self.constants = dict(constants)
        self.calibration = calibration
        self.history = RunHistory(self.grid)

    # -- what a kind says ------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """Made of a trace with these constants; of None one that knows nothing yet."""

    @abstractmethod
    def learn(self, position: int, topk_ids: IntArray) -> None:
        """A layer has been observed, and `history` knows of it. Mutates."""

    @abstractmethod
    def forget(self) -> None:
        """Forget the run. Mutates."""

    @abstractmethod
    def score(self, position: int) -> NDArray[Any]:
        """`[T, E]`, about the probabilities."""

    @abstractmethod
    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """What was fitted, without the calibration."""

    @classmethod
    @abstractmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """Made again of `fitted_arrays` and the constants; raises as `StoredPredictor` says."""

    @classmethod
    def choose(cls, origin: Origin, known: RoutingTrace, held: RoutingTrace) -> Constants:
        """The constants of `candidates` under which held-out rows are likeliest."""
        if len(cls.candidates) == 1:
            return cls.candidates[0]
        trials = [cls.make(origin, known, constants) for constants in cls.candidates]
        return min(trials, key=lambda one: _loss(one, held[:CHOICE_ROWS])).constants

    # -- what is the same for all ----------------------------------------------------------------

    @classmethod
    def fit(cls, traces: Sequence[RoutingTrace]) -> Self:
        """Fitted to traces of one model, taken token by token as decoding would see them.

        One half of the sequences chooses the constants of a predictor made of the other half, and
        calibrates it. Then all is used.

        Raises:
            PredictorError: no rows, or no token ids where they are needed.
            TraceError: traces of different models or layers.
        """
        origin = Origin.of(traces)
        if cls.needs_token_ids:
            require_token_ids(traces, cls.kind)
        trace = as_decode(joined(traces))
        half = first_half(trace)
        known, held = trace.select(rows=half), trace.select(rows=~half)
        if not len(held):
            return cls.make(origin, trace, cls.candidates[0])
        constants = cls.choose(origin, known, held)
        trial = cls.make(origin, known, constants)
        calibration = fit_calibration(trial, held[:CALIBRATION_ROWS], cls.reach)
        found = cls.make(origin, trace, constants)
        found.calibration = calibration
        return found

    @classmethod
    def unfitted(cls, origin: Origin) -> Self:
        """That knows nothing yet and learns from its run alone."""
        return cls.make(origin, None, cls.candidates[0])

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`."""
        self.history.begin_step(rows)

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """See `Predictor`. PredictorError if the rows or the experts are not the model's."""
        del hidden
        self.history.observe(position, topk_ids)
        self.learn(position, topk_ids)

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`."""
        scores: Probabilities = np.clip(self.score(position), 0.0, 1.0).astype(np.float32)
        if self.calibration is None:
            return scores
        return self.calibration(position, position - self.history.newest, scores)

    def reset(self) -> None:
        """See `Predictor`."""
        self.history.reset()
        self.forget()

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """See `StoredPredictor`."""
        arrays = self.fitted_arrays()
        if self.calibration is not None:
            arrays |= self.calibration.to_arrays()
        return arrays, dict(self.constants)

    @classmethod
    def from_arrays(cls, origin: Origin, arrays: Arrays, constants: Mapping[str, Any]) -> Self:
        """See `StoredPredictor`."""
        found = cls.of_arrays(origin, arrays, constants)
        found.calibration = Calibration.of_arrays(arrays, len(origin.layer_ids), cls.reach)
        return found

    def rows_hot(self, position: int, topk_ids: IntArray) -> Probabilities:
        """float32 `[T, E]`: 1 where an expert of the layer is among the chosen `[T, K]`."""
        return multi_hot(topk_ids, self.grid.experts[position])


def positive(constants: Mapping[str, Any], name: str) -> float:
    """The constant of this name; PredictorError unless it is a finite number above 0."""
    value = constants[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise PredictorError(f"constant {name!r} must be a number above 0, found {value!r}")
    return float(value)


def _loss(predictor: FittedPredictor, held: RoutingTrace) -> float:
    """Mean log loss of the forecasts of held-out rows."""
    losses = [
        log_loss(one.probabilities, predictor.rows_hot(one.position, one.topk_ids))
        for one in replay(predictor, held)
    ]
    return float(np.mean(losses))
