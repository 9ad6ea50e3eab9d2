"""Owns running one command under memory and block-I/O cgroups (v1), page cache counted.

Does not know what the command does. Needs root: /sys/fs/cgroup/memory must be writable.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/sys/fs/cgroup/memory")
BLKIO = Path("/sys/fs/cgroup/blkio")
JOIN = 'for g in "$1" "$2"; do echo $$ > "$g/cgroup.procs" || exit 97; done; shift 2; exec "$@"'
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended and what its group used. Bytes; `limit` None is no limit."""

    returncode: int
    timed_out: bool
    wall_seconds: float
    limit: int | None
    peak_bytes: int  # page cache included
    peak_anonymous_bytes: int  # shared memory included; sampled ten times a second
    limit_hits: int
    out_of_memory_kills: int
    device_read_bytes: int | None  # None where the kernel keeps no account
    output_tail: str

    @property
    def failure(self) -> str | None:
        if self.timed_out:
            return "ran past its time limit"
        if self.out_of_memory_kills:
            return f"killed: out of memory under a limit of {self.limit} bytes"
        if self.returncode < 0:
            return f"ended by signal {signal.Signals(-self.returncode).name}"
        if self.returncode:
            return f"exit status {self.returncode}"
        return None


@contextmanager
def group(limit: int | None) -> Iterator[tuple[Path, Path]]:
    """A fresh memory and a fresh blkio group, removed at the end. ValueError without access."""
    name = f"moe-bench-{os.getpid()}-{next(_numbers)}"
    made: list[Path] = []
    try:
        for root in (MEMORY, BLKIO):
            try:
                (root / name).mkdir()
            except OSError as error:
                raise ValueError(f"cannot make a cgroup in {root}: {error}; run as root") from error
            made.append(root / name)
        if limit is not None:
            (made[0] / "memory.limit_in_bytes").write_text(str(limit))
        _account_reads(made[1])
        yield made[0], made[1]
    finally:
        for path in made:
            _remove(path)


def _account_reads(blkio: Path) -> None:
    """Sets a rule far above any disk's rate: without one this kernel counts nothing."""
    for device in Path("/sys/block").iterdir():
        number = (device / "dev").read_text().strip()
        if (device / "size").read_text().strip() != "0":
            with suppress(OSError):  # not every block device takes rules
                (blkio / "blkio.throttle.read_bps_device").write_text(f"{number} {10**12}")


def _remove(path: Path) -> None:
    for _ in range(50):
        try:
            path.rmdir()
            return
        except OSError:  # its last process is still being reaped
            time.sleep(0.1)


def _number(path: Path) -> int:
    return int(path.read_text())


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0


def _device_reads(blkio: Path) -> int | None:
    lines = (blkio / "blkio.throttle.io_service_bytes").read_text().splitlines()
    reads = [int(line.split()[2]) for line in lines if " Read " in line]
    return sum(reads) if reads else None


def run(
    command: Sequence[str], *, limit: int | None, timeout: float, log: Path, cwd: Path,
    environment: dict[str, str],
) -> Outcome:  # fmt: skip
    """Runs `command` in fresh groups; its output goes to `log`. Ends it after `timeout` seconds."""
    with group(limit) as (memory, blkio), log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            ["/bin/sh", "-c", JOIN, "join", str(memory), str(blkio), *command],
            stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=environment,
        )  # fmt: skip
        timed_out, anonymous = False, 0
        try:
            while process.poll() is None:
                stat = memory / "memory.stat"
                held = _field(stat, "total_rss") + _field(stat, "total_shmem")
                anonymous = max(anonymous, held)
                if time.perf_counter() - began > timeout:
                    timed_out = True
                    process.kill()
                    process.wait()
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return Outcome(
            returncode=process.returncode,
            timed_out=timed_out,
            wall_seconds=time.perf_counter() - began,
            limit=limit,
            peak_bytes=_number(memory / "memory.max_usage_in_bytes"),
            peak_anonymous_bytes=anonymous,
            limit_hits=_number(memory / "memory.failcnt"),
            out_of_memory_kills=_field(memory / "memory.oom_control", "oom_kill"),
            device_read_bytes=_device_reads(blkio),
            output_tail=log.read_bytes()[-2000:].decode("utf-8", "replace"),
        )


def drop_cached(paths: Iterable[Path]) -> None:
    """Drops the files' clean pages from the page cache: cached pages are charged to the group
    that first read them, so what an earlier runner left would be free for the next one.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
