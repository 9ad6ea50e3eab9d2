"""The two forecasts that need no fitting: as the token before, as the layer before.

Their values are no probabilities: 1 for what was chosen last, .5 for what was chosen before that.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.history import KEPT_SEQUENCES, RunHistory, multi_hot

from moe_runtime.core import ExpertGrid, IntArray

__all__ = ["AsLayerBefore", "AsTokenBefore"]


class _Repeating:
    """Remembers the run; what is repeated is the kind's."""

    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, grid: ExpertGrid) -> None:
        self.grid = grid
        self.history = RunHistory(grid)

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`."""
        self.history.begin_step(rows)

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """See `Predictor`."""
        del hidden
        self.history.observe(position, topk_ids)

    def reset(self) -> None:
        """See `Predictor`."""
        self.history.reset()

    def hot(self, position: int, ids: IntArray) -> Probabilities:
        """float32 `[T, E]`; experts that the layer does not have are left out."""
        experts = self.grid.experts[position]
        return multi_hot(np.where(ids < experts, ids, -1), experts)


class AsTokenBefore(_Repeating):
    """The experts that the sequence's token before chose at the layer, then the one before it."""

    name: ClassVar[str] = "as the token before"

    def __init__(self, grid: ExpertGrid) -> None:
        super().__init__(grid)
        self._earlier: OrderedDict[tuple[int, int], IntArray] = OrderedDict()

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """See `Predictor`."""
        if self.history.rows.decode:  # what is the token before now is the one before it next
            before = self.history.previous(position)
            for row, sequence in enumerate(self.history.rows.sequence_ids.tolist()):
                self._earlier[sequence, position] = before[row]
                self._earlier.move_to_end((sequence, position))
            while len(self._earlier) > KEPT_SEQUENCES * len(self.grid.layers):
                self._earlier.popitem(last=False)
        super().observe(position, topk_ids, hidden)

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`, but for calibration."""
        result = self.hot(position, self.history.previous(position))
        for row, sequence in enumerate(self.history.rows.sequence_ids.tolist()):
            earlier = self._earlier.get((sequence, position))
            if earlier is not None and self.history.rows.decode:
                result[row] = np.maximum(result[row], 0.5 * self.hot(position, earlier[None])[0])
        return result

    def reset(self) -> None:
        """See `Predictor`."""
        super().reset()
        self._earlier.clear()


class AsLayerBefore(_Repeating):
    """The experts of the same numbers as at the layer observed last, then the one before it."""

    name: ClassVar[str] = "as the layer before"

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`, but for calibration."""
        chosen = self.history.chosen
        newest = self.history.newest
        result = np.zeros((len(self.history.rows), self.grid.experts[position]), np.float32)
        if newest in chosen:
            result = self.hot(position, chosen[newest])
        if newest - 1 in chosen:
            result = np.maximum(result, 0.5 * self.hot(position, chosen[newest - 1]))
        return result
