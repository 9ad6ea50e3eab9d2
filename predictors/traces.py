"""Traces as predictors are fitted to them: put together, halved, checked for token ids.

Knows no predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["first_half", "joined", "require_token_ids"]


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace; sequences of different traces get different numbers."""
    parts, first = [], 0
    for trace in traces:
        if not len(trace):
            continue
        _, numbers = np.unique(trace.sequence_ids, return_inverse=True)
        parts.append(replace(trace, sequence_ids=(numbers + first).astype(np.int32)))
        first += int(numbers.max()) + 1
    return RoutingTrace.concat(parts)


def first_half(trace: RoutingTrace) -> NDArray[np.bool_]:
    """Bool `[N]`: every other sequence; of a single sequence its first half."""
    sequences, numbers = np.unique(trace.sequence_ids, return_inverse=True)
    if len(sequences) == 1:
        return np.arange(len(trace)) < (len(trace) + 1) // 2
    return np.asarray(numbers % 2 == 0)


def require_token_ids(traces: Sequence[RoutingTrace], kind: str) -> None:
    """PredictorError if a trace does not say which tokens went in."""
    for number, trace in enumerate(traces):
        unknown = int((trace.token_ids < 0).sum())
        if unknown:
            raise PredictorError(
                f"trace {number}: {unknown} of {len(trace)} rows have no token id, which a "
                f"{kind} predictor is fitted to; record the trace with moe_runtime.record, or "
                "fit another kind"
            )
