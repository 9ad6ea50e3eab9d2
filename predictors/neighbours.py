"""`Neighbours`: earlier tokens whose routing was like the present ones', and what they chose.

Knows no predictor.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from moe_runtime.predictors.history import NOTHING, RunHistory, multi_hot
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, IntArray

__all__ = ["Neighbours"]

Array: TypeAlias = NDArray[Any]

RUN_ROWS = 1024  # tokens of a run that are remembered, the newest
FEW_ROWS = 4  # up to so many rows go one by one
# How likeness is measured; chosen on the shared traces. There the mean recall at k of the transition
# predictor changes by under .01 with a decay of .7, with .7 of this weight, or without the token.
DECAY = 0.8  # what a layer further back weighs
SAME_SETS = 4.0  # likeness, in nats, of choosing the same experts at the newest layer
SAME_TOKEN = 1.5  # likeness, in nats, of being the same token


class Neighbours:
    """A bank of tokens with their experts in all layers, fitted ones and a run's newest.

    Two tokens are as alike as the experts that they share, newest layer first, each layer further
    back weighing `DECAY` of the one after it. The forecast is the mean of what bank tokens chose,
    weighted by the exponential of likeness (a Nadaraya-Watson estimate).

    Args:
        grid: the layers and experts.
        ids: int16 `[M, L, K]` of the fitted tokens, -1 where nothing was chosen.
        tokens: int64 `[M]`, their token ids; -1 if unknown.
    """

    def __init__(self, grid: ExpertGrid, ids: NDArray[np.int16], tokens: IntArray) -> None:
        self.grid = grid
        self.fitted_ids, self.fitted_tokens = ids, tokens
        self._fitted = len(ids)
        rows = self._fitted + RUN_ROWS
        layers, width = len(grid.layers), max(grid.experts)
        # The last expert stands for "none", so that it can be set like any other.
        self._member = np.zeros((layers, width + 1, rows), np.uint8)
        self._ids = np.full((layers, rows, ids.shape[2]), NOTHING, np.int16)
        self._tokens = np.full(rows, NOTHING, np.int64)
        self._ids[:, : self._fitted] = ids.transpose(1, 0, 2)
        self._tokens[: self._fitted] = tokens
        layer, row, _ = np.ogrid[:layers, : self._fitted, :1]
        self._member[layer, ids.transpose(1, 0, 2), row] = 1
        self._used = self._fitted
        self._next = self._fitted
        self.begin_step(np.zeros(0, np.int64))

    def reset(self) -> None:
        """Forget the run. Mutates."""
        self._member[:, :, self._fitted :] = 0
        self._ids[:, self._fitted :] = NOTHING
        self._tokens[self._fitted :] = NOTHING
        self._used = self._next = self._fitted
        self.begin_step(np.zeros(0, np.int64))

    def remember(self, history: RunHistory) -> None:
        """A step has ended: its tokens join the bank, replacing the run's oldest. Mutates."""
        if not history.chosen:
            return
        for row in range(max(0, len(history.rows) - RUN_ROWS), len(history.rows)):
            self._remember_row(history, row)

    def begin_step(self, tokens: IntArray) -> None:
        """A step of these tokens begins. Mutates."""
        self._alike: Array | None = None
        self._step_tokens = tokens
        self._through = -1

    def estimate(self, history: RunHistory, position: int) -> tuple[Array, Array]:
        """What similar tokens chose at a layer.

        Returns:
            float32 `[T, E]` shares, and `[T, 1]` how many tokens these are worth (0: none known).
        """
        experts = self.grid.experts[position]
        rows = len(self._step_tokens)
        if not self._used:
            return np.zeros((rows, experts), np.float32), np.zeros((rows, 1), np.float32)
        alike = self._likeness(history)
        weight = np.exp(alike - alike.max(axis=1, keepdims=True))
        total = weight.sum(axis=1, keepdims=True)
        worth = total**2 / (weight**2).sum(axis=1, keepdims=True)
        return self._votes(position, weight, experts) / total, worth

    def _votes(self, position: int, weight: Array, experts: int) -> Array:
        """`[T, E]`: the weight of the bank's tokens that chose each expert."""
        if len(weight) > FEW_ROWS:
            member = self._member[position, :experts, : self._used].astype(np.float32)
            return np.asarray(weight @ member.T)
        ids = self._ids[position, : self._used].astype(np.int64) % (experts + 1)
        width = ids.shape[1]
        result = np.empty((len(weight), experts), np.float32)
        for row, one in enumerate(weight):
            votes = np.bincount(ids.ravel(), np.repeat(one, width), experts + 1)
            result[row] = votes[:experts]
        return result

    def _likeness(self, history: RunHistory) -> Array:
        """float32 `[T, bank]`, brought up to the newest layer observed."""
        rows = len(self._step_tokens)
        if self._alike is None:
            known = self._step_tokens >= 0
            same = (self._step_tokens[:, None] == self._tokens[None, : self._used]) & known[:, None]
            self._bonus = np.float32(SAME_TOKEN) * same
            self._alike = np.zeros((rows, self._used), np.float32)
        for position in range(self._through + 1, history.newest + 1):
            chosen = history.chosen.get(position)
            if chosen is None:
                continue
            self._alike *= np.float32(DECAY)
            self._alike += np.float32(SAME_SETS / chosen.shape[1]) * self._shared(position, chosen)
        self._through = history.newest
        result: Array = self._alike + self._bonus
        return result

    def _shared(self, position: int, chosen: IntArray) -> Array:
        """float32 `[T, bank]`: how many of a layer's experts `[T, K]` bank tokens chose too."""
        member = self._member[position, :, : self._used]
        if len(chosen) <= FEW_ROWS:
            shared = [member[one[one >= 0]].sum(axis=0, dtype=np.float32) for one in chosen]
            return np.stack(shared)
        hot = multi_hot(chosen, self.grid.experts[position])
        experts = member[: self.grid.experts[position]].astype(np.float32)
        return np.asarray(hot @ experts)

    def _remember_row(self, history: RunHistory, row: int) -> None:
        slot = self._next
        layers = np.arange(len(self.grid.layers))[:, None]
        self._member[layers, self._ids[:, slot], slot] = 0
        self._ids[:, slot] = NOTHING
        for position, chosen in history.chosen.items():
            count = min(chosen.shape[1], self._ids.shape[2])
            self._ids[position, slot, :count] = chosen[row, :count]
        self._member[layers, self._ids[:, slot], slot] = 1
        self._tokens[slot] = history.rows.token_ids[row]
        self._used = max(self._used, slot + 1)
        self._next = slot + 1 if slot + 1 < len(self._tokens) else self._fitted
