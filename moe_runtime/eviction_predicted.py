"""`Predicted`: an eviction policy that ranks by predicted next use, with or without a predictor.

Knows nothing of slots, tiers, tensors or of how a predictor comes to its probabilities.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import ConfigError
from moe_runtime.eviction_learned import Echo, EchoConstants
from moe_runtime.selection import lowest_few

__all__ = ["Predicted"]

_TINY = 1e-30  # keeps the logarithm finite where a use is excluded and nothing else is known


class Predicted(Echo):
    """`Echo`, listening to a predictor besides: keeps what is expected to be used soonest.

    Alone it gives the keep-values of `Echo`, `log worth - order * (passes until its layer)`, from
    the run's own past. Where a predictor gives a probability `P` for the coming step of the
    expert's layer (`expect`), that step is split off:

        keep-value = log(certain * P + (1 - P) * worth) - order * (passes until its layer)

    so that a certain use is worth `certain`, whatever the past says, and among certain uses the
    soonest is worth most. It is deterministic and starts knowing nothing.

    Args:
        grid: numbering of the experts.
        constants: those of `Echo`.
        certain: worth of a use that is predicted for certain, in discounted uses, above 0.
    """

    name: ClassVar[str] = "predicted"

    def __init__(
        self, grid: ExpertGrid, constants: EchoConstants | None = None, certain: float = 8.0
    ) -> None:
        super().__init__(grid, constants)
        if not 0 < certain < np.inf:
            raise ConfigError(f"predicted: certain has to be above 0 and finite, found {certain}")
        self._certain = certain
        self._expected = np.full(grid.size, np.nan)
        self._told = False  # whether anything is expected
        self._past = np.full(grid.size, np.log(_TINY))  # log worth when its layer was passed

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        start, stop = self._bounds[position]
        self._expected[start:stop] = np.nan  # it has come true or not
        super().observe(position, experts, tokens)
        due = self._constants.order * (self._clock + 1 + self._due[start])
        self._past[start:stop] = self._value[start:stop] + due

    def expect(self, values: FloatArray) -> None:
        """Take in a predictor's probabilities, in place of those of earlier calls. Mutates.

        They hold for the next step of each expert's layer, until `observe` is told of it: for
        layers that the present pass has still to come to, use within this pass; for the others,
        which a predictor of the present pass does not know, use in the next.

        Args:
            values: float `[grid.size]`, by dense index, 0 to 1; NaN where nothing is known.

        Raises:
            ConfigError: another shape, or a number outside 0 to 1. Nothing is changed then.
        """
        if values.shape != self._expected.shape:
            raise ConfigError(
                f"predicted: expectations need one number for each of the {len(self._expected)} "
                f"experts, found shape {values.shape}"
            )
        given = values[~np.isnan(values)]
        if len(given) and not 0 <= given.min() <= given.max() <= 1:
            raise ConfigError(
                "predicted: expectations are probabilities from 0 to 1, found "
                f"{given.min()} to {given.max()}; NaN stands for unknown"
            )
        changed = np.flatnonzero(~(np.isnan(self._expected) & np.isnan(values)))
        self._expected[:] = values
        self._told = len(given) > 0
        due = self._due[changed] + self._passed(changed) + self._clock
        self._value[changed] = (
            self._blend(self._past[changed], changed) - self._constants.order * due
        )

    def rank(self, candidates: IntArray) -> FloatArray:
        values = self._value[candidates]
        if not len(self._echo):
            return values
        doubtful, lowest = self._constants.doubtful, np.arange(len(candidates))
        if len(candidates) > doubtful:
            lowest = lowest_few(values, doubtful)
        # Which are valued anew, and in which order, must not depend on the order of `candidates`.
        lowest = lowest[np.lexsort((candidates[lowest], values[lowest]))[:doubtful]]
        values[lowest] = self._value_now(candidates[lowest])
        return values

    def _worth(self, heard: NDArray[np.float32], experts: slice | IntArray) -> FloatArray:
        worth = super()._worth(heard, experts)
        # A layer just passed, which is a slice, has no expectations yet.
        return worth if isinstance(experts, slice) else self._blend(worth, experts)

    def _blend(self, worth: FloatArray, experts: IntArray) -> FloatArray:
        """Log worth of these experts with what is expected of them; `worth` is from the past."""
        if not self._told:
            return worth
        chance = self._expected[experts]
        blended = np.log(self._certain * chance + (1.0 - chance) * np.exp(worth) + _TINY)
        return np.where(np.isnan(chance), worth, blended)

    def _passed(self, experts: IntArray) -> NDArray[np.bool_]:
        """Whether the present pass is past their layers; true of all before the first pass."""
        if self._clock == 0:
            return np.ones(len(experts), np.bool_)
        return experts < self._bounds[self._position][1]
