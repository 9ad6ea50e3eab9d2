"""Finding the few lowest of many numbers, faster than a sort or a partition.

Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import numpy as np

from moe_runtime.core import FloatArray, IntArray

__all__ = ["lowest_few"]

_GROUPS_PER_CHOSEN = 8  # groups this many times the number sought, or a plain partition does it


def lowest_few(values: FloatArray, count: int) -> IntArray:
    """Indices, ascending, of the `count` lowest values and of a few more besides, or of ties.

    The numbers are dealt into groups. The `count`-th lowest of the groups' minima is a bound that
    `count` numbers reach at least, so all that are not above it hold the lowest `count`. This
    reads the numbers twice in order, where a partition of thousands moves them about.

    Args:
        values: float64 `[n]`, no NaN.
        count: `1 <= count <= n`.

    Returns:
        int64 `[m]`, `m >= count`.
    """
    groups = min(len(values) // 8, max(_GROUPS_PER_CHOSEN * count, 128))
    minima = values
    if groups >= 2 * count:
        rounds = len(values) // groups
        minima = values[: rounds * groups].reshape(rounds, groups).min(axis=0)
    bound = np.partition(minima, count - 1)[count - 1]
    return np.flatnonzero(values <= bound)
