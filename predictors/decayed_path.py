"""The decayed path: a sequence will be routed much as its last tokens were.

Knows no token ids and fits nothing; its forecast is each sequence's own recent past.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows

from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import ConfigError

__all__ = ["DecayedPath"]

_KEPT_SEQUENCES = 4096  # a sequence's end is not announced, so those unused for longest go
_PROMPT_ROWS = 64  # of a prompt only its last tokens weigh anything


class DecayedPath:
    """An exponentially decayed mean of each sequence's own choices, layer by layer.

    With `decay=0` it is the previous token's path (the paper's TLP baseline).

    Args:
        grid: the layers and experts.
        decay: kept part of the mean per token, `0 <= decay < 1`.
    """

    name: ClassVar[str] = "decayed-path"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, grid: ExpertGrid, decay: float = 0.5) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decayed-path: decay has to lie in [0, 1), found {decay}")
        self.grid = grid
        self._decay = decay
        self._means: OrderedDict[int, Probabilities] = OrderedDict()
        self._known: set[int] = set()
        self._rows: StepRows | None = None
        self._by_sequence: list[tuple[int, IntArray]] = []

    def begin_step(self, rows: StepRows) -> None:
        self._rows = rows
        sequences = rows.sequence_ids
        if rows.decode:
            self._by_sequence = [(int(s), np.array([at])) for at, s in enumerate(sequences)]
        else:
            order = np.lexsort((rows.positions, sequences))
            distinct, starts = np.unique(sequences[order], return_index=True)
            parts = np.split(order, starts[1:])
            self._by_sequence = [
                (int(s), part[-_PROMPT_ROWS:]) for s, part in zip(distinct, parts, strict=True)
            ]
        self._known = set(self._means)
        for sequence, _ in self._by_sequence:
            if sequence not in self._means:
                self._means[sequence] = np.zeros(self.grid.size, np.float32)
            self._means.move_to_end(sequence)
        while len(self._means) > max(_KEPT_SEQUENCES, len(self._by_sequence)):
            self._means.popitem(last=False)

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        width = self.grid.experts[position]
        chosen = np.zeros((len(topk_ids), width + 1), np.float32)  # a column more for "none"
        np.put_along_axis(chosen, np.where(topk_ids < 0, width, topk_ids), 1.0, axis=1)
        for sequence, at in self._by_sequence:
            mean = self._layer(sequence, position)
            age = np.arange(len(at))[::-1]
            weights = (1.0 - self._decay) * np.float64(self._decay) ** age
            before = self._decay ** len(at)
            if sequence not in self._known:  # nothing came before: the mean of these alone
                weights, before = weights / weights.sum(), 0.0
            mean *= np.float32(before)
            mean += weights.astype(np.float32) @ chosen[at, :width]

    def predict(self, position: int) -> Probabilities:
        assert self._rows is not None, "begin_step comes first"
        layers = [self._layer(int(s), position) for s in self._rows.sequence_ids]
        return np.clip(np.stack(layers), 0.0, 1.0)

    def reset(self) -> None:
        self._means.clear()
        self._known.clear()
        self._rows = None
        self._by_sequence = []

    def _layer(self, sequence: int, position: int) -> Probabilities:
        start = self.grid.offsets[position]
        return self._means[sequence][start : start + self.grid.experts[position]]
