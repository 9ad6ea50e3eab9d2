"""`Rates`: shares that were fitted and a run's own counts, combined by how much each has seen.

Knows no predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["STRENGTHS", "Rates", "shrunk"]

Array: TypeAlias = NDArray[Any]

# Candidates for how many observations a fitted share weighs; the most likely one is taken.
STRENGTHS = (4.0, 32.0, 256.0, 2048.0)


def shrunk(hits: Array, trials: Array | float, prior: Array, strength: Array | float) -> Array:
    """Shares of `hits` in `trials`, drawn to a prior that weighs as much as `strength` trials.

    The posterior mean of a beta prior; add-one smoothing where `strength` is one.
    """
    result: Array = (hits + strength * prior) / (trials + strength)
    return result


class Rates:
    """Shares by layer: of the times that something happened, how often an expert was chosen.

    Args:
        prior: for each layer the fitted shares, any shape.
        weight: for each layer, broadcast against it, how many trials these weigh against a run's.
    """

    def __init__(self, prior: Sequence[Array], weight: Sequence[Array | float]) -> None:
        self.prior = tuple(prior)
        self.weight = tuple(weight)
        self.reset()

    def reset(self) -> None:
        """Forget the run. Mutates."""
        self._hits = [np.array(w * p) for p, w in zip(self.prior, self.weight, strict=True)]
        self._trials = [
            np.array(np.broadcast_to(w, _trial_shape(p, w)), dtype=p.dtype)
            for p, w in zip(self.prior, self.weight, strict=True)
        ]

    def count(self, position: int, hits: Array, trials: Array | float) -> None:
        """Add what a layer showed. Mutates."""
        self._hits[position] += hits
        self._trials[position] += trials

    def count_pairs(self, position: int, first: Array, second: Array) -> None:
        """Add one token's pairs to shares `[E before, E]`: experts chosen before and now. Mutates.

        Args:
            position: of the layer.
            first: int64 `[n]`, distinct.
            second: int64 `[m]`, distinct.
        """
        self._hits[position][first[:, None], second] += 1
        self._trials[position][first] += 1

    def of(self, position: int, index: Any = slice(None)) -> Array:
        """The shares of a layer, or those at an index of it."""
        result: Array = self._hits[position][index] / self._trials[position][index]
        return result


def _trial_shape(prior: Array, weight: Array | float) -> tuple[int, ...]:
    """Trials are counted for each expert, or for each row of pairs."""
    if np.ndim(weight) == 2:
        return np.shape(weight)
    return prior.shape if prior.ndim == 1 else (prior.shape[0], 1)
