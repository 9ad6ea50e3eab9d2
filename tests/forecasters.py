"""Predictors for tests: one that knows the run, one that guesses, one that breaks.

Knows the predictor protocol and traces; not the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows

from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.trace import UNUSED, RoutingTrace


class Oracle:
    """Forecasts the routing of a recorded run, replayed call by call."""

    name: ClassVar[str] = "oracle"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, trace: RoutingTrace) -> None:
        self.grid = trace.grid
        self._trace = trace
        self._starts = np.flatnonzero(np.diff(trace.step_ids, prepend=-1))
        self.reset()

    def begin_step(self, rows: StepRows) -> None:
        self._call += 1
        start = int(self._starts[self._call])
        self._rows = slice(start, start + len(rows))
        ids = self._trace.token_ids[self._rows]
        assert np.array_equal(ids, rows.token_ids), "the run is not the recorded one"

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        recorded = self._trace.topk_ids[self._rows, position]
        assert np.array_equal(np.where(topk_ids < 0, UNUSED, topk_ids), recorded)
        assert hidden is not None
        assert len(hidden) == len(topk_ids)

    def predict(self, position: int) -> Probabilities:
        chosen = self._trace.topk_ids[self._rows, position].astype(np.int64)
        found = np.zeros((len(chosen), self.grid.experts[position]), np.float32)
        np.put_along_axis(found, chosen, 1.0, axis=1)
        return found

    def reset(self) -> None:
        self._call = -1
        self._rows = slice(0, 0)


class Guess:
    """Seeded nonsense: every probability drawn anew each time that it is asked."""

    name: ClassVar[str] = "guess"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, grid: ExpertGrid, seed: int = 0) -> None:
        self.grid = grid
        self._random = np.random.default_rng(seed)
        self._rows = 0

    def begin_step(self, rows: StepRows) -> None:
        self._rows = len(rows)

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        pass

    def predict(self, position: int) -> Probabilities:
        size = (self._rows, self.grid.experts[position])
        return self._random.random(size, dtype=np.float32)

    def reset(self) -> None:
        pass


class Breaks(Guess):
    """Guesses, and at its n-th forecast does something else."""

    name: ClassVar[str] = "breaks"

    def __init__(self, grid: ExpertGrid, at: int, act: Callable[[], Probabilities]) -> None:
        super().__init__(grid)
        self._left = at
        self._act = act

    def predict(self, position: int) -> Probabilities:
        self._left -= 1
        return self._act() if self._left == 0 else super().predict(position)
