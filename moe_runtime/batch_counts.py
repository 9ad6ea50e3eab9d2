"""Counting what forward calls cost: the runtime's own counters, read before and after.

Knows the runtime's cache and profiler; no batches and no schedules.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from moe_runtime.batch_run import PhaseCounts
from moe_runtime.core import FloatArray, IntArray
from moe_runtime.runtime import Runtime
from moe_runtime.scheduler import on_demand_loads

__all__ = ["BatchCounts", "CallCost"]


@dataclass(eq=False)
class CallCost:
    """One forward call; filled in when it has ended. `slots` is None without a runtime."""

    slots: FloatArray | None
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    def added_to(self, counts: PhaseCounts, tokens: int, active: IntArray | None) -> PhaseCounts:
        """The phase with this call.

        Args:
            counts: of the calls before.
            tokens: that went in.
            active: distinct experts `[layers]`; None without a runtime.
        """
        plain = PhaseCounts(
            calls=counts.calls + 1,
            tokens=counts.tokens + tokens,
            seconds=counts.seconds + self.seconds,
        )
        if active is None or self.slots is None:
            return plain
        loads = on_demand_loads(active[None].astype(np.float64), self.slots.tolist())
        return PhaseCounts(
            calls=plain.calls,
            tokens=plain.tokens,
            seconds=plain.seconds,
            active=(counts.active or 0) + int(active.sum()),
            on_demand=(counts.on_demand or 0.0) + loads,
            hits=(counts.hits or 0) + self.hits,
            misses=(counts.misses or 0) + self.misses,
            bytes_read=(counts.bytes_read or 0) + self.bytes_read,
        )


class BatchCounts:
    """Reads the counters of a runtime around each forward call; only the clock without one."""

    def __init__(self, runtime: Runtime | None) -> None:
        self._runtime = runtime
        self._slots: FloatArray | None = None
        if runtime is not None:
            cache = runtime.cache
            groups = np.array([cache.group(at) for at in range(len(cache.grid.layers))])
            # Layers with experts of one shape share their slots: each has an equal part of them.
            shares = np.asarray(cache.slots, np.float64) / np.bincount(groups)
            self._slots = np.minimum(shares[groups], cache.grid.experts)

    @contextmanager
    def phase(self) -> Iterator[CallCost]:
        """Count what happens inside the block."""
        cost = CallCost(self._slots)
        before, began = self._read(), time.perf_counter()
        yield cost
        cost.seconds = time.perf_counter() - began
        after = self._read()
        cost.hits, cost.misses, cost.bytes_read = (
            int(now - then) for now, then in zip(after, before, strict=True)
        )

    def _read(self) -> tuple[int, int, int]:
        if self._runtime is None:
            return (0, 0, 0)
        counters, profiler = self._runtime.cache.counters, self._runtime.profiler
        read = int(profiler.bytes_read.sum()) + int(profiler.host_bytes.sum())
        return int(counters.hits.sum()), int(counters.misses.sum()), read
