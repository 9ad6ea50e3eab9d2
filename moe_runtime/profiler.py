"""Counters and spans of a run, collected while it runs. No formatting and no rendering.

Bounded: a run of any length keeps at most `MAX_STEPS` steps, `MAX_SNAPSHOTS` residency snapshots
and `MAX_ACCESSES` layer steps; what is dropped is counted.
"""

from __future__ import annotations

import base64
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_runtime.access import Access
from moe_runtime.core import IntArray

__all__ = ["Profiler", "StepRecord"]

MAX_STEPS = 20_000
MAX_SNAPSHOTS = 64
MAX_ACCESSES = 200_000


@dataclass(slots=True)
class StepRecord:
    """One forward call."""

    decode: bool
    tokens: int
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    nbytes: int = 0
    stall_seconds: float = 0.0


@dataclass
class Profiler:
    """What a run did, layer by layer and step by step; mutated under the executor's lock."""

    layers: int
    grid_size: int
    bytes_read: IntArray = field(init=False)
    host_bytes: IntArray = field(init=False)
    stall_seconds: list[float] = field(init=False)
    # Of the bytes above those that were fetched ahead of need, and of those what was called off.
    ahead_bytes: IntArray = field(init=False)
    withdrawn_bytes: int = 0
    # Missing experts that the host computed, with their rows, and the seconds of computing them.
    hosted: IntArray = field(init=False)
    hosted_rows: int = 0
    hosted_seconds: float = 0.0
    expert_seconds: float = 0.0
    steps: list[StepRecord] = field(default_factory=list)
    dropped_steps: int = 0
    accesses: list[Access] = field(default_factory=list)
    dropped_accesses: int = 0
    snapshots: list[tuple[int, str]] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    _stride: int = 1
    _count: int = 0

    def __post_init__(self) -> None:
        self.bytes_read = np.zeros(self.layers, np.int64)
        self.host_bytes = np.zeros(self.layers, np.int64)
        self.ahead_bytes = np.zeros(self.layers, np.int64)
        self.hosted = np.zeros(self.layers, np.int64)
        self.stall_seconds = [0.0] * self.layers
        self.totals = dict.fromkeys(
            (
                "tokens",
                "prefill_tokens",
                "decode_tokens",
                "step_seconds",
                "prefill_seconds",
                "decode_seconds",
            ),
            0.0,
        )
        self._current: dict[int, StepRecord] = {}

    def layer_step(self, access: Access, misses: int, nbytes: int, stall: float) -> None:
        """One MoE layer ran."""
        if len(self.accesses) < MAX_ACCESSES:
            self.accesses.append(access)
        else:
            self.dropped_accesses += 1
        record = self._current.get(threading.get_ident())
        if record is not None:
            record.hits += len(access.experts) - misses
            record.misses += misses
            record.nbytes += nbytes
            record.stall_seconds += stall

    def begin_step(self, *, decode: bool, tokens: int) -> StepRecord:
        """A forward call begins on this thread; layer steps count towards it."""
        record = StepRecord(decode, tokens, seconds=-time.perf_counter())
        self._current[threading.get_ident()] = record
        return record

    def end_step(self, residents: IntArray | None) -> StepRecord | None:
        """The forward call of this thread ended well; None if it was not begun.

        Args:
            residents: dense indices resident now, for a snapshot; None to take none.
        """
        record = self._current.pop(threading.get_ident(), None)
        if record is None:
            return None
        record.seconds += time.perf_counter()
        phase = "decode" if record.decode else "prefill"
        self.totals["tokens"] += record.tokens
        self.totals[f"{phase}_tokens"] += record.tokens
        self.totals["step_seconds"] += record.seconds
        self.totals[f"{phase}_seconds"] += record.seconds
        if len(self.steps) < MAX_STEPS:
            self.steps.append(record)
        else:
            self.dropped_steps += 1
        if residents is not None:
            self._snapshot(residents)
        self._count += 1
        return record

    def drop_step(self) -> None:
        """The forward call of this thread failed; its layers stay counted, its step is not."""
        self._current.pop(threading.get_ident(), None)

    def wants_snapshot(self) -> bool:
        """Whether the step that ends now is one to keep a snapshot of."""
        return self._count % self._stride == 0

    def _snapshot(self, residents: IntArray) -> None:
        flags = np.zeros(self.grid_size, np.bool_)
        flags[residents] = True
        bitmap = base64.b64encode(np.packbits(flags).tobytes()).decode("ascii")
        self.snapshots.append((self._count, bitmap))
        if len(self.snapshots) > MAX_SNAPSHOTS:
            # Keep every other one: the run's whole length stays covered.
            self.snapshots = self.snapshots[::2]
            self._stride *= 2

    @property
    def count(self) -> int:
        """Forward calls that ended well."""
        return self._count

    def step_columns(self) -> dict[str, Any]:
        """Steps as columns, for the run file."""
        return {
            "phase": [int(step.decode) for step in self.steps],
            "tokens": [step.tokens for step in self.steps],
            "seconds": [round(step.seconds, 6) for step in self.steps],
            "hits": [step.hits for step in self.steps],
            "misses": [step.misses for step in self.steps],
            "bytes": [step.nbytes for step in self.steps],
            "stall_seconds": [round(step.stall_seconds, 6) for step in self.steps],
            "dropped": self.dropped_steps,
        }
