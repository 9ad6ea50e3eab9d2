"""The rows of a forward call as predictors see them.

Knows no experts.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_runtime.predictors.base import StepRows
from moe_runtime.steps import SequenceNumbers, Step

__all__ = ["rows_of"]


def rows_of(step: Step, numbers: SequenceNumbers) -> StepRows | None:
    """The tokens of a call without its padding; None if they cannot be told."""
    if not step.rows or not step.batch:
        return None
    length = step.rows // step.batch
    sequences = np.repeat(np.array(numbers.of(step), np.int64), length)
    ids = np.full(step.rows, -1, np.int64)
    if step.token_ids is not None:
        ids = step.token_ids.to("cpu", torch.int64).numpy()
    places = step.positions().numpy()
    if step.real is not None:
        real = step.real.numpy()
        sequences, ids, places = sequences[real], ids[real], places[real]
    return StepRows(token_ids=ids, sequence_ids=sequences, positions=places, decode=step.decode)
