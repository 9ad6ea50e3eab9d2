"""What went over a link: calls, rows and bytes by kind and layer, and the time spent waiting.

Knows no tensors and no processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Ledger", "Traffic", "add_traffic"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Everything of one kind that one rank, or several, sent in one layer.

    Args:
        kind: what it was for, such as `"dispatch"`, `"move"` or `"keys_values"`.
        layer: absolute layer index; None for what belongs to no layer.
        calls: exchanges or gathers. Every rank takes part in each.
        rounds: messages that had to arrive one after the other, summed over calls: one a call, two
            where sizes go ahead.
        rows: rows sent to other ranks; a row that goes to three ranks counts three times.
        bytes: bytes of these rows.
        frame_bytes: bytes sent to other ranks beside them: sizes and notes.
        kept_rows, kept_bytes: the same of what a rank sent to itself, which crosses no link.
    """

    kind: str
    layer: int | None = None
    calls: int = 0
    rounds: int = 0
    rows: int = 0
    bytes: int = 0
    frame_bytes: int = 0
    kept_rows: int = 0
    kept_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Both together; of one kind and layer."""
        assert (self.kind, self.layer) == (other.kind, other.layer), "of one kind and layer"
        numbers = [field.name for field in fields(self)[2:]]
        return Traffic(
            kind=self.kind,
            layer=self.layer,
            **{name: getattr(self, name) + getattr(other, name) for name in numbers},
        )

    @property
    def cross_bytes(self) -> int:
        """All bytes that crossed between ranks, sizes included."""
        return self.bytes + self.frame_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Ledger:
    """One rank's traffic so far; `add` mutates, the rest asks.

    Attributes:
        idle_seconds: spent waiting for other ranks and for bytes on their way.
        slept_seconds: spent asleep for the link's stated latency.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int | None], Traffic] = {}
        self.idle_seconds = 0.0
        self.slept_seconds = 0.0

    @property
    def waited_seconds(self) -> float:
        """Both together."""
        return self.idle_seconds + self.slept_seconds

    def add(self, entry: Traffic) -> None:
        """Count one more call."""
        key = (entry.kind, entry.layer)
        known = self._entries.get(key)
        self._entries[key] = entry if known is None else known + entry

    def entries(self) -> tuple[Traffic, ...]:
        """By kind, layers in order; a value that later calls do not change."""
        ordered = sorted(self._entries, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
        return tuple(self._entries[key] for key in ordered)


def add_traffic(entries: Iterable[Traffic], *, alike: bool = False) -> tuple[Traffic, ...]:
    """The entries of several ranks as one list: rows and bytes added up.

    Args:
        alike: whether the entries are of ranks that took part in the same calls, so that calls and
            rounds are those of each of them, not their sum.
    """
    ledger = Ledger()
    calls: dict[tuple[str, int | None], tuple[int, int]] = {}
    for entry in entries:
        ledger.add(entry)
        key = (entry.kind, entry.layer)
        before = calls.get(key, (0, 0))
        calls[key] = (max(before[0], entry.calls), max(before[1], entry.rounds))
    if not alike:
        return ledger.entries()
    return tuple(
        Traffic(
            **entry.to_dict()
            | dict(zip(("calls", "rounds"), calls[entry.kind, entry.layer], strict=True))
        )
        for entry in ledger.entries()
    )
