"""`TimedResult`: what came of a simulated run, as a value.

Knows neither how it was simulated nor how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_runtime.core import FloatArray, IntArray

__all__ = ["TimedResult"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedResult:
    """One simulated run. Arrays are by layer position, int64 `[L]` unless said otherwise.

    A use is one expert asked for by one layer step. `resident + in_time` are hits: the latter were
    loaded ahead of need and this was their first use. `late + missed` are misses: the former were
    under way when they were asked for. Every load `ahead` ended as one of in_time, late, unused
    (left without a use, or still there), withdrawn (called off) or pending (still under way).

    Args:
        slots: experts that fit, in each pool.
        calls, tokens: forward calls, and tokens of all of them.
        seconds: simulated; `call_seconds` float64 `[calls]` is its division.
        stall_seconds: float64 `[L]`, of these the waiting for experts.
        resident, in_time, late, missed: uses.
        ahead, unused, withdrawn, pending: loads ahead of need.
        evictions: experts that left.
        bytes_needed: read on demand, late ones included.
        bytes_ahead: read ahead of need, and there before it.
        bytes_wasted: of bytes_ahead those that were never used.
        link_seconds: in which the link was busy.
        predictor_seconds: spent in forecasts.
        state: what the trial came to; "predicting" where it was not held, "" without a predictor.
    """

    slots: tuple[int, ...]
    calls: int
    tokens: int
    seconds: float
    call_seconds: FloatArray
    stall_seconds: FloatArray
    resident: IntArray
    in_time: IntArray
    late: IntArray
    missed: IntArray
    ahead: IntArray
    unused: IntArray
    withdrawn: IntArray
    pending: IntArray
    evictions: int
    bytes_needed: int
    bytes_ahead: int
    bytes_wasted: int
    link_seconds: float
    predictor_seconds: float
    state: str

    @property
    def uses(self) -> int:
        """Experts asked for, summed over layer steps."""
        return int((self.resident + self.in_time + self.late + self.missed).sum())

    @property
    def hit_rate(self) -> float:
        """Share of uses that did not wait; 0 for an empty run."""
        return float((self.resident + self.in_time).sum()) / self.uses if self.uses else 0.0

    @property
    def bytes_read(self) -> int:
        """All that the link brought."""
        return self.bytes_needed + self.bytes_ahead

    @property
    def tokens_per_second(self) -> float:
        """Simulated; 0 where no time passed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: sums, and by layer what differs from layer to layer."""
        layered = ("resident", "in_time", "late", "missed")
        return {
            "slots": list(self.slots),
            "calls": self.calls,
            "tokens": self.tokens,
            "uses": self.uses,
            "hit_rate": round(self.hit_rate, 6),
            **{name: int(getattr(self, name).sum()) for name in layered},
            "loads_ahead": {
                name: int(getattr(self, name).sum())
                for name in ("ahead", "in_time", "late", "unused", "withdrawn", "pending")
            },
            "evictions": self.evictions,
            "seconds": round(self.seconds, 6),
            "stall_seconds": round(float(self.stall_seconds.sum()), 6),
            "link_seconds": round(self.link_seconds, 6),
            "predictor_seconds": round(self.predictor_seconds, 6),
            "tokens_per_second": round(self.tokens_per_second, 4),
            "bytes": {
                "read": self.bytes_read,
                "needed": self.bytes_needed,
                "ahead": self.bytes_ahead,
                "wasted": self.bytes_wasted,
            },
            "state": self.state,
            "layers": {
                **{name: getattr(self, name).tolist() for name in layered},
                "stall_seconds": [round(float(value), 6) for value in self.stall_seconds],
            },
        }
