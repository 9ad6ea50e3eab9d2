"""Asks a routing predictor, safely: its failure costs the forecast and never the run.

Turns rows into the demand of whole layers, keeps account of what came true, and of the time that
it took. Knows no cache, no slots and no transfers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import ConfigError
from moe_runtime.predictors.base import Predictor, StepRows, demand

__all__ = ["Accuracy", "Forecaster"]

_LOG = logging.getLogger("moe_runtime")

Demand = NDArray[np.float32]


@dataclass
class Accuracy:
    """How many of the experts that a layer needed were among as many that a forecast put first.

    int64 `[layers ahead + 1, layers]`; row 0 is not used.
    """

    needed: IntArray
    found: IntArray

    @classmethod
    def empty(cls, lookahead: int, layers: int) -> Accuracy:
        """All zero."""
        needed, found = np.zeros((2, lookahead + 1, layers), np.int64)
        return cls(needed, found)


@dataclass
class Forecaster:
    """One predictor over one run.

    Args:
        predictor: made for `grid`.
        grid: the model's layers and experts.
        lookahead: layers ahead that are asked for.
        clock: seconds.

    Attributes:
        failure: why it gives no more forecasts; empty while it does.
        seconds: spent in the predictor.
        accuracy: what came true.
        active: whether the present call has a forecast.
    """

    predictor: Predictor
    grid: ExpertGrid
    lookahead: int
    clock: Callable[[], float] = time.perf_counter
    failure: str = ""
    seconds: float = 0.0
    active: bool = False
    accuracy: Accuracy = field(init=False)
    _made: dict[int, list[tuple[int, Demand]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.predictor.grid != self.grid:
            raise ConfigError(
                f"predictor {self.predictor.name!r} was made for {_shape(self.predictor.grid)}, "
                f"the model has {_shape(self.grid)}; train one on traces of this model"
            )
        self.reset_accuracy()

    def reset_accuracy(self) -> None:
        """Start counting anew."""
        self.accuracy = Accuracy.empty(self.lookahead, len(self.grid.layers))
        self.seconds = 0.0

    def begin(self, rows: StepRows | None) -> None:
        """A forward call begins; None if its tokens cannot be told."""
        self._made.clear()
        self.active = rows is not None and len(rows) > 0 and not self.failure
        if self.active and self.predictor.needs_token_ids and rows is not None:
            self.active = bool((rows.token_ids >= 0).all())
        if self.active and rows is not None:
            self._ask(lambda: self.predictor.begin_step(rows))

    def observe(self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None) -> None:
        """A router has chosen: `topk_ids [T, K]`, -1 for none; `hidden [T, D]`, the same rows."""
        if not self.active:
            return
        needed = np.unique(topk_ids[topk_ids >= 0])
        for ahead, values in self._made.pop(position, ()):
            first = np.argpartition(-values, min(len(needed), len(values)) - 1)[: len(needed)]
            self.accuracy.needed[ahead, position] += len(needed)
            self.accuracy.found[ahead, position] += len(np.intersect1d(first, needed))
        self._ask(lambda: self.predictor.observe(position, topk_ids, hidden))

    def demand(self, position: int, ahead: int) -> Demand | None:
        """Probability `[experts]` that a coming layer needs each expert in this call.

        Args:
            position: a layer that has not run in this call.
            ahead: how many layers ahead it is, for the account.
        """
        if not self.active:
            return None
        rows = self._ask(lambda: self.predictor.predict(position))
        if rows is None:
            return None
        values = demand(np.clip(rows, 0.0, 1.0))
        if ahead <= self.lookahead:
            self._made.setdefault(position, []).append((ahead, values))
        return values

    def forget(self) -> None:
        """The run was interrupted, or not followed for a while: begin anew."""
        self._made.clear()
        self.active = False
        if not self.failure:
            self._ask(self.predictor.reset)

    def _ask(self, question: Callable[[], Any]) -> Any:
        begin = self.clock()
        try:
            answer = question()
            if answer is not None and not _sound(answer):
                raise ValueError("it forecast something that is no probability (NaN, or not 0..1)")
        except Exception as error:  # noqa: BLE001  whatever it is, the run goes on without forecasts
            self.failure = f"{type(error).__name__}: {error}"
            self.active = False
            _LOG.warning(
                "predictor %r failed and is not asked again; the run goes on with the plain "
                "policy: %s",
                self.predictor.name,
                self.failure,
            )
            return None
        finally:
            self.seconds += self.clock() - begin
        return answer


def _sound(values: NDArray[np.float32]) -> bool:
    # A comparison with NaN is false.
    return bool(values.size) and bool(values.min() >= -1e-6) and bool(values.max() <= 1 + 1e-6)


def _shape(grid: ExpertGrid) -> str:
    return f"{len(grid.layers)} layers of {sorted(set(grid.experts))} experts"
