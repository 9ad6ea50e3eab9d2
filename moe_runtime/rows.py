"""The rows of a forward call as predictors see them, and whose tokens they are.

Knows no experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.core import IntArray
from moe_runtime.predictors.base import StepRows
from moe_runtime.steps import Step

__all__ = ["SequenceNumbers", "rows_of"]


@dataclass
class SequenceNumbers:
    """Numbers for the sequences of a run: new ones when a call starts with an empty cache."""

    first: int = 0
    batch: int = 0

    def of(self, step: Step) -> IntArray:
        """int64 `[batch]`: the number of each sequence of this call. Mutates."""
        # A batch of another size in the middle is a caller's that rebuilt it: unknown sequences.
        if not step.past or step.batch != self.batch:
            self.first += self.batch
        self.batch = step.batch
        return np.arange(self.first, self.first + step.batch, dtype=np.int64)


def rows_of(step: Step, numbers: SequenceNumbers) -> StepRows | None:
    """The tokens of a call without its padding; None if they cannot be told."""
    if not step.rows or not step.batch:
        return None
    length = step.rows // step.batch
    sequences = np.repeat(numbers.of(step), length)
    ids = np.full(step.rows, -1, np.int64)
    if step.token_ids is not None:
        ids = step.token_ids.to("cpu", torch.int64).numpy()
    places = step.positions().numpy()
    if step.real is not None:
        real = step.real.numpy()
        sequences, ids, places = sequences[real], ids[real], places[real]
    return StepRows(token_ids=ids, sequence_ids=sequences, positions=places, decode=step.decode)
