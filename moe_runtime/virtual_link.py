"""`VirtualLink`: transfers of experts on a simulated clock, in place of threads and streams.

Knows bytes and seconds; not what is moved, nor why.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.prefetch import LinkMeter

__all__ = ["LinkModel", "VirtualClock", "VirtualLink"]


@dataclass(frozen=True, kw_only=True)
class LinkModel:
    """What brings experts from the slow tier.

    A transfer takes its latency and then its turn on the link; `parallel` transfers may be begun at
    once, whose latencies overlap while their bytes still come one after another.

    Args:
        bytes_per_second: while bytes flow; finite, above 0.
        latency: seconds from the begin of a transfer to its first byte.
        parallel: transfers begun at once, 1 or more.

    Raises:
        ConfigError: on construction, for numbers out of range.
    """

    bytes_per_second: float
    latency: float = 0.0
    parallel: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_second < math.inf:
            raise ConfigError(
                f"a link needs a finite rate above 0, found {self.bytes_per_second!r} bytes/s"
            )
        if not 0 <= self.latency < math.inf:
            raise ConfigError(f"latency must be 0 seconds or more, found {self.latency!r}")
        if not isinstance(self.parallel, int) or self.parallel < 1:
            raise ConfigError(f"parallel must be 1 transfer or more, found {self.parallel!r}")


@dataclass
class VirtualClock:
    """Simulated seconds; call it for the time, as `time.perf_counter`."""

    now: float = 0.0

    def __call__(self) -> float:
        """Seconds since the begin of the simulation."""
        return self.now

    def pass_(self, seconds: float) -> None:
        """Let time pass."""
        assert seconds >= 0, "time does not run backwards"
        self.now += seconds


@dataclass(eq=False)
class _Transfer:
    """One expert on its way; meets `moe_runtime.loader.Arrival`."""

    position: int
    expert: int
    nbytes: int
    ahead: bool
    end: float = math.nan  # unknown until it has begun
    from_host: bool = False
    withdrawn: bool = False
    token: Any = None
    error: BaseException | None = None

    @property
    def begun(self) -> bool:
        """Whether it can no longer be called off."""
        return not math.isnan(self.end)


class VirtualLink:
    """Implements `moe_runtime.loader.Transfers` in virtual time, after the rules of `Fetcher`.

    What is needed goes before what is ahead; a transfer under way is not interrupted; a promoted
    one goes first of all; one that is called off is dropped if it has not begun, else it ends
    whole. An expert is one piece here, where the fetcher's may be several.

    Args:
        model: of the link.
        clock: read, and moved on by waiting.
        expert_bytes: bytes of one expert of each layer position.
    """

    def __init__(self, model: LinkModel, clock: VirtualClock, expert_bytes: Sequence[int]) -> None:
        self.model = model
        self._clock = clock
        self._bytes = expert_bytes
        self._needed: deque[_Transfer] = deque()
        self._ahead: deque[_Transfer] = deque()
        self._busy: list[tuple[float, int, _Transfer]] = []  # a heap by end
        self._number = itertools.count()  # the order of beginning, where ends are equal
        self._finished: deque[_Transfer] = deque()
        self._in_flight: dict[tuple[int, int], _Transfer] = {}
        self._free_at = 0.0  # when the bytes of all that has begun are there
        self._meter = LinkMeter()
        self.busy_seconds = 0.0  # in which bytes flowed or a latency passed unhidden

    @property
    def in_flight(self) -> int:
        """Transfers started and not yet taken."""
        return len(self._in_flight)

    @property
    def busy_bytes(self) -> int:
        """Their bytes."""
        return sum(self._bytes[position] for position, _ in self._in_flight)

    @property
    def rate(self) -> float | None:
        """Bytes a second while busy, measured as in a real run; None before it is known."""
        self._catch_up(self._clock.now)
        return self._meter.rate

    def start(self, position: int, expert: int, *, ahead: bool) -> None:
        """Begin to bring an expert, now if the link has room, else in its turn."""
        now = self._clock.now
        self._catch_up(now)
        transfer = _Transfer(position, expert, self._bytes[position], ahead)
        self._in_flight[position, expert] = transfer
        (self._ahead if ahead else self._needed).append(transfer)
        self._begin(now)

    def next_finished(self) -> tuple[_Transfer, float]:
        """The next to end, and the seconds waited for it, by which the clock moves on."""
        begin = self._clock.now
        self._catch_up(begin)
        if not self._finished:
            assert self._busy, "waiting for nothing"
            self._clock.now = max(begin, self._busy[0][0])
            self._catch_up(self._clock.now)
        transfer = self._finished.popleft()
        del self._in_flight[transfer.position, transfer.expert]
        return transfer, self._clock.now - begin

    def has_finished(self) -> bool:
        """Whether `next_finished` would return at once."""
        self._catch_up(self._clock.now)
        return bool(self._finished)

    def promote(self, position: int, expert: int) -> None:
        """What is on its way ahead is needed now: it goes first."""
        self._catch_up(self._clock.now)
        transfer = self._in_flight[position, expert]
        transfer.ahead = False
        if transfer in self._ahead:
            self._ahead.remove(transfer)
            self._needed.appendleft(transfer)

    def withdraw(self, position: int, expert: int) -> bool:
        """Call it off; True if it had not begun. Else it ends whole."""
        self._catch_up(self._clock.now)
        transfer = self._in_flight[position, expert]
        if transfer.begun:
            return False
        self._ahead.remove(transfer)
        del self._in_flight[position, expert]
        return True

    def done(self, token: Any) -> bool:
        """There is no device whose copies come later."""
        return True

    def wait(self, token: Any) -> None:
        """As `done`."""

    def cancel(self) -> None:
        """Drop what has not begun, wait for the rest."""
        self._catch_up(self._clock.now)
        self._needed.clear()
        self._ahead.clear()
        self._clock.now = max(self._clock.now, self._free_at if self._busy else 0.0)
        self._catch_up(self._clock.now)
        self._finished.clear()
        self._in_flight.clear()

    def _catch_up(self, now: float) -> None:
        """Everything that has ended and begun by now, in order of time."""
        while self._busy and self._busy[0][0] <= now:
            end, _, transfer = heapq.heappop(self._busy)
            self._meter.add(transfer.nbytes, end)
            self._finished.append(transfer)
            self._begin(end)

    def _begin(self, now: float) -> None:
        while (self._needed or self._ahead) and len(self._busy) < self.model.parallel:
            transfer = self._needed.popleft() if self._needed else self._ahead.popleft()
            if not self._busy:
                self._meter.begin(now)
            first_byte = max(now + self.model.latency, self._free_at)
            transfer.end = first_byte + transfer.nbytes / self.model.bytes_per_second
            self.busy_seconds += transfer.end - max(now, self._free_at)
            self._free_at = transfer.end
            heapq.heappush(self._busy, (transfer.end, next(self._number), transfer))
