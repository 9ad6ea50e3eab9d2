"""The slow tiers: where an expert is read from when it has no slot.

`DiskStore` reads byte ranges of the checkpoint in place, past the page cache; `ParameterStore`
holds the tensors of a model already in memory; `HostTier` keeps some experts in pinned memory.
Knows nothing of slots, policies or the executor.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_runtime.checkpoint import ExpertMap, Segment
from moe_runtime.core import ExpertId
from moe_runtime.errors import CheckpointError, ExpertReadError
from moe_runtime.filling import fill
from moe_runtime.model_spec import MoESpec
from moe_runtime.slots import SlotPool

__all__ = [
    "Bounce",
    "DiskStore",
    "HostTier",
    "ParameterStore",
    "Piece",
    "Store",
    "Tensors",
    "bounce_bytes",
    "read_range",
]

Tensors = tuple[torch.Tensor, ...]

# Direct reads need offset, length and memory in units of the device's logical block; 4096 serves
# every block size in use.
_BLOCK = 4096


def read_range(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        done += count
        if count == 0 or count % _BLOCK:
            break
    return done


def bounce_bytes(chunk: int) -> int:
    """Memory that one reader needs for pieces of up to `chunk` bytes."""
    return 2 * _round_up(chunk) + 2 * _BLOCK


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _BLOCK) * _BLOCK


class Bounce:
    """One reader's buffers for pieces of up to `chunk` bytes; owned by one thread at a time.

    Attributes:
        view, tensor, address: where an aligned read lands, `limit` bytes and a block on each side.
        scratch: uint8 `[limit]`, for a piece that is transposed on its way.
    """

    def __init__(self, chunk: int) -> None:
        self.limit = _round_up(chunk)
        whole = mmap.mmap(-1, bounce_bytes(chunk))
        self.view = memoryview(whole)[: self.limit + 2 * _BLOCK]
        self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self.scratch = torch.frombuffer(whole, dtype=torch.uint8)[self.limit + 2 * _BLOCK :]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one expert's transfer, small enough for a bounce buffer.

    Args:
        segment: the range that it belongs to.
        first: first row of the range, as stored.
        rows: rows of it.
    """

    segment: Segment
    first: int
    rows: int


class Store(Protocol):
    """A slow tier that can always deliver every expert."""

    def host_tensors(self, position: int, expert: int) -> Tensors | None:
        """The expert's tensors if they already lie in host memory, else None."""
        ...

    def pieces(self, position: int, expert: int) -> list[Piece]:
        """The reads that bring an expert in; independent of each other. Never mutates."""
        ...

    def read(
        self, position: int, expert: int, piece: Piece, target: Tensors, bounce: Bounce
    ) -> int:
        """Do one of them into `target` (host memory); bytes read from the device.

        Raises:
            ExpertReadError: names the expert, file and offset.
        """
        ...

    def close(self) -> None:
        """Release files; the store is of no use afterwards."""
        ...


class DiskStore:
    """Experts in the checkpoint's own files, read in place and never rewritten.

    Direct reads keep the page cache out of the memory that the process is charged for. Where a
    file system refuses them, reads are buffered and the cached pages dropped after each.
    """

    def __init__(self, experts: ExpertMap, spec: MoESpec, *, chunk: int) -> None:
        self._map = experts
        self._spec = spec
        self.chunk = chunk
        self._files: list[tuple[int, bool]] = []
        try:
            for path in experts.paths:
                self._files.append(_open(path))
        except OSError as error:
            self.close()
            raise CheckpointError(f"{error.filename}: cannot be opened ({error})") from error

    @property
    def direct(self) -> bool:
        """Whether every shard is read past the page cache."""
        return all(direct for _, direct in self._files)

    def host_tensors(self, position: int, expert: int) -> Tensors | None:
        """None: nothing is kept in memory."""
        return None

    def pieces(self, position: int, expert: int) -> list[Piece]:
        """Rows of each range in runs of at most `chunk` bytes (one row at the least)."""
        result: list[Piece] = []
        for segment in self._map.segments[position][expert]:
            rows = segment.shape[0]
            unit = 2 if segment.interleaved else 1
            each = max(1, self.chunk * rows // max(segment.nbytes, 1) // unit) * unit
            starts = range(0, rows, each)
            result += [Piece(segment, first, min(each, rows - first)) for first in starts]
        return result

    def read(
        self, position: int, expert: int, piece: Piece, target: Tensors, bounce: Bounce
    ) -> int:
        """Read the aligned superset into the bounce buffer, then copy and convert."""
        segment = piece.segment
        row_bytes = segment.nbytes // segment.shape[0]
        offset = segment.offset + piece.first * row_bytes
        nbytes = piece.rows * row_bytes
        destination = target[segment.param]
        plain = (
            destination.dtype == segment.dtype
            and not segment.transposed
            and not segment.interleaved
            and destination.is_contiguous()
        )
        start = segment.target(destination).data_ptr() if plain else 0
        begin = 0
        total = 0
        limit = bounce.limit
        # A single row may be larger than the buffer: then it goes in parts, in plain form only.
        while begin < nbytes:
            size = min(limit, nbytes - begin)
            inside, got = self._fill(position, expert, segment, offset + begin, size, bounce)
            total += got
            if plain:
                to = start + piece.first * row_bytes + begin
                ctypes.memmove(to, bounce.address + inside, size)
            else:
                self._convert(piece, destination, bounce, inside, size, nbytes)
            begin += size
        return total

    def _convert(
        self, piece: Piece, target: torch.Tensor, bounce: Bounce, inside: int, size: int, want: int
    ) -> None:
        segment = piece.segment
        assert size == want, "pieces that are converted fit the bounce buffer"
        if inside % segment.dtype.itemsize:
            # The stored bytes need not be aligned for their type.
            ctypes.memmove(bounce.address, bounce.address + inside, size)
            inside = 0
        stored = bounce.tensor[inside : inside + size].view(segment.dtype)
        stored = stored.view(piece.rows, *segment.shape[1:])
        fill(target, segment, piece.first, stored, bounce.scratch)

    def _fill(
        self, position: int, expert: int, segment: Segment, offset: int, size: int, bounce: Bounce
    ) -> tuple[int, int]:
        """Read `size` bytes; (their place in the buffer, bytes read)."""
        fd, direct = self._files[segment.file]
        start = offset // _BLOCK * _BLOCK
        stop = -(-(offset + size) // _BLOCK) * _BLOCK
        try:
            got = read_range(fd, bounce.view[: stop - start], start)
        except OSError as error:
            raise self._error(position, expert, segment, offset, str(error)) from error
        if got < offset + size - start:
            reason = f"the file ends at byte {os.fstat(fd).st_size}, it is truncated"
            raise self._error(position, expert, segment, offset, reason)
        if not direct:
            with contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)
        return offset - start, got

    def _error(
        self, position: int, expert: int, segment: Segment, offset: int, reason: str
    ) -> ExpertReadError:
        name = ExpertId(self._spec.layers[position].layer, expert)
        path = self._map.paths[segment.file]
        return ExpertReadError(f"{name}: cannot read {path} at byte {offset}: {reason}")

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            os.close(self._files.pop()[0])

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _open(path: str) -> tuple[int, bool]:
    """(descriptor, whether reads are direct); a trial read tells what the file system allows."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            fd = os.open(path, os.O_RDONLY | direct)
        except OSError:
            pass
        else:
            region = mmap.mmap(-1, _BLOCK)
            try:
                os.preadv(fd, [memoryview(region)], 0)
                return fd, True
            except OSError:
                os.close(fd)
    return os.open(path, os.O_RDONLY), False


class ParameterStore:
    """Experts that a model already holds in memory.

    Args:
        indexed: for each layer position, in the order of the layer's params, `[experts, ...]` or
            one tensor for each expert.
    """

    def __init__(self, indexed: Sequence[tuple[torch.Tensor | Tensors, ...]]) -> None:
        self._indexed = tuple(indexed)

    def host_tensors(self, position: int, expert: int) -> Tensors:
        """Views of the Parameters."""
        return tuple(tensor[expert] for tensor in self._indexed[position])

    def pieces(self, position: int, expert: int) -> list[Piece]:
        """Nothing to read."""
        return []

    def read(
        self, position: int, expert: int, piece: Piece, target: Tensors, bounce: Bounce
    ) -> int:
        """Never called: there are no pieces."""
        raise AssertionError("a parameter store has nothing to read")

    def close(self) -> None:
        """Nothing to release."""


class HostTier:
    """Pinned host memory between disk and GPU: experts once read stay here, LRU.

    Mutated under the executor's lock only. `claim` may evict; an expert between `claim` and
    `settle` is being written and is not handed out; one with a copy to the device under way is
    waited for before its memory is used again.

    Args:
        counts: slots of each expert shape.
        allocate: gives pinned memory.
        finish: blocks until a copy's token is done.
    """

    def __init__(
        self,
        spec: MoESpec,
        counts: Sequence[int],
        allocate: Callable[[int], torch.Tensor],
        finish: Callable[[Any], None],
    ) -> None:
        self._spec = spec
        self._finish = finish
        self._pools = [
            SlotPool(params, count, allocate)
            for params, count in zip(spec.groups, counts, strict=True)
        ]
        self._free = [list(range(count))[::-1] for count in counts]
        self._held: list[OrderedDict[tuple[int, int], int]] = [OrderedDict() for _ in counts]
        self._writing: dict[tuple[int, int], int] = {}
        self._leases: dict[tuple[int, int], Any] = {}
        # Beside copies, not in their place: one may still be under way when the host computes.
        self._computing: dict[tuple[int, int], Any] = {}

    def lease(self, position: int, expert: int, token: Any) -> None:
        """A copy out of this expert's memory is under way; `token` tells when it is done."""
        self._leases[(position, expert)] = token

    def compute(self, position: int, expert: int, token: Any) -> None:
        """This expert's memory is computed with until `token` is done."""
        self._computing[(position, expert)] = token

    def lookup(self, position: int, expert: int) -> Tensors | None:
        """The expert's pinned tensors, and mark it most recently used; None if it is not held."""
        group = self._spec.group_of(position)
        slot = self._held[group].get((position, expert))
        if slot is None:
            return None
        self._held[group].move_to_end((position, expert))
        return self._pools[group].tensors(slot)

    def claim(self, position: int, expert: int, busy: set[tuple[int, int]]) -> Tensors | None:
        """Memory to read this expert into, never that of a `busy` one; None if none can be had."""
        group = self._spec.group_of(position)
        if self._free[group]:
            slot = self._free[group].pop()
        else:
            victim = next((key for key in self._held[group] if key not in busy), None)
            if victim is None:
                return None
            # Waiting comes first: Ctrl-C in it leaves the victim where it is.
            self._finish(self._leases.get(victim))
            if victim in self._computing:
                self._finish(self._computing[victim])
            slot = self._held[group].pop(victim)
            self._leases.pop(victim, None)
            self._computing.pop(victim, None)
        self._writing[(position, expert)] = slot
        return self._pools[group].tensors(slot)

    def settle(self, position: int, expert: int, *, good: bool) -> None:
        """The read into claimed memory ended; a bad one gives the memory back."""
        slot = self._writing.pop((position, expert), None)
        if slot is None:
            return
        group = self._spec.group_of(position)
        if good:
            self._held[group][(position, expert)] = slot
        else:
            self._free[group].append(slot)

    def abandon(self) -> None:
        """No read goes on: what was claimed and not settled is free.

        Works from the state as it is, wherever it was interrupted.
        """
        self._writing.clear()
        for group, held in enumerate(self._held):
            taken = set(held.values())
            count = self._pools[group].count
            self._free[group] = [slot for slot in range(count) if slot not in taken][::-1]

    def check_integrity(self, in_flight: Collection[tuple[int, int]] = ()) -> None:
        """Assert that every slot is free, held or being written for a read in flight."""
        assert set(self._writing) <= set(in_flight), "memory is claimed that nobody reads into"
        for group, held in enumerate(self._held):
            used = [slot for key, slot in self._writing.items() if self._group(key) == group]
            slots = sorted([*self._free[group], *held.values(), *used])
            assert slots == list(range(self._pools[group].count)), "a host slot is lost or doubled"

    def _group(self, key: tuple[int, int]) -> int:
        return self._spec.group_of(key[0])
