"""`Link`: rows of tensors from each rank to each other, packed, counted and timed.

Knows ranks and bytes. Knows no models, experts or plans; how buffers travel is its subclasses'.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from moe_runtime.errors import ConfigError, ParallelError
from moe_runtime.parallel.failures import (
    Failure,
    OthersFailedError,
    RankLostError,
    failure_of,
)
from moe_runtime.parallel.packing import packed, row_bytes, unpacked
from moe_runtime.parallel.traffic import Ledger, Traffic

__all__ = ["Arrival", "Link", "Parcel"]

_MOST_NOTES = 255  # notes of a byte; the last one says that a rank has failed
_OfError = TypeVar("_OfError", bound=BaseException)


@dataclass(frozen=True, kw_only=True, eq=False)
class Parcel:
    """What one rank sends to one other in one call: uint8 `[bytes]`, and a note of 0 to 254."""

    payload: torch.Tensor
    note: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """What arrived in one exchange.

    Args:
        rows: each tensor that was sent `[n, ...]`, by source rank, then in the order sent.
        source: int64 `[n]`, the rank that each row came from.
        notes: the note of each rank, this one's included.
    """

    rows: list[torch.Tensor]
    source: torch.Tensor
    notes: tuple[int, ...]


class Link(ABC):
    """The connection of one rank with all others. Every rank makes the same calls, in one order.

    A rank that fails says so (`telling`), and the others' next or present call ends with its word;
    one that hangs is noticed after `timeout`, one that dies as soon as its connections are closed.
    The link is of no use then: ranks are no longer at the same call.

    Args:
        rank: this one's number, `0..size-1`.
        size: number of ranks.
        device: where rows are received.
        latency: seconds slept in each round of each call, to stand for a slower link in
            experiments; counted as `slept_seconds`.
        timeout: seconds to wait for the others in one call.

    Attributes:
        ledger: what went over this link so far.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        device: torch.device,
        latency: float = 0.0,
        timeout: float = 120.0,
    ) -> None:
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} is none of {size} ranks; ranks are 0 to {size - 1}")
        if not 0.0 <= latency < timeout:
            raise ConfigError(
                f"latency is seconds, 0 or more and below the timeout of {timeout}; found {latency}"
            )
        self.rank, self.size, self.device = rank, size, device
        self.latency, self.timeout = latency, timeout
        self.ledger = Ledger()
        self._over: str | None = None  # why this link is of no use any more
        self._inside = False  # a call has begun and not come to its end
        self._agreed = False  # since the last call all ranks have raised an error alike

    # -- failing ---------------------------------------------------------------------------------

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Inside, an error that leaves is told to the others, who raise `OthersFailedError`.

        Nothing is told of errors that all ranks raise alike (`agreed`), or know of already. Around
        everything between two calls that can fail on one rank alone; may be nested.
        """
        self._agreed = False
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def agreed(self, error: _OfError) -> _OfError:
        """The error, which every rank raises at this place: nobody needs to be told of it, and the
        link stays of use.
        """
        self._agreed = True
        return error

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank makes no call any more, and why; waits for nobody."""
        if self._over is None and not self._agreed:
            failure = failure_of(self.rank, error)
            self._over = str(failure)
            # Of a loss others are not told as if it were this rank's fault: they see it themselves.
            self._tell(None if isinstance(error, RankLostError) else failure)

    @property
    def rounds(self) -> int:
        """Messages of a call that have to arrive one after the other."""
        return 1

    @property
    def over(self) -> bool:
        """Whether the link is of no use any more."""
        return self._over is not None or self._inside

    def _others_failed(self, what: str, failures: Sequence[Failure]) -> OthersFailedError:
        """The error to raise in a call that others' failure has ended; they need no word of it."""
        self._over = "; ".join(map(str, failures)) or "another rank went without a word"
        return OthersFailedError(f"rank {self.rank} stops in {what}: {self._over}", failures)

    # -- what subclasses do ----------------------------------------------------------------------

    @abstractmethod
    def _swap(self, what: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        """Give each rank its parcel, by rank, this one's included; mutates nothing.

        Returns:
            The parcels from each rank, by rank, and the rounds that it took.

        Raises:
            OthersFailedError: a rank failed and said so.
            RankLostError: a rank was lost or late; the text names `what`.
        """

    @abstractmethod
    def _tell(self, failure: Failure | None) -> None:
        """End the others' next or present call, with this if it is given; waits for nobody, raises
        nothing.
        """

    @property
    @abstractmethod
    def frame_bytes(self) -> int:
        """Bytes that go to each other rank in one call beside the payload."""

    # -- calls -----------------------------------------------------------------------------------

    def exchange(
        self, kind: str, layer: int | None, rows: Sequence[torch.Tensor], to: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Send each row to a rank: one all-to-all.

        Args:
            kind, layer: what it is counted under.
            rows: tensors `[n, ...]` of any dtypes; row i of all of them goes together. Trailing
                shapes and dtypes are the same on all ranks.
            to: int64 `[n]`, the rank that each row goes to; this one is allowed.

        Returns:
            The rows that arrived, by source rank, then in the order sent, and their source ranks.
        """
        arrival = self.exchange_noted(kind, layer, rows, to)
        return arrival.rows, arrival.source

    def exchange_noted(
        self,
        kind: str,
        layer: int | None,
        rows: Sequence[torch.Tensor],
        to: torch.Tensor,
        note: int = 0,
    ) -> Arrival:
        """`exchange`, with a small number that every rank gets to know of every other.

        It rides in the frame that is sent in any case, so that it costs nothing.
        """
        assert 0 <= note < _MOST_NOTES, "a note is a byte"
        to = to.to(self.device)
        order = torch.argsort(to, stable=True)
        counts = torch.bincount(to, minlength=self.size).tolist()
        assert len(counts) == self.size, "rows go to ranks that exist"
        ends = torch.tensor(counts).cumsum(0).tolist()
        parcels = [
            Parcel(payload=packed(rows, order[end - count : end]), note=note)
            for count, end in zip(counts, ends, strict=True)
        ]
        return self._call(kind, layer, rows, parcels, counts)

    def gather(
        self, kind: str, layer: int | None, rows: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Hand rows to all: one all-gather, of numbers of rows that may differ between ranks.

        Args:
            rows: tensors `[n, ...]`, as in `exchange`.

        Returns:
            The rows of all ranks, in the order of ranks; the same on each of them.
        """
        count = len(rows[0])
        payload = packed(rows, torch.arange(count, device=self.device))
        parcels = [Parcel(payload=payload)] * self.size
        return self._call(kind, layer, rows, parcels, [count] * self.size).rows

    def gather_groups(
        self, kinds: Sequence[str], groups: Sequence[Sequence[torch.Tensor]]
    ) -> list[Arrival]:
        """Several `gather`s in one all-gather.

        Args:
            kinds: what the rows of each group are counted under; the call under the first.
            groups: of each group its tensors `[n, ...]`; groups differ in `n`.

        Returns:
            Of each group the rows of all ranks, in the order of ranks, and where they came from.
        """
        counts = torch.tensor([len(rows[0]) for rows in groups])
        every = [torch.arange(int(count), device=self.device) for count in counts]
        parts = [packed(rows, chosen) for rows, chosen in zip(groups, every, strict=True)]
        ahead = counts.view(torch.uint8).to(self.device)
        payload = torch.cat([ahead, *parts])
        arrived, rounds = self._timed(kinds[0], [Parcel(payload=payload)] * self.size)
        others = self.size - 1
        for at, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
            count = int(counts[at])
            self.ledger.add(
                Traffic(
                    kind=kind,
                    calls=int(at == 0),
                    rounds=rounds * (at == 0),
                    rows=count * others,
                    bytes=len(part) * others,
                    frame_bytes=(self.frame_bytes + len(ahead)) * others * (at == 0),
                    kept_rows=count,
                    kept_bytes=len(part),
                )
            )
        return self._ungrouped(groups, [one.payload for one in arrived])

    def _ungrouped(
        self, groups: Sequence[Sequence[torch.Tensor]], payloads: list[torch.Tensor]
    ) -> list[Arrival]:
        width = 8 * len(groups)
        numbers = [one[:width].to("cpu").clone().view(torch.int64).tolist() for one in payloads]
        starts = [width] * self.size
        found = []
        for at, rows in enumerate(groups):
            sizes = [row_bytes(rows) * counts[at] for counts in numbers]
            parts = [p[s : s + n] for p, s, n in zip(payloads, starts, sizes, strict=True)]
            starts = [s + n for s, n in zip(starts, sizes, strict=True)]
            here = [counts[at] for counts in numbers]
            source = torch.repeat_interleave(torch.arange(self.size), torch.tensor(here))
            found.append(
                Arrival(rows=unpacked(rows, parts, here), source=source.to(self.device), notes=())
            )
        return found

    def agree(self, what: str, value: Any) -> list[Any]:
        """Every rank's value, by rank. For setting up: values are sent as JSON.

        Raises:
            ParallelError: `value` is no plain data.
        """
        try:
            text = json.dumps(value, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ParallelError(f"{what}: only plain data can be sent to ranks ({error})") from None
        payload = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        arrived = self._round(f"agree:{what}", None, [Parcel(payload=payload)] * self.size, None)
        return [json.loads(bytes(one.payload.to("cpu").numpy())) for one in arrived]

    # -- inside ----------------------------------------------------------------------------------

    def _call(
        self,
        kind: str,
        layer: int | None,
        rows: Sequence[torch.Tensor],
        parcels: list[Parcel],
        counts: list[int],
    ) -> Arrival:
        arrived = self._round(kind, layer, parcels, counts)
        width = row_bytes(rows)
        numbers = [len(one.payload) // width for one in arrived]
        source = torch.repeat_interleave(torch.arange(self.size), torch.tensor(numbers))
        return Arrival(
            rows=unpacked(rows, [one.payload for one in arrived], numbers),
            source=source.to(self.device),
            notes=tuple(one.note for one in arrived),
        )

    def _timed(self, place: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        """One swap, its waiting timed and the latency slept."""
        if self.over:
            raise ParallelError(
                f"rank {self.rank}: this link is of no use for {place}, since ranks are no longer "
                f"at the same call: {self._over or 'a call on it did not come to its end'}. Start "
                "the ranks again, or give them a new process group"
            )
        self._agreed, self._inside = False, True
        began = time.perf_counter()
        arrived, rounds = self._swap(place, parcels)
        self._inside = False
        self.ledger.idle_seconds += time.perf_counter() - began
        if self.latency:
            began = time.perf_counter()
            time.sleep(self.latency * rounds)
            self.ledger.slept_seconds += time.perf_counter() - began
        return arrived, rounds

    def _round(
        self, kind: str, layer: int | None, parcels: list[Parcel], counts: list[int] | None
    ) -> list[Parcel]:
        """One call, timed and counted; `counts` of rows by rank, None for one a rank."""
        place = kind if layer is None else f"{kind} of layer {layer}"
        arrived, rounds = self._timed(place, parcels)
        sizes = [len(parcel.payload) for parcel in parcels]
        counts = [1] * self.size if counts is None else counts
        self.ledger.add(
            Traffic(
                kind=kind,
                layer=layer,
                calls=1,
                rounds=rounds,
                rows=sum(counts) - counts[self.rank],
                bytes=sum(sizes) - sizes[self.rank],
                frame_bytes=self.frame_bytes * (self.size - 1),
                kept_rows=counts[self.rank],
                kept_bytes=sizes[self.rank],
            )
        )
        return arrived
