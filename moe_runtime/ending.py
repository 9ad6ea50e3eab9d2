"""When threads of ours end: with their owner, or with the program.

Does not know what the threads do.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol

__all__ = ["Workers", "end_with"]


class Workers(Protocol):
    """Threads and what they hold."""

    def leave(self) -> None:
        """Tell the threads to end, without waiting for them."""
        ...

    def close(self) -> None:
        """End the threads and wait for them."""
        ...


_OPEN: weakref.WeakSet[Workers] = weakref.WeakSet()


def end_with(owner: object, workers: Workers) -> None:
    """End threads with their owner: told to when it is collected, waited for when the program ends.

    Garbage may be collected anywhere: in one of the threads themselves, which cannot wait for
    itself, or in the middle of another model's call, where a Ctrl-C would be lost while it waits.
    A program that ends waits, since memory is taken away from the threads then.
    """
    weakref.finalize(owner, workers.leave).atexit = False
    _OPEN.add(workers)


@atexit.register
def _close_all() -> None:
    for workers in list(_OPEN):
        workers.close()
