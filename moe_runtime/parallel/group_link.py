"""A link over a process group of torch.distributed: gloo between CPUs, NCCL between GPUs.

Knows torch.distributed; not what is sent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moe_runtime.errors import ConfigError, ParallelError
from moe_runtime.parallel.board import Board
from moe_runtime.parallel.failures import (
    Failure,
    OthersFailedError,
    RankLostError,
    failures_as_bytes,
    failures_from_bytes,
)
from moe_runtime.parallel.link import Link, Parcel
from moe_runtime.parallel.waiting import came_gloo, came_other

__all__ = ["FRAMINGS", "GroupLink"]

FRAMINGS = ("eager", "sizes")
FAILED = 255  # the note of a rank that goes no further; its payload says why
_HEADER = 8  # bytes of an int64: size of the payload * 256 + note
_LOOK = 0.5  # seconds between looks at the board
_LOST = (RuntimeError, dist.DistError)
# By process group why it is of no use: what its ranks have sent last is not what comes next.
_SPOILT: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_EAGER = 1 << 20  # bytes, header included, that a first message may have
# How many links each group has had. A link's number is the tag of its messages: receives that it
# has posted ahead, and that nobody will answer any more, must not take what a later link is sent.
# No link has the tag by which connections are closed.
_TAGS: WeakKeyDictionary[Any, count[int]] = WeakKeyDictionary()


class GroupLink(Link):
    """A link over the default process group, or another.

    Receivers do not know how much will come. Two ways to tell them:

    * `"eager"` (gloo): every pair's message begins with a header of 8 bytes; the receiver holds
      1 MiB ready, and what is longer follows in a second message. One round a call. It rests on
      gloo's taking a message shorter than the buffer that waits for it, which is tried once here.
      Receives of the next call are posted as soon as those of this one are read: gloo sends only
      when it has been told of one, and told in the call itself that word would wait behind what
      this rank is sending to others (measured on four ranks: a third of an all-to-all's time).
    * `"sizes"` (all backends): an all-to-all of headers, then an all-to-all of what they announce.
      Two rounds a call.

    A rank that fails makes one call more than it would have, with `FAILED` for a note: the others
    are in that call already, or will be. Where it fails amid a call, it closes its connections
    (gloo), which ends whatever others wait for. Why it failed stands in its last message and on a
    board in the group's store, where others look when a connection is lost, and (`"sizes"`) every
    half second.

    Args:
        group: the process group; None for the default one.
        device: where rows are; the GPU of this process with NCCL.
        framing: one of `FRAMINGS`; None for eager where it works.
        latency, timeout: as for every link.

    Raises:
        ConfigError: no process group, or a framing that its backend does not have.
        ParallelError: the ranks did not come together in time, or one of this group has failed.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        device: torch.device | str = "cpu",
        framing: str | None = None,
        latency: float = 0.0,
        timeout: float = 120.0,
    ) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "torch.distributed has no process group: start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        super().__init__(
            rank=dist.get_rank(group),
            size=dist.get_world_size(group),
            device=torch.device(device),
            latency=latency,
            timeout=timeout,
        )
        backend = dist.get_backend(group)
        if framing not in (None, *FRAMINGS) or (framing == "eager" and backend != "gloo"):
            raise ConfigError(
                f"framing {framing!r} is not for backend {backend!r}; 'sizes' works with all, "
                "'eager' with gloo"
            )
        self._group = group
        self._over = _SPOILT.get(self._ranks())
        if self._over is not None:
            raise ParallelError(
                f"rank {self.rank}: this process group is of no use any more: {self._over}. Start "
                "the ranks again, or make a new process group"
            )
        self._gloo = backend == "gloo"
        self._board = Board(group, rank=self.rank, size=self.size)
        self._last_words: list[Any] = []
        self._told = False
        self._held: list[Any] = []
        self._tag = next(_TAGS.setdefault(self._ranks(), count(FAILED + 1)))
        self._eager = framing == "eager" or (framing is None and backend == "gloo")
        self._buffers = [torch.empty(_EAGER, dtype=torch.uint8) for _ in range(self.size)]
        self._waiting: dict[int, Any] = {}
        if self._eager and framing is None:
            self._eager = self._short_messages_arrive()

    @property
    def frame_bytes(self) -> int:
        """Of the header."""
        return _HEADER

    @property
    def rounds(self) -> int:
        """Two where sizes go ahead."""
        return 1 if self._eager else 2

    @property
    def framing(self) -> str:
        """How receivers learn sizes."""
        return FRAMINGS[0] if self._eager else FRAMINGS[1]

    def _swap(self, what: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        if self.size == 1:
            return parcels, 1
        try:
            return (self._swap_eager if self._eager else self._swap_sizes)(what, parcels)
        except ParallelError:
            raise
        except _LOST as error:
            failures = self._board.read()
            if failures:
                raise self._others_failed(what, failures) from error
            raise RankLostError(
                f"rank {self.rank}: {what} did not come to an end within {self.timeout:g} s, or "
                f"another rank has failed; look at the others' messages first ({error})"
            ) from error

    # -- failing ---------------------------------------------------------------------------------

    def leave(self, seconds: float = 2.0) -> None:
        """Before the process ends: wait so long at most until the others have this rank's word."""
        until = time.monotonic() + seconds
        with contextlib.suppress(*_LOST):
            for work in self._last_words:
                work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))
        self._last_words.clear()
        if self._told:
            self._board.wait_until_read(until - time.monotonic())

    def _tell(self, failure: Failure | None) -> None:
        self._spoilt()
        if self.size == 1:
            return
        if failure is not None:
            self._board.leave_word(failure)
            self._told = True
        try:
            if self._inside or failure is None:
                self._hang_up()
            else:
                self._send_word(failure)
        except _LOST:  # of one rank: the others are not to wait for it
            self._hang_up()

    def _send_word(self, failure: Failure) -> None:
        """Make one call more, which says that there are no others."""
        if self._eager:
            said = torch.frombuffer(bytearray(failures_as_bytes([failure])), dtype=torch.uint8)
            word = Parcel(payload=said[: _EAGER - _HEADER], note=FAILED)
            message = torch.cat([_header(word), word.payload])
            for rank in self._others():
                self._last_words.append(self._send(message, rank))
        else:
            word = Parcel(payload=torch.zeros(0, dtype=torch.uint8), note=FAILED)
            ahead = torch.cat([_header(word)] * self.size).to(self.device)
            self._last_words.append(self._all_to_all(torch.empty_like(ahead), ahead))

    def _hang_up(self) -> None:
        """Close the connections to all ranks: gloo does, when a wait comes to its time's end."""
        if not self._gloo:
            return
        never = torch.empty(1, dtype=torch.uint8)
        for sender in self._others():  # the first one that is still there will do
            with contextlib.suppress(*_LOST):
                work: Any = dist.irecv(never, group=self._group, group_src=sender, tag=FAILED)
                work.wait(timedelta(milliseconds=1))

    def _others_failed(self, what: str, failures: Sequence[Failure]) -> OthersFailedError:
        error = super()._others_failed(what, self._board.read() or failures)
        self._spoilt()
        return error

    def _spoilt(self) -> None:
        ranks = self._ranks()
        if ranks is not None:  # else it has been destroyed, and there is no link over it to come
            _SPOILT[ranks] = str(self._over)

    def _ranks(self) -> Any:
        """The process group. The default one is not kept: it is to end when it is destroyed."""
        return dist.group.WORLD if self._group is None else self._group

    def _others(self) -> list[int]:
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    # -- eager -----------------------------------------------------------------------------------

    def _swap_eager(self, what: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        others = self._others()
        sources = others[::-1]
        waiting = self._waiting or {rank: self._expect(rank) for rank in sources}
        self._waiting = {}
        sent: list[Any] = []
        # Until the call has come to its end: what is on its way must not go before.
        self._held = [waiting, sent]
        for rank in others:
            message = torch.cat([_header(parcels[rank]), parcels[rank].payload.to("cpu")])
            parts = [message[:_EAGER], message[_EAGER:]][: 1 + (len(message) > _EAGER)]
            sent += [self._send(part, rank) for part in parts]
        arrived = list(parcels)
        rest = []
        for rank in sources:
            self._finish(waiting[rank])
            size, note = _read(self._buffers[rank][:_HEADER])
            if note == FAILED:
                said = bytes(self._buffers[rank][_HEADER : _HEADER + size].numpy())
                raise self._others_failed(what, failures_from_bytes(said))
            payload = torch.empty(size, dtype=torch.uint8)
            first = min(size, _EAGER - _HEADER)
            payload[:first] = self._buffers[rank][_HEADER : _HEADER + first]
            if size > first:
                rest.append(self._receive(payload[first:], rank))
                self._held.append(rest)
            self._waiting[rank] = self._expect(rank)
            arrived[rank] = Parcel(payload=payload, note=note)
        for work in (*rest, *sent):
            self._finish(work)
        self._held = []
        return [_on(self.device, one) for one in arrived], 1

    def _short_messages_arrive(self) -> bool:
        """Whether a short message fills the beginning of a longer buffer, on every rank."""
        parcels = [
            Parcel(payload=torch.full((3,), rank, dtype=torch.uint8), note=1)
            for rank in range(self.size)
        ]
        arrived, _ = self._swap("the first message", parcels)
        good = all(
            one.note == 1 and one.payload.tolist() == [self.rank] * 3
            for rank, one in enumerate(arrived)
            if rank != self.rank
        )
        flag = torch.tensor([int(good)])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def _expect(self, rank: int) -> Any:
        """Be ready for the rank's next call."""
        return self._receive(self._buffers[rank], rank)

    def _send(self, part: torch.Tensor, rank: int) -> Any:
        return dist.isend(part, group=self._group, tag=self._tag, group_dst=rank)

    def _receive(self, buffer: torch.Tensor, rank: int) -> Any:
        return dist.irecv(buffer, group=self._group, tag=self._tag, group_src=rank)

    def _finish(self, work: Any) -> None:
        work.wait(timedelta(seconds=self.timeout))

    # -- sizes ahead -----------------------------------------------------------------------------

    def _swap_sizes(self, what: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        ahead = torch.cat([_header(parcel) for parcel in parcels]).to(self.device)
        headers = torch.empty_like(ahead)
        self._watched(what, self._all_to_all(headers, ahead))
        known = [_read(one) for one in headers.to("cpu").split(_HEADER)]
        gone = [rank for rank, (_, note) in enumerate(known) if note == FAILED]
        if gone:
            untold = [Failure(rank=rank, text="without a word") for rank in gone]
            raise self._others_failed(what, untold)
        sizes = [size for size, _ in known]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        payloads = [parcel.payload for parcel in parcels]
        own = [len(one) for one in payloads]
        self._watched(what, self._all_to_all(buffer, torch.cat(payloads), sizes, own))
        parts = buffer.split(sizes)
        return [Parcel(payload=p, note=n) for p, (_, n) in zip(parts, known, strict=True)], 2

    def _all_to_all(
        self, into: torch.Tensor, from_: torch.Tensor, sizes: Any = None, own_sizes: Any = None
    ) -> Any:
        return dist.all_to_all_single(
            into, from_, sizes, own_sizes, group=self._group, async_op=True
        )

    def _watched(self, what: str, work: Any) -> None:
        """Wait for a collective, and look at the board now and then: a rank that fails amid a call
        cannot send word, and NCCL's connections do not end with it.
        """
        until = time.monotonic() + self.timeout
        came = came_gloo if self._gloo else came_other
        while not came(work, min(_LOOK, until - time.monotonic())):
            failures = self._board.read()
            if failures:
                self._held = [work]  # it is still on its way
                raise self._others_failed(what, failures)
            if time.monotonic() > until:
                raise RuntimeError("the collective is not complete")
        work.wait()


def _header(parcel: Parcel) -> torch.Tensor:
    return torch.tensor([len(parcel.payload) * 256 + parcel.note]).view(torch.uint8)


def _read(header: torch.Tensor) -> tuple[int, int]:
    """Size and note."""
    return divmod(int(header.clone().view(torch.int64)), 256)


def _on(device: torch.device, parcel: Parcel) -> Parcel:
    return Parcel(payload=parcel.payload.to(device), note=parcel.note)
