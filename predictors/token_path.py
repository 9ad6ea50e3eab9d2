"""The token path: a token is routed as it was before in this run, else as its sequence was lately.

Fits nothing: it learns the run's own tokens while it goes, prompts included.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.decayed_path import DecayedPath

from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import ConfigError

__all__ = ["TokenPath"]

_KEPT_BYTES = 64 * 2**20  # of counts; tokens not seen for longest are forgotten


class TokenPath:
    """A token id's share of uses that chose each expert, drawn to the sequence's decayed path.

    With n earlier uses of the token in this run, c of which chose the expert, and m the decayed
    mean of the sequence's own choices: (c + strength * m) / (n + strength). Where token ids are
    unknown it is the decayed path.

    Args:
        grid: the layers and experts.
        strength: how many uses of the token weigh as much as the sequence's own path, above 0.
        decay: see `DecayedPath`.
    """

    name: ClassVar[str] = "token path"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, grid: ExpertGrid, strength: float = 1.0, decay: float = 0.5) -> None:
        if not strength > 0.0:
            raise ConfigError(f"token path: strength has to be above 0, found {strength}")
        self.grid = grid
        self._strength = strength
        self._path = DecayedPath(grid, decay)
        # Of each token the uses of each expert, layer after layer, then of each layer its own uses.
        self._counts: OrderedDict[int, Probabilities] = OrderedDict()
        self._kept = max(16, _KEPT_BYTES // (4 * (grid.size + len(grid.layers))))
        self._tokens: list[int] = []

    def begin_step(self, rows: StepRows) -> None:
        self._path.begin_step(rows)
        self._tokens = rows.token_ids.tolist()
        for token in self._tokens:
            if token in self._counts:
                self._counts.move_to_end(token)

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        self._path.observe(position, topk_ids)
        offset, uses = self.grid.offsets[position], self.grid.size + position
        for token, chosen in zip(self._tokens, topk_ids, strict=True):
            if token < 0:
                continue
            counts = self._counts.get(token)
            if counts is None:
                counts = np.zeros(self.grid.size + len(self.grid.layers), np.float32)
                self._counts[token] = counts
            counts[offset + chosen[chosen >= 0]] += 1.0
            counts[uses] += 1.0
        while len(self._counts) > max(self._kept, len(self._tokens)):
            self._counts.popitem(last=False)

    def predict(self, position: int) -> Probabilities:
        paths = self._strength * self._path.predict(position)
        start = self.grid.offsets[position]
        stop, uses = start + self.grid.experts[position], self.grid.size + position
        seen = np.full((len(paths), 1), self._strength, np.float32)
        for row, token in enumerate(self._tokens):
            counts = self._counts.get(token)
            if counts is not None:
                paths[row] += counts[start:stop]
                seen[row] += counts[uses]
        result: Probabilities = np.clip(paths / seen, 0.0, 1.0).astype(np.float32)
        return result

    def reset(self) -> None:
        self._path.reset()
        self._counts.clear()
        self._tokens = []
