"""Transfers from the slow tiers into slots: reader threads, host copies, the in-flight table.

Decides nothing: it moves what it is asked to move, in the order asked (what is needed now before
what is fetched ahead), and tells in which order the transfers end. Knows stores and the device
layer; not policies, not routing.
"""

from __future__ import annotations

import math
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

__all__ = ["Fetch", "Fetcher", "LinkMeter"]


@dataclass(eq=False)
class Fetch:
    """One expert on its way into a slot.

    `ahead` while nobody needs it yet; `withdrawn` if it was called off after it had begun, so that
    its slot holds no whole expert when it ends.
    """

    position: int
    expert: int
    target: Tensors
    landing: Tensors
    after: Any = None
    ahead: bool = False
    begun: bool = False
    withdrawn: bool = False
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


class LinkMeter:
    """What a link delivers while it is busy: a decayed mean over the last seconds of business."""

    _SPAN = 0.5  # seconds of business after which a measurement has faded to 1/e

    def __init__(self) -> None:
        self._since = 0.0
        self._bytes = 0.0
        self._seconds = 0.0

    @property
    def rate(self) -> float | None:
        """Bytes a second; None before anything was measured."""
        return self._bytes / self._seconds if self._seconds > 0 else None

    def assume(self, rate: float) -> None:
        """Measured beforehand; what is read later counts with it, and outweighs it soon."""
        self._bytes, self._seconds = rate * self._SPAN, self._SPAN

    def begin(self, now: float) -> None:
        """The link was idle and has work now."""
        self._since = now

    def add(self, nbytes: int, now: float) -> None:
        """Something arrived; the link has been busy since the last call."""
        passed, self._since = now - self._since, now
        kept = math.exp(-passed / self._SPAN)
        self._bytes = self._bytes * kept + nbytes
        self._seconds = self._seconds * kept + passed


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
        # Readers take from the first queue that has work: what is needed, what is ahead.
        self._work: deque[tuple[Fetch, Piece] | None] = deque()
        self._ahead: deque[tuple[Fetch, Piece]] = deque()
        self._wake = threading.Condition()
        self._busy = 0
        self._meter = LinkMeter()
        self._ready = threading.Semaphore(0)
        self._finished: queue.SimpleQueue[Fetch] = queue.SimpleQueue()
        self._in_flight: dict[tuple[int, int], Fetch] = {}

    @property
    def in_flight(self) -> int:
        """Fetches submitted and not yet taken by `next_finished`."""
        return len(self._in_flight)

    @property
    def busy_bytes(self) -> int:
        """Their bytes, of those whose copies may still be under way."""
        return sum(
            sum(t.nbytes for t in fetch.target)
            for fetch in self._in_flight.values()
            if not self._device.done(fetch.token) or fetch.token is None
        )

    @property
    def rate(self) -> float | None:
        """Bytes a second that arrive while anything is being read; None before it is known."""
        return self._meter.rate

    def measure_copies(self, nbytes: int, times: int = 3) -> None:
        """Time copies of so many bytes from host memory to the device, for `rate`.

        Copies end unseen by the host, so that a link that only copies is measured beforehand.
        """
        source, target = self._device.allocate_host(nbytes), self._device.allocate(nbytes)
        taken = []
        for _ in range(times):
            begin = time.perf_counter()
            self._device.finish(self._device.copy([(target, source)], self._device.fence()))
            taken.append(time.perf_counter() - begin)
        self._meter.assume(nbytes / max(sorted(taken)[times // 2], 1e-9))

    def submit(
        self,
        position: int,
        expert: int,
        target: Tensors,
        *,
        after: Any = None,
        ahead: bool = False,
    ) -> None:
        """Start to bring an expert into `target`.

        Args:
            target: the slot's tensors.
            after: a device fence that the copy into the slot must not overtake.
            ahead: nobody needs it yet: everything that is needed goes first.
        """
        fetch = Fetch(position, expert, target, target, after, ahead)
        self._in_flight[fetch.key] = fetch
        held = self.in_host(position, expert)
        if held is not None:
            fetch.from_host = True
            fetch.nbytes = sum(t.numel() * t.element_size() for t in held)
            fetch.begun = True
            # A slot may have a dimension of the model in two.
            pairs = [(t, one.reshape(t.shape)) for t, one in zip(target, held, strict=True)]
            fetch.token = self._device.copy(pairs, after, ahead=ahead)
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
            (self._ahead if ahead else self._work).extend((fetch, piece) for piece in pieces)
            self._wake.notify(len(pieces))

    def in_host(self, position: int, expert: int) -> Tensors | None:
        """The expert's tensors if they lie in host memory, as the model has them, else None."""
        held = self._store.host_tensors(position, expert)
        if held is None and self._host is not None:
            held = self._host.lookup(position, expert)
        return held

    def keep_in_host(self, position: int, expert: int, token: Any) -> None:
        """Whoever wants the memory of these host tensors waits for `token` first."""
        if self._host is not None and self._store.host_tensors(position, expert) is None:
            self._host.compute(position, expert, token)

    def promote(self, position: int, expert: int) -> None:
        """An expert that is on its way ahead is needed now: the rest of it goes first."""
        fetch = self._in_flight[position, expert]
        fetch.ahead = False
        with self._wake:
            self._work.extendleft(reversed(self._take_queued(fetch)))

    def withdraw(self, position: int, expert: int) -> bool:
        """Call off an expert that is on its way ahead.

        Returns:
            Whether it is off the list, because nothing of it had begun. Otherwise it still ends:
            whole if all of it was under way, else marked `withdrawn`.
        """
        fetch = self._in_flight[position, expert]
        with self._wake:
            dropped = self._take_queued(fetch)
            begun = fetch.begun
        if not dropped:
            return False
        if not begun:
            del self._in_flight[fetch.key]
            self._unclaim(fetch)
            return True
        with fetch.lock:
            fetch.withdrawn = True
            fetch.remaining -= len(dropped)
            last = fetch.remaining == 0
        if last:
            self._finished.put(fetch)
        return False

    def next_finished(self) -> tuple[Fetch, float]:
        """The next fetch to end, and the seconds waited for it.

        One that was ahead of need ends without an exception: its `error` says what went wrong.

        Raises:
            ExpertReadError: the read failed; the expert is not in its slot.
        """
        begin = time.perf_counter()
        fetch = self._finished.get()
        waited = time.perf_counter() - begin
        del self._in_flight[fetch.key]
        whole = fetch.error is None and not fetch.withdrawn
        if self._host is not None and not fetch.from_host:
            self._host.settle(*fetch.key, good=whole)
            if whole:
                pairs = list(zip(fetch.target, fetch.landing, strict=True))
                fetch.token = self._device.copy(pairs, fetch.after, ahead=fetch.ahead)
                self._host.lease(*fetch.key, fetch.token)
        if fetch.error is not None and not fetch.ahead:
            raise fetch.error
        return fetch, waited

    def _take_queued(self, fetch: Fetch) -> list[tuple[Fetch, Piece]]:
        """Remove the pieces of a fetch that wait in the queue of what is ahead."""
        taken = [item for item in self._ahead if item[0] is fetch]
        if taken:
            self._ahead = deque(item for item in self._ahead if item[0] is not fetch)
        return taken

    def _unclaim(self, fetch: Fetch) -> None:
        if self._host is not None and not fetch.from_host:
            self._host.settle(*fetch.key, good=False)

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
            self._ahead.clear()
            while self._busy:
                self._wake.wait()
        while not self._finished.empty():
            self._device.finish(self._finished.get().token)
        for key in self._in_flight:
            if self._host is not None:
                self._host.settle(*key, good=False)
        self._in_flight.clear()

    def leave(self) -> None:
        """Tell the threads to end, each after the piece that it reads; waits for nothing.

        What is under way may be forgotten: the last thread to end lets go of the store.
        """
        with self._wake:
            # Before all other work, which stays: a thread that has seen some must find some.
            self._work.extendleft([None] * len(self._threads))
            self._wake.notify_all()

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
                while not self._work and not self._ahead:
                    self._wake.wait()
                item = self._work.popleft() if self._work else self._ahead.popleft()
                if item is None:
                    return
                item[0].begun = True
                self._busy += 1
                if self._busy == 1:
                    self._meter.begin(time.perf_counter())
            got = 0
            try:
                got = self._read(*item, bounce)
            finally:
                with self._wake:
                    self._busy -= 1
                    self._meter.add(got, time.perf_counter())
                    if not self._busy:
                        self._wake.notify_all()

    def _read(self, fetch: Fetch, piece: Piece, bounce: Bounce) -> int:
        """Read a piece; the last one of a fetch ends it. Returns bytes read."""
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
        return got
