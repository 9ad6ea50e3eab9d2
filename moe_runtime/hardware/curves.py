"""From a few measured points to a time at any size, never shorter for more work.

Knows no hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["falls", "seconds_at"]


def seconds_at(points: Sequence[tuple[float, float]], size: float) -> float:
    """Time of work of a size, from measured (size, seconds), sizes distinct and above 0.

    Between two points on a straight line; below the smallest the smallest's time (a fixed cost
    dominates there); above the largest in proportion to size. Where noise made more work quicker,
    it is taken to be as slow as the less, so that the answer never falls with size.
    """
    if not points:
        raise ValueError("no time can be told without a measured point")
    rising: list[tuple[float, float]] = []
    for at, seconds in sorted(points):
        rising.append((at, max(seconds, rising[-1][1] if rising else 0.0)))
    if size <= rising[0][0]:
        return rising[0][1]
    for (left, low), (right, high) in pairwise(rising):
        if size <= right:
            return low + (high - low) * (size - left) / (right - left)
    return rising[-1][1] * size / rising[-1][0]


def falls(points: Sequence[tuple[float, float]], *, by: float) -> list[tuple[float, float]]:
    """Pairs (smaller, larger size) where more work took less than `1 - by` of the less's time."""
    ordered = sorted(points)
    return [
        (left, right)
        for (left, before), (right, after) in pairwise(ordered)
        if after < (1 - by) * before
    ]
