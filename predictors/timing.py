"""What a predictor costs: time a token, begin, observe and predict together.

Knows the predictor protocol.
"""

from __future__ import annotations

import time
from typing import ClassVar

import numpy as np
import torch
from moe_runtime.predictors.base import Predictor, Probabilities, StepRows
from moe_runtime.predictors.replay import put_together, replay

from moe_runtime.core import IntArray
from moe_runtime.trace import DECODE, RoutingTrace

__all__ = ["microseconds"]

TIMED_CALLS = 128  # decoding calls that are timed
WARM_CALLS = 16  # and as many before them that are not


class _Timed:
    """A predictor whose calls are timed; the time lies in `nanoseconds`."""

    name: ClassVar[str] = "timed"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, inner: Predictor) -> None:
        self._inner = inner
        self.grid = inner.grid
        self.nanoseconds = 0

    def begin_step(self, rows: StepRows) -> None:
        began = time.perf_counter_ns()
        self._inner.begin_step(rows)
        self.nanoseconds += time.perf_counter_ns() - began

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        began = time.perf_counter_ns()
        self._inner.observe(position, topk_ids, hidden)
        self.nanoseconds += time.perf_counter_ns() - began

    def predict(self, position: int) -> Probabilities:
        began = time.perf_counter_ns()
        found = self._inner.predict(position)
        self.nanoseconds += time.perf_counter_ns() - began
        return found

    def reset(self) -> None:
        self._inner.reset()


def microseconds(predictor: Predictor, trace: RoutingTrace) -> float | None:
    """Time of a token in a decoding call of its own, each layer forecast once.

    The median over calls; None if a trace has too few decoding rows.
    """
    decode = put_together(trace.select(phase=DECODE), 1)
    decode = decode[: WARM_CALLS + TIMED_CALLS]
    if len(decode) <= WARM_CALLS:
        return None
    timed = _Timed(predictor)
    marks: list[int] = []
    last = -1
    for one in replay(timed, decode):
        if int(one.rows[0]) != last:
            marks.append(timed.nanoseconds)
            last = int(one.rows[0])
    spent = np.diff([*marks, timed.nanoseconds])[WARM_CALLS:]
    return round(float(np.median(spent)) / 1000, 1)
