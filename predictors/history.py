"""What a run has shown so far: the step under way, and each sequence's token before it.

Knows no predictor; all of them remember through it.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from moe_runtime.predictors.base import Probabilities, StepRows

from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import PredictorError

__all__ = ["NOTHING", "RunHistory", "multi_hot"]

NOTHING = -1  # an entry of chosen experts that names none
KEPT_SEQUENCES = 4096  # a sequence's end is not announced, so the oldest are forgotten


class RunHistory:
    """The routing of the step under way, layer by layer, and the last token of each sequence.

    Args:
        grid: the layers and experts.

    Attributes:
        rows: the tokens of the step under way; none before the first.
        chosen: int64 `[T, K]` of each layer of this step that has been observed, by position.
        newest: position of the layer observed last in this step, -1 before the first.
    """

    def __init__(self, grid: ExpertGrid) -> None:
        self.grid = grid
        self.reset()

    def reset(self) -> None:
        """Forget everything. Mutates."""
        none = np.zeros(0, np.int64)
        self.rows = StepRows(token_ids=none, sequence_ids=none, positions=none, decode=False)
        self.chosen: dict[int, IntArray] = {}
        self.newest = -1
        self._last: OrderedDict[int, dict[int, IntArray]] = OrderedDict()
        self._before: dict[int, dict[int, IntArray]] = {}
        self._first = np.zeros(0, np.bool_)

    def begin_step(self, rows: StepRows) -> None:
        """A forward call begins; the one before becomes the past. Mutates."""
        self._remember()
        self.rows = rows
        self.chosen = {}
        self.newest = -1
        self._first = np.diff(rows.sequence_ids, prepend=NOTHING) != 0
        self._before = {
            row: self._last.get(int(rows.sequence_ids[row]), {})
            for row in np.flatnonzero(self._first).tolist()
        }

    def observe(self, position: int, topk_ids: IntArray) -> None:
        """The router of a layer has chosen, `[T, K]`. Mutates.

        Raises:
            PredictorError: other rows than `begin_step` named, or an expert that is not there.
        """
        if topk_ids.ndim != 2 or len(topk_ids) != len(self.rows):
            raise PredictorError(
                f"layer {self.grid.layers[position]}: routing of shape {topk_ids.shape} observed "
                f"in a step of {len(self.rows)} rows; begin_step and observe must name the same"
            )
        if topk_ids.size and int(topk_ids.max()) >= self.grid.experts[position]:
            raise PredictorError(
                f"layer {self.grid.layers[position]}: expert {int(topk_ids.max())} observed, it "
                f"has {self.grid.experts[position]}; the predictor was made for another model"
            )
        self.chosen[position] = topk_ids
        self.newest = position

    def previous(self, position: int) -> IntArray:
        """int64 `[T, K]`: what the token before each row chose at a layer, where that is known.

        `NOTHING` where it is not: at a sequence's start, and inside a prompt until the layer has
        been observed.
        """
        known = [self._before.get(row, {}).get(position) for row in range(len(self.rows))]
        here = self.chosen.get(position)
        width = max((len(one) for one in known if one is not None), default=1)
        result = np.full((len(known), width if here is None else here.shape[1]), NOTHING, np.int64)
        if here is not None:
            inside = np.flatnonzero(~self._first)
            result[inside] = here[inside - 1]
        for row, one in enumerate(known):
            if one is not None:
                result[row, : len(one)] = one
        return result

    def _remember(self) -> None:
        """Keep the last row of each sequence of the step that ends."""
        if not self.chosen:
            return
        last = {sequence: row for row, sequence in enumerate(self.rows.sequence_ids.tolist())}
        for sequence, row in last.items():
            self._last[sequence] = {at: ids[row] for at, ids in self.chosen.items()}
            self._last.move_to_end(sequence)
        while len(self._last) > max(KEPT_SEQUENCES, len(last)):
            self._last.popitem(last=False)


def multi_hot(topk_ids: IntArray, experts: int) -> Probabilities:
    """float32 `[..., experts]` of chosen experts `[..., K]`: 1 where chosen, NOTHING ignored."""
    flat = topk_ids.reshape(-1, topk_ids.shape[-1])
    result = np.zeros((len(flat), experts + 1), np.float32)
    result[np.arange(len(flat))[:, None], np.where(flat < 0, experts, flat)] = 1.0
    return result[:, :experts].reshape(*topk_ids.shape[:-1], experts)
