"""Links between threads of one process: ranks for tests and small trials, without processes.

Knows threads; not what is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.link import Link, Parcel

__all__ = ["ThreadLink", "run_ranks", "thread_links"]

_Result = TypeVar("_Result")
_HEADER = 8  # what a frame would take between processes


class _LeftAloneError(ParallelError):
    """Another rank did not come: what it says itself tells more."""


class _Hub:
    """What the links of one set share: parcels on their way, and the step to go together."""

    def __init__(self, size: int) -> None:
        self.parcels: list[list[Parcel]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size)


class ThreadLink(Link):
    """One thread's link with the others; see `thread_links`."""

    def __init__(self, hub: _Hub, rank: int, size: int, *, latency: float, timeout: float) -> None:
        device = torch.device("cpu")
        super().__init__(rank=rank, size=size, device=device, latency=latency, timeout=timeout)
        self._hub = hub

    @property
    def frame_bytes(self) -> int:
        """As between processes."""
        return _HEADER

    def close(self) -> None:
        """Let the others' calls fail: this rank makes none any more."""
        self._hub.barrier.abort()

    def _swap(self, what: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        self._hub.parcels[self.rank] = parcels
        self._meet(what)
        arrived = [sent[self.rank] for sent in self._hub.parcels]
        self._meet(what)  # no rank puts new ones there before all have taken theirs
        return arrived, 1

    def _meet(self, what: str) -> None:
        try:
            self._hub.barrier.wait(self.timeout)
        except threading.BrokenBarrierError:
            raise _LeftAloneError(
                f"rank {self.rank}: {what} did not come to an end within {self.timeout:g} s, or "
                "another rank has failed; look at the others' messages first"
            ) from None


def thread_links(
    size: int, *, latency: float = 0.0, timeout: float = 120.0
) -> tuple[ThreadLink, ...]:
    """One link for each of `size` threads."""
    hub = _Hub(size)
    return tuple(
        ThreadLink(hub, rank, size, latency=latency, timeout=timeout) for rank in range(size)
    )


def run_ranks(
    work: Callable[[Link], _Result],
    size: int,
    *,
    latency: float = 0.0,
    timeout: float = 120.0,
) -> list[_Result]:
    """Run `work` on `size` threads, each with its link; the results by rank.

    Raises:
        Exception: the first rank's that failed by itself, not because another had.
    """
    links = thread_links(size, latency=latency, timeout=timeout)

    def one(link: ThreadLink) -> _Result:
        try:
            return work(link)
        except BaseException:
            link.close()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, link) for link in links]
        wait(futures)
    failures = [error for future in futures if (error := future.exception()) is not None]
    if failures:
        raise next((e for e in failures if not isinstance(e, _LeftAloneError)), failures[0])
    return [future.result() for future in futures]
