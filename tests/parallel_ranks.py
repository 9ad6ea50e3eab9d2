"""Real ranks for tests: processes of the form that torchrun starts, ended whatever a test does.

They are forked from a server that has imported what takes long.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import typer

_PRELOADED = ["moe_runtime.cli", "moe_runtime.parallel"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def enter(work: Callable[[str, float], None], action: str, timeout: float, place: Path) -> None:
    """What a rank's process does: as `python program.py`, output to files."""
    rank, size, port = place.name.split("-")
    os.environ.update(
        {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    )
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work(action, timeout)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


@dataclass(kw_only=True)
class Rank:
    """One process and where its output goes."""

    process: ForkServerProcess
    place: Path

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_for(self, text: str, seconds: float = 90.0) -> None:
        """Until it has written this on standard output."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if text in self.output("out"):
                return
            assert self.process.is_alive(), self.output("err")
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} within {seconds} s: {self.output('err')}")

    def ended(self, seconds: float = 90.0) -> tuple[int, str]:
        """Exit code and standard error, once it has ended by itself."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it still runs after {seconds} s"
        return self.process.exitcode, self.output("err")

    def output(self, name: str) -> str:
        path = Path(f"{self.place}.{name}")
        return path.read_text() if path.exists() else ""


@contextmanager
def some_ranks(
    count: int, work: Callable[[str, float], None], action: str, timeout: float, folder: Path
) -> Iterator[list[Rank]]:
    """Run `work(action, timeout)` on ranks; those that are left are killed at the end."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port = free_port()
    started = []
    for rank in range(count):
        place = folder / f"{rank}-{count}-{port}"
        process = context.Process(target=enter, args=(work, action, timeout, place))
        process.start()
        started.append(Rank(process=process, place=place))
    try:
        yield started
    finally:
        for one in started:
            if one.process.is_alive():
                one.send(signal.SIGKILL)
            one.process.join()


@contextmanager
def two_ranks(
    work: Callable[[str, float], None], action: str, timeout: float, folder: Path
) -> Iterator[tuple[Rank, Rank]]:
    """`some_ranks`, two of them."""
    with some_ranks(2, work, action, timeout, folder) as (first, second):
        yield first, second
