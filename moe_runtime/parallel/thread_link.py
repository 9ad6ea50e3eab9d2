"""Links between threads of one process: ranks for tests and small trials, without processes.

Knows threads; not what is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from moe_runtime.parallel.failures import Failure, OthersFailedError
from moe_runtime.parallel.link import Link, Parcel

__all__ = ["ThreadLink", "run_ranks", "thread_links"]

_Result = TypeVar("_Result")
_HEADER = 8  # what a frame would take between processes


class _Hub:
    """What the links of one set share: parcels on their way, the step to go together, and who has
    failed, the first one first.
    """

    def __init__(self, size: int) -> None:
        self.parcels: list[list[Parcel]] = [[] for _ in range(size)]
        self.failures: list[Failure] = []
        self._size, self._here, self._times = size, 0, 0
        self._broken = False
        self._changed = threading.Condition()

    def meet(self, timeout: float) -> bool:
        """Wait for all; whether they came. Whoever has met is not disturbed by a later `leave`."""
        with self._changed:
            if self._broken:
                return False
            times = self._times
            self._here += 1
            if self._here == self._size:
                self._here, self._times = 0, times + 1
                self._changed.notify_all()
                return True
            self._changed.wait_for(lambda: self._broken or self._times != times, timeout)
            if self._times != times:
                return True
            self._break()
            return False

    def leave(self, failure: Failure | None) -> None:
        """One rank comes no more."""
        with self._changed:
            if failure is not None:
                self.failures.append(failure)
            self._break()

    def _break(self) -> None:
        self._broken = True
        self._changed.notify_all()


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

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Of all ranks, the first one first."""
        return tuple(self._hub.failures)

    def close(self) -> None:
        """Let the others' calls fail: this rank makes none any more."""
        self._hub.leave(None)

    def _tell(self, failure: Failure | None) -> None:
        self._hub.leave(failure)

    def _swap(self, what: str, parcels: list[Parcel]) -> tuple[list[Parcel], int]:
        self._hub.parcels[self.rank] = parcels
        self._meet(what)
        arrived = [sent[self.rank] for sent in self._hub.parcels]
        self._meet(what)  # no rank puts new ones there before all have taken theirs
        return arrived, 1

    def _meet(self, what: str) -> None:
        if self._hub.meet(self.timeout):
            return
        if self._hub.failures:
            raise self._others_failed(what, self._hub.failures)
        self._over = (
            f"{what} did not come to an end within {self.timeout:g} s, or another rank has left"
        )
        raise OthersFailedError(
            f"rank {self.rank}: {self._over}; look at the others' messages first"
        )


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
        BaseException: of the rank that failed first; of several that raise alike, the lowest one's.
    """
    links = thread_links(size, latency=latency, timeout=timeout)

    def one(link: ThreadLink) -> _Result:
        try:
            with link.telling():
                return work(link)
        except BaseException:
            link.close()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, link) for link in links]
        wait(futures)
    errors = {rank: e for rank, one in enumerate(futures) if (e := one.exception()) is not None}
    if errors:
        first = next((one.rank for one in links[0].failures if one.rank in errors), None)
        well = [rank for rank, e in errors.items() if not isinstance(e, OthersFailedError)]
        raise errors[first if first is not None else [*well, *errors][0]]
    return [future.result() for future in futures]
