"""Where failed ranks leave word: keys in the store that a process group was made with.

It can be read when connections between ranks are lost. Knows torch.distributed's stores; not who
reads, and when.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import torch.distributed as dist

from moe_runtime.parallel.failures import Failure, failures_as_bytes, failures_from_bytes

__all__ = ["Board"]

_PLACE = "moe_runtime.parallel"
# Raised when the process that keeps the store is gone, an operation or the group itself.
_LOST = (RuntimeError, dist.DistError, ValueError, AttributeError)


class Board:
    """Word of failed ranks; where there is no store, or it is gone, nobody has left any.

    Args:
        group: a process group of torch.distributed; None for the default one. Nothing of it is
            kept, so that it ends when it is destroyed.
        rank, size: in the group.
    """

    def __init__(self, group: Any, *, rank: int, size: int) -> None:
        self._group, self._rank, self._size = group, rank, size
        with contextlib.suppress(*_LOST):
            # A group that is made anew may have the store of one that failed.
            for key in (self._key(rank), self._seen(rank)):
                self._store().delete_key(key)

    def leave_word(self, failure: Failure) -> None:
        """Say that this rank has failed, once."""
        with contextlib.suppress(*_LOST):
            store = self._store()
            order = int(store.add(f"{_PLACE}/order", 1))
            word = json.dumps([order, failures_as_bytes([failure]).decode()])
            store.set(self._key(self._rank), word)

    def read(self) -> tuple[Failure, ...]:
        """Word of others, in the order in which they failed."""
        found: list[tuple[int, Failure]] = []
        with contextlib.suppress(*_LOST):
            store = self._store()
            for rank in range(self._size):
                if rank != self._rank and store.check([self._key(rank)]):
                    order, said = json.loads(store.get(self._key(rank)))
                    found += [(order, one) for one in failures_from_bytes(said.encode())]
            if found:
                store.set(self._seen(self._rank), "")
        return tuple(one for _, one in sorted(found, key=lambda pair: pair[0]))

    def wait_until_read(self, seconds: float) -> None:
        """Wait so long at most until every other rank has read word of some failure, or left one.

        The store may end with this process.
        """
        until = time.monotonic() + seconds
        others = [rank for rank in range(self._size) if rank != self._rank]
        with contextlib.suppress(*_LOST):
            store = self._store()
            while others and time.monotonic() < until:
                others = [
                    rank
                    for rank in others
                    if not store.check([self._seen(rank)]) and not store.check([self._key(rank)])
                ]
                time.sleep(0.005 if others else 0.0)

    def _store(self) -> Any:
        group = dist.group.WORLD if self._group is None else self._group
        return group.get_group_store()  # type: ignore[union-attr]

    @staticmethod
    def _key(rank: int) -> str:
        return f"{_PLACE}/failed/{rank}"

    @staticmethod
    def _seen(rank: int) -> str:
        return f"{_PLACE}/seen/{rank}"
