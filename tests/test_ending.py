"""Threads end with their owner without being waited for, and with the program.

Does not know models: the owner here is an empty object.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_runtime.checkpoint import Segment
from moe_runtime.device import open_device
from moe_runtime.ending import end_with
from moe_runtime.host_experts import HostExperts
from moe_runtime.prefetch import Fetcher
from moe_runtime.store import Bounce, Piece, Tensors


class Owner:
    """What a runtime is to its threads."""


class Reads:
    """A store of one piece an expert; reading it is `act`."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self.closed = 0

    def host_tensors(self, position: int, expert: int) -> Tensors | None:
        return None

    def pieces(self, position: int, expert: int) -> list[Piece]:
        return [Piece(Segment(0, 0, torch.float32, (2,), 0), 0, 2)]

    def read(
        self, position: int, expert: int, piece: Piece, target: Tensors, bounce: Bounce
    ) -> int:
        self._act()
        return 8

    def close(self) -> None:
        self.closed += 1


def fetcher_over(reads: Reads, threads: int) -> Fetcher:
    return Fetcher(reads, open_device("cpu"), threads=threads, chunk=4096)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "expert-reader"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("threads", [1, 3])
def test_an_owner_may_be_collected_by_a_reader_in_the_middle_of_a_read(threads: int) -> None:
    # Garbage is collected wherever memory is asked for; the reader cannot wait for itself.
    before = set(readers())
    owner = Owner()
    owners = [owner]
    gone = weakref.ref(owner)
    del owner
    fetcher = fetcher_over(Reads(owners.clear), threads)
    end_with(owners[0], fetcher)
    fetcher.submit(0, 0, (torch.empty(2),))
    fetcher.next_finished()
    assert gone() is None
    for thread in set(readers()) - before:
        thread.join()


@pytest.mark.timeout(30)
def test_an_owner_is_collected_without_waiting_for_a_read() -> None:
    before = set(readers())
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait()

    owner = Owner()
    fetcher = fetcher_over(Reads(slow), 2)
    end_with(owner, fetcher)
    fetcher.submit(0, 0, (torch.empty(2),))
    begun.wait()
    mine = set(readers()) - before
    del owner
    assert any(thread.is_alive() for thread in mine)
    go_on.set()
    for thread in mine:
        thread.join()


@pytest.mark.timeout(30)
def test_work_that_waits_goes_with_the_owner() -> None:
    begun, go_on = threading.Event(), threading.Event()
    read: list[int] = []

    def slow() -> None:
        read.append(1)
        begun.set()
        go_on.wait()

    before = set(readers())
    owner = Owner()
    fetcher = fetcher_over(Reads(slow), 1)
    end_with(owner, fetcher)
    for expert in range(5):
        fetcher.submit(0, expert, (torch.empty(2),), ahead=expert > 2)
    begun.wait()
    mine = set(readers()) - before
    del owner
    go_on.set()
    for thread in mine:
        thread.join()
    assert len(read) == 1


@pytest.mark.timeout(30)
def test_the_last_reader_lets_go_of_the_store() -> None:
    owner = Owner()
    before = set(readers())
    reads = Reads(lambda: None)
    gone = weakref.ref(reads)
    fetcher = fetcher_over(reads, 2)
    end_with(owner, fetcher)
    fetcher.submit(0, 0, (torch.empty(2),))
    fetcher.next_finished()
    mine = set(readers()) - before
    del owner, fetcher, reads
    for thread in mine:
        thread.join()
    assert gone() is None


@pytest.mark.timeout(30)
def test_a_host_thread_ends_with_its_owner() -> None:
    owner = Owner()
    host = HostExperts(threads=1)
    end_with(owner, host)
    before = set(threading.enumerate())

    def collect() -> torch.Tensor:
        owners.clear()  # as garbage collected on the thread itself would
        raise RuntimeError("nothing to compute")

    owners = [owner]
    del owner
    batch = host.submit([], None, collect)  # type: ignore[arg-type]
    batch.wait()
    for thread in set(threading.enumerate()) - before:
        thread.join()


@pytest.mark.timeout(60)
def test_a_program_that_ends_waits_for_a_read(tmp_path: Path) -> None:
    program = """
import threading, time
from moe_runtime.ending import end_with

class Workers:
    def leave(self):
        print("told to leave")
    def close(self):
        print("closed")

class Owner: pass
kept, dropped = Owner(), Owner()
ending = [Workers(), Workers()]
end_with(kept, ending[0])
end_with(dropped, ending[1])
del dropped
print("the end")
"""
    ended = subprocess.run(  # elsewhere: the repository's folders are not the installed package
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n") == ["told to leave", "the end", "closed", "closed", ""]
    assert ended.stderr == ""
