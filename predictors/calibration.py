"""Calibration: a monotone map from scores to probabilities, for each layer and distance.

Knows no predictor beyond what it forecast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from moe_runtime.predictors.base import Predictor, Probabilities
from moe_runtime.predictors.files import take_array
from moe_runtime.predictors.history import multi_hot
from moe_runtime.predictors.replay import replay
from numpy.typing import NDArray

from moe_runtime.core import FloatArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["Calibration", "calibration_of", "fit_calibration", "log_loss", "monotone"]

KNOTS = 24
LEAST = 1e-5  # no outcome is called impossible
PRIOR = 2.0  # what a knot's own score weighs against the outcomes around it


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Piecewise linear maps from score to probability; they never decrease.

    Order is kept, so recall at k is what it was (equal values may appear).

    Args:
        scores: float32 `[L, D, knots]`, ascending, of each layer and distance 1..D; greater
            distances use the last.
        probabilities: float32 of the same shape, never decreasing, 0 to 1.
    """

    scores: NDArray[np.float32]
    probabilities: NDArray[np.float32]

    def __call__(self, position: int, distance: int, scores: Probabilities) -> Probabilities:
        """Calibrated, of the shape of `scores`."""
        at = min(distance, self.scores.shape[1]) - 1
        x, y = self.scores[position, at], self.probabilities[position, at]
        result: Probabilities = np.interp(scores, x, y).astype(np.float32)
        return result

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Its part of a predictor file."""
        return {
            "calibration.scores": self.scores,
            "calibration.probabilities": self.probabilities,
        }

    @classmethod
    def of_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], layers: int, reach: int
    ) -> Calibration | None:
        """Again; None if the file holds none. PredictorError if the maps are no such maps."""
        if "calibration.scores" not in arrays:
            return None
        shape = (layers, reach, None)
        scores = take_array(arrays, "calibration.scores", shape, np.float32)
        y = take_array(arrays, "calibration.probabilities", scores.shape, np.float32)
        falling = (np.diff(scores) < 0).any() or (np.diff(y) < 0).any()
        if not scores.shape[2] or falling or y.min() < 0 or y.max() > 1:
            raise PredictorError(
                "the calibration's knots must ascend and its probabilities lie in 0 to 1"
            )
        return cls(scores=scores, probabilities=y)


def fit_calibration(predictor: Predictor, trace: RoutingTrace, reach: int) -> Calibration:
    """Of a predictor's forecasts of rows that it was not fitted to, at distances 1 to `reach`.

    Isotonic regression (pool adjacent violators) on `KNOTS` groups of about equal weight, each
    drawn a little to its own mean score so that few outcomes change little.
    """
    parts: dict[tuple[int, int], list[tuple[Any, Any]]] = {}
    for one in replay(predictor, trace, reach):
        hot = multi_hot(one.topk_ids, trace.experts[one.position])
        key = (one.position, one.distance)
        parts.setdefault(key, []).append((one.probabilities.ravel(), hot.ravel()))
    seen = {
        key: (np.concatenate([s for s, _ in pairs]), np.concatenate([y for _, y in pairs]))
        for key, pairs in parts.items()
    }
    return calibration_of(seen, len(trace.layer_ids), reach)


def calibration_of(
    seen: Mapping[tuple[int, int], tuple[Probabilities, Probabilities]], layers: int, reach: int
) -> Calibration:
    """Of scores and outcomes, both `[n]`, by position and distance, as `fit_calibration` does."""
    x = np.tile(np.linspace(0, 1, KNOTS, dtype=np.float32), (layers, reach, 1))
    y = x.copy()
    for (position, distance), (scores, outcomes) in seen.items():
        x[position, distance - 1], y[position, distance - 1] = _knots(scores, outcomes)
    for position in range(layers):  # a layer is never further from the start than its place
        for distance in range(1, reach):
            if (position, distance + 1) not in seen:
                x[position, distance] = x[position, distance - 1]
                y[position, distance] = y[position, distance - 1]
    return Calibration(scores=x, probabilities=y)


def monotone(values: FloatArray, weights: FloatArray) -> FloatArray:
    """The never decreasing values `[n]` nearest to these in weighted squares.

    Pool adjacent violators (Ayer et al., 1955).
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, mass, length = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, more, count = blocks.pop()
            mean = (mean * mass + before * more) / (mass + more)
            mass, length = mass + more, length + count
        blocks.append((mean, mass, length))
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks])


def log_loss(probabilities: Probabilities, outcomes: Probabilities) -> float:
    """Mean negative log-likelihood of outcomes 0 or 1, of the same shape."""
    p = np.clip(probabilities, LEAST, 1 - LEAST)
    return float(-np.mean(np.where(outcomes > 0, np.log(p), np.log1p(-p))))


def _knots(scores: Probabilities, outcomes: Probabilities) -> tuple[FloatArray, FloatArray]:
    """Scores and probabilities `[KNOTS]` of one map."""
    order = np.argsort(scores, kind="stable")
    scores, outcomes = scores[order].astype(np.float64), outcomes[order].astype(np.float64)
    # Groups of equal shares of the summed score: most entries are near 0, what counts is not.
    mass = np.cumsum(scores + 1.0 / len(scores))
    group = np.minimum((mass / mass[-1] * KNOTS).astype(np.int64), KNOTS - 1)
    size = np.bincount(group, minlength=KNOTS).astype(np.float64)
    held = size > 0
    mean = np.bincount(group, scores, KNOTS)[held] / size[held]
    share = (np.bincount(group, outcomes, KNOTS)[held] + PRIOR * mean) / (size[held] + PRIOR)
    y = np.clip(monotone(share, size[held] + PRIOR), LEAST, 1.0)
    at = np.linspace(0, len(mean) - 1, KNOTS)
    spread = np.interp(at, np.arange(len(mean)), mean)
    return spread, np.interp(at, np.arange(len(mean)), y)
