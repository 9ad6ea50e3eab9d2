"""What fitting needs: traces as one, held-out halves, and how surprising outcomes were.

Knows no predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from moe_runtime.predictors.base import Probabilities
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = [
    "STRENGTHS",
    "best_strength",
    "chosen_experts",
    "first_half",
    "joined",
    "log_loss",
    "require_token_ids",
    "shrunk",
]

# Candidates for the weight of a prior, in observations.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
LEAST = 1e-6  # no outcome is taken for impossible


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


def chosen_experts(trace: RoutingTrace, position: int) -> IntArray:
    """int64 `[N, K]` of a layer, -1 where nothing was chosen."""
    ids = trace.topk_ids[:, position].astype(np.int64)
    ids[ids == UNUSED] = -1
    return ids


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


def shrunk(
    counts: NDArray[np.float64],
    observations: NDArray[np.float64],
    prior: NDArray[np.float64],
    strength: float,
) -> NDArray[np.float64]:
    """Rates of counts, drawn towards a prior that weighs as much as `strength` observations.

    The posterior mean of a beta prior; `counts / observations` once there are many.
    """
    return (counts + strength * prior) / (observations + strength)


def log_loss(probabilities: NDArray[np.floating], outcomes: NDArray[np.floating]) -> float:
    """Mean negative log-likelihood of outcomes 0 or 1."""
    p = np.clip(probabilities, LEAST, 1 - LEAST)
    return float(-np.mean(np.where(outcomes > 0, np.log(p), np.log1p(-p))))


def best_strength(loss: Callable[[float], float]) -> float:
    """Of `STRENGTHS` the one with the least loss."""
    return min(STRENGTHS, key=loss)


def as_probabilities(values: NDArray[np.floating]) -> Probabilities:
    """float32, within 0 and 1."""
    return np.clip(values, 0.0, 1.0).astype(np.float32)
