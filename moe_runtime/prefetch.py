"""Transfers from the slow tiers into slots: reader threads, host copies, the in-flight table.

Decides nothing: it moves what it is asked to move, in the order asked, and tells in which order
the transfers end. Knows stores and the device layer; not policies, not routing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_runtime.device import Device
from moe_runtime.model_spec import ExpertParam
from moe_runtime.store import Bounce, HostTier, Piece, Store, Tensors

__all__ = ["Fetch", "Fetcher"]


@dataclass(eq=False)
class Fetch:
    """One expert on its way into a slot."""

    position: int
    expert: int
    target: Tensors
    landing: Tensors
    after: Any = None
    remaining: int = 0
    nbytes: int = 0
    from_host: bool = False
    token: Any = None
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> tuple[int, int]:
        """(layer position, expert)."""
        return (self.position, self.expert)


class Fetcher:
    """Reader threads over one store.

    `submit` and `next_finished` are called by one thread at a time (the executor holds its lock);
    the readers only touch their own queue and the fetches handed to them.
    """

    def __init__(
        self,
        store: Store,
        device: Device,
        *,
        threads: int,
        chunk: int,
        host: HostTier | None = None,
    ) -> None:
        self._store = store
        self._device = device
        self._host = host
        self._chunk = chunk
        self._wanted = threads
        self._threads: list[threading.Thread] = []
        self._work: deque[tuple[Fetch, Piece] | None] = deque()
        self._wake = threading.Condition()
        self._busy = 0
        self._ready = threading.Semaphore(0)
        self._finished: queue.SimpleQueue[Fetch] = queue.SimpleQueue()
        self._in_flight: dict[tuple[int, int], Fetch] = {}

    @property
    def in_flight(self) -> int:
        """Fetches submitted and not yet taken by `next_finished`."""
        return len(self._in_flight)

    def submit(self, position: int, expert: int, target: Tensors, *, after: Any = None) -> None:
        """Start to bring an expert into `target`.

        Args:
            target: the slot's tensors.
            after: a device fence that the copy into the slot must not overtake.
        """
        fetch = Fetch(position, expert, target, target, after)
        self._in_flight[fetch.key] = fetch
        held = self._store.host_tensors(position, expert)
        if held is None and self._host is not None:
            held = self._host.lookup(position, expert)
        if held is not None:
            fetch.from_host = True
            fetch.nbytes = sum(t.numel() * t.element_size() for t in held)
            fetch.token = self._device.copy(list(zip(target, held, strict=True)), after)
            if self._host is not None:
                self._host.lease(position, expert, fetch.token)
            self._finished.put(fetch)
            return
        if self._host is not None:
            landing = self._host.claim(position, expert, set(self._in_flight))
            assert landing is not None, "the host tier has a slot for each fetch in flight"
            fetch.landing = landing
        pieces = self._store.pieces(position, expert)
        fetch.remaining = len(pieces)
        self._start_threads()
        with self._wake:
            self._work.extend((fetch, piece) for piece in pieces)
            self._wake.notify(len(pieces))

    def next_finished(self) -> tuple[Fetch, float]:
        """The next fetch to end, and the seconds waited for it.

        Raises:
            ExpertReadError: the read failed; the expert is not in its slot.
        """
        begin = time.perf_counter()
        fetch = self._finished.get()
        waited = time.perf_counter() - begin
        del self._in_flight[fetch.key]
        if self._host is not None and not fetch.from_host:
            self._host.settle(*fetch.key, good=fetch.error is None)
            if fetch.error is None:
                pairs = list(zip(fetch.target, fetch.landing, strict=True))
                fetch.token = self._device.copy(pairs, fetch.after)
                self._host.lease(*fetch.key, fetch.token)
        if fetch.error is not None:
            raise fetch.error
        return fetch, waited

    def read_now(self, position: int, expert: int, params: Sequence[ExpertParam]) -> Tensors:
        """Read one expert into fresh host memory, on the calling thread.

        Raises:
            ExpertReadError: names the expert, file and offset.
        """
        held = self._store.host_tensors(position, expert)
        if held is not None:
            return tuple(tensor.clone() for tensor in held)
        target = tuple(torch.empty(param.shape, dtype=param.dtype) for param in params)
        bounce = Bounce(self._chunk)
        for piece in self._store.pieces(position, expert):
            self._store.read(position, expert, piece, target, bounce)
        return target

    def has_finished(self) -> bool:
        """Whether `next_finished` would return at once."""
        return not self._finished.empty()

    def cancel(self) -> None:
        """Drop what has not begun, wait for what has; afterwards nothing is in flight."""
        with self._wake:
            self._work.clear()
            while self._busy:
                self._wake.wait()
        while not self._finished.empty():
            self._device.finish(self._finished.get().token)
        for key in self._in_flight:
            if self._host is not None:
                self._host.settle(*key, good=False)
        self._in_flight.clear()

    def close(self) -> None:
        """End the threads and release the store."""
        self.cancel()
        with self._wake:
            self._work.extend([None] * len(self._threads))
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._store.close()

    def _start_threads(self) -> None:
        if len(self._threads) == self._wanted:
            return
        threads = torch.get_num_threads()
        while len(self._threads) < self._wanted:
            # Daemons: a program that ends without closing the model must not hang.
            thread = threading.Thread(target=self._read_forever, name="expert-reader", daemon=True)
            thread.start()
            self._threads.append(thread)
            self._ready.acquire()
        torch.set_num_threads(threads)

    def _read_forever(self) -> None:
        # PyTorch's thread count is one for each thread: a reader's copies must not start compute
        # threads of their own. Asking first makes the count this thread's; `_start_threads` puts
        # back what new threads begin with.
        torch.get_num_threads()
        torch.set_num_threads(1)
        self._ready.release()
        bounce = Bounce(self._chunk)
        while True:
            with self._wake:
                while not self._work:
                    self._wake.wait()
                item = self._work.popleft()
                if item is None:
                    return
                self._busy += 1
            try:
                self._read(*item, bounce)
            finally:
                with self._wake:
                    self._busy -= 1
                    if not self._busy:
                        self._wake.notify_all()

    def _read(self, fetch: Fetch, piece: Piece, bounce: Bounce) -> None:
        got = 0
        error: BaseException | None = None
        if fetch.error is None:
            try:
                got = self._store.read(fetch.position, fetch.expert, piece, fetch.landing, bounce)
            except BaseException as caught:  # noqa: BLE001  raised again by whoever waits for it
                error = caught
        with fetch.lock:
            fetch.nbytes += got
            fetch.error = fetch.error or error
            fetch.remaining -= 1
            last = fetch.remaining == 0
        if last:
            self._finished.put(fetch)
