"""Timing something several times: warmed up once, then for a while.

Knows no hardware.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from moe_runtime.hardware.values import Spread

__all__ = ["sample", "spread"]

_MOST = 1000
_SHORTEST = 1e-9  # seconds: what a clock of nanoseconds can tell from nothing


def sample(once: Callable[[], None], *, seconds: float = 0.08, least: int = 3) -> list[float]:
    """Seconds of each call of `once`, the first left out, until `seconds` have passed."""
    once()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (time.perf_counter() - began < seconds and len(times) < _MOST):
        start = time.perf_counter()
        once()
        times.append(max(time.perf_counter() - start, _SHORTEST))
    return times


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(median=median(values), low=min(values), high=max(values), samples=len(values))
