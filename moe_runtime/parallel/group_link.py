"""A link over a process group of torch.distributed: gloo between CPUs, NCCL between GPUs.

Knows torch.distributed; not what is sent.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moe_runtime.errors import ConfigError, ParallelError
from moe_runtime.parallel.link import Link, Parcel

__all__ = ["FRAMINGS", "GroupLink"]

FRAMINGS = ("eager", "sizes")
_HEADER = 8  # bytes of an int64: size of the payload * 256 + note
_EAGER = 1 << 20  # bytes, header included, that a first message may have

# How many links each group has had. A link's number is the tag of its messages: receives that it
# has posted ahead, and that nobody will answer any more, must not take what a later link is sent.
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

    Args:
        group: the process group; None for the default one.
        device: where rows are; the GPU of this process with NCCL.
        framing: one of `FRAMINGS`; None for eager where it works.
        latency, timeout: as for every link.

    Raises:
        ConfigError: no process group, or a framing that its backend does not have.
        ParallelError: the ranks did not come together in time.
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
        self._tag = next(_TAGS.setdefault(dist.group.WORLD if group is None else group, count(1)))
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
    def framing(self) -> str:
        """How receivers learn sizes."""
        return FRAMINGS[0] if self._eager else FRAMINGS[1]

    def _swap(self, what: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        if self.size == 1:
            return parcels, 1
        try:
            return (self._swap_eager if self._eager else self._swap_sizes)(parcels)
        except (RuntimeError, dist.DistError) as error:
            raise ParallelError(
                f"rank {self.rank}: {what} did not come to an end within {self.timeout:g} s, or "
                f"another rank has failed; look at the others' messages first ({error})"
            ) from error

    # -- eager -----------------------------------------------------------------------------------

    def _swap_eager(self, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        sources = [(self.rank - step) % self.size for step in range(1, self.size)]
        waiting = self._waiting or {rank: self._expect(rank) for rank in sources}
        self._waiting = {}
        sent = []
        for rank in sources[::-1]:
            message = torch.cat([_header(parcels[rank]), parcels[rank].payload.to("cpu")])
            parts = [message[:_EAGER], message[_EAGER:]][: 1 + (len(message) > _EAGER)]
            sent += [self._send(part, rank) for part in parts]
        arrived = list(parcels)
        rest = []
        for rank in sources:
            self._finish(waiting[rank])
            size, note = _read(self._buffers[rank][:_HEADER])
            payload = torch.empty(size, dtype=torch.uint8)
            first = min(size, _EAGER - _HEADER)
            payload[:first] = self._buffers[rank][_HEADER : _HEADER + first]
            if size > first:
                rest.append(self._receive(payload[first:], rank))
            self._waiting[rank] = self._expect(rank)
            arrived[rank] = Parcel(payload=payload, note=note)
        for work in (*rest, *sent):
            self._finish(work)
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

    def _swap_sizes(self, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        ahead = torch.cat([_header(parcel) for parcel in parcels]).to(self.device)
        headers = torch.empty_like(ahead)
        self._all_to_all(headers, ahead, None, None)
        known = [_read(one) for one in headers.to("cpu").split(_HEADER)]
        sizes = [size for size, _ in known]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        payloads = [parcel.payload for parcel in parcels]
        self._all_to_all(buffer, torch.cat(payloads), sizes, [len(one) for one in payloads])
        parts = buffer.split(sizes)
        return [Parcel(payload=p, note=n) for p, (_, n) in zip(parts, known, strict=True)], 2

    def _all_to_all(
        self, into: torch.Tensor, from_: torch.Tensor, sizes: Any, own_sizes: Any
    ) -> None:
        self._finish(
            dist.all_to_all_single(into, from_, sizes, own_sizes, group=self._group, async_op=True)
        )


def _header(parcel: Parcel) -> torch.Tensor:
    return torch.tensor([len(parcel.payload) * 256 + parcel.note]).view(torch.uint8)


def _read(header: torch.Tensor) -> tuple[int, int]:
    """Size and note."""
    return divmod(int(header.clone().view(torch.int64)), 256)


def _on(device: torch.device, parcel: Parcel) -> Parcel:
    return Parcel(payload=parcel.payload.to(device), note=parcel.note)
