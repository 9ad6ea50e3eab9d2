"""How fast a file system delivers random reads, by size and threads, past the page cache.

Does not know checkpoints; reads an existing file or one that it makes and removes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from moe_runtime.core import format_bytes
from moe_runtime.hardware.samples import spread
from moe_runtime.hardware.values import DiskFacts, DiskRead, Note

__all__ = ["FILE_BYTES", "READ_SIZES", "READ_THREADS", "DiskMeasured", "measure_disk", "mount_of"]

FILE_BYTES = 128 << 20
READ_SIZES = (4 << 10, 256 << 10, 1 << 20, 4 << 20)
READ_THREADS = (1, 2, 4, 8)

_BLOCK = 4096  # direct reads need offset, length and memory in units of the logical block
_IN_MEMORY = ("tmpfs", "ramfs")
_WINDOWS = 3
_WINDOW_SECONDS = 0.03
_WRITE_SECONDS = 2.0
_LEAST_BYTES = 8 << 20
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class DiskMeasured:
    """What came of it: facts (None if nothing could be read), reads, and what is missing."""

    facts: DiskFacts | None
    reads: tuple[DiskRead, ...]
    notes: tuple[Note, ...]


def measure_disk(
    path: Path,
    *,
    file_bytes: int = FILE_BYTES,
    limit_seconds: float = 3.0,
    progress: Callable[[float], None] | None = None,
) -> DiskMeasured:
    """Time random reads on the file system of `path`.

    Args:
        path: a file to read, or a folder: then its largest safetensors file if that is large
            enough, else a temporary file of `file_bytes` random bytes, removed afterwards.
        limit_seconds: sizes and thread counts that this leaves no time for are left out, in a note.

    Everything that goes wrong is a note; nothing is raised for a disk's sake.
    """
    notes: list[Note] = []
    reads: list[DiskRead] = []
    facts: DiskFacts | None = None
    try:
        with _file(path, file_bytes, notes) as (file, existing), _opened(file, notes) as opened:
            fd, direct = opened
            size = os.fstat(fd).st_size
            mount, kind = mount_of(file)
            facts = DiskFacts(
                path=str(file.parent.resolve()),
                mount=mount,
                filesystem=kind,
                file_bytes=size,
                existing=existing,
                direct=direct,
            )
            reads = _grid(fd, size, direct, limit_seconds, notes, progress)
            if kind in _IN_MEMORY:
                notes.append(
                    Note(what="a disk", why=f"{mount} is {kind}: memory was measured; give --path")
                )
            if not reads:
                notes.append(Note(what="disk reads", why=f"{file} has only {size} bytes"))
    except OSError as error:
        notes.append(Note(what="disk reads", why=_reason(path, error)))
    return DiskMeasured(facts=facts if reads else None, reads=tuple(reads), notes=tuple(notes))


def mount_of(path: Path) -> tuple[str, str]:
    """(mount point, type of file system) that a path lies on; the type is empty if unknown."""
    resolved = path.resolve()
    found = ("/", "")
    with contextlib.suppress(OSError):
        for part in psutil.disk_partitions(all=True):
            mount = Path(part.mountpoint)
            inside = resolved == mount or mount in resolved.parents
            if inside and len(part.mountpoint) >= len(found[0]):
                found = (part.mountpoint, part.fstype)
    return found


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{path}: the disk is full; give a --path with room, or to a checkpoint's folder"
    return f"{path}: {error.strerror or error}"


@contextmanager
def _file(path: Path, file_bytes: int, notes: list[Note]) -> Iterator[tuple[Path, bool]]:
    """(a file to read, whether it was there before)."""
    if path.is_file():
        yield path, True
        return
    # A link whose target has gone is no shard.
    files = [shard for shard in path.glob("*.safetensors") if shard.is_file()]
    shards = [(shard.stat().st_size, shard) for shard in files]
    if shards and max(shards)[0] >= _LEAST_BYTES:
        yield max(shards)[1], True
        return
    usage = shutil.disk_usage(path)
    room = usage.free
    if not usage.total:
        raise OSError(errno.ENODEV, "nothing can be stored there")
    if room < 2 * file_bytes:
        # Half of what is left: filling a disk up would be worse than knowing less of it.
        fitting = room // 2 // _BLOCK * _BLOCK
        if fitting < _LEAST_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        notes.append(
            Note(
                what="a large file to read",
                why=f"{path}: {format_bytes(room)} are free; read {format_bytes(fitting)} instead",
            )
        )
        file_bytes = fitting
    descriptor, name = tempfile.mkstemp(prefix=".moe-runtime-", suffix=".tmp", dir=path)
    try:
        _fill(descriptor, file_bytes)
        yield Path(name), False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _fill(descriptor: int, file_bytes: int) -> None:
    """Random bytes, since zeros may be stored as nothing; fewer where writing takes too long."""
    generator = np.random.default_rng(_SEED)
    began = time.perf_counter()
    with os.fdopen(descriptor, "wb") as file:
        for start in range(0, file_bytes, 8 << 20):
            file.write(generator.bytes(min(8 << 20, file_bytes - start)))
            if start + (8 << 20) >= _LEAST_BYTES and time.perf_counter() - began > _WRITE_SECONDS:
                break
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _opened(file: Path, notes: list[Note]) -> Iterator[tuple[int, bool]]:
    """(descriptor, whether reads are direct); a trial read tells what is allowed."""
    refused = "this system has no O_DIRECT"
    if hasattr(os, "O_DIRECT"):
        try:
            fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                with mmap.mmap(-1, _BLOCK) as block:
                    os.preadv(fd, [block], 0)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            refused = str(error.strerror)
        else:
            try:
                yield fd, True
            finally:
                os.close(fd)
            return
    notes.append(
        Note(
            what="direct reads",
            why=f"{file.parent}: {refused}; reads were buffered and dropped from the page cache "
            "before each round, which may still flatter the disk",
        )
    )
    fd = os.open(file, os.O_RDONLY)
    try:
        yield fd, False
    finally:
        os.close(fd)


def _grid(
    fd: int,
    size: int,
    direct: bool,
    limit_seconds: float,
    notes: list[Note],
    progress: Callable[[float], None] | None,
) -> list[DiskRead]:
    """Each size with each number of threads, small numbers of threads first."""
    cells = [(n, t) for t in READ_THREADS for n in READ_SIZES if n * t <= size]
    began = time.perf_counter()
    reads: list[DiskRead] = []
    for done, (nbytes, threads) in enumerate(cells):
        if reads and time.perf_counter() - began > limit_seconds:
            left = ", ".join(f"{format_bytes(n)} by {t}" for n, t in cells[done:])
            notes.append(Note(what=f"disk reads of {left} threads", why="the disk is too slow"))
            break
        windows = [
            _window(fd, size, nbytes, threads, direct, seed=_SEED + number)
            for number in range(_WINDOWS)
        ]
        reads.append(
            DiskRead(
                nbytes=nbytes,
                threads=threads,
                seconds=spread([one for times, _ in windows for one in times]),
                rate=spread([rate for _, rate in windows]),
            )
        )
        if progress is not None:
            progress((done + 1) / len(cells))
    return reads


def _window(
    fd: int, size: int, nbytes: int, threads: int, direct: bool, *, seed: int
) -> tuple[list[float], float]:
    """(seconds of each read, bytes a second of all threads) of a short time."""
    if not direct and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    times: list[list[float]] = [[] for _ in range(threads)]
    failures: list[OSError] = []
    buffers = [mmap.mmap(-1, nbytes) for _ in range(threads)]
    start = time.perf_counter()

    def work(number: int) -> None:
        places = random.Random(f"{seed} {number} {nbytes}")
        try:
            while not times[number] or time.perf_counter() - start < _WINDOW_SECONDS:
                offset = places.randrange(size // nbytes) * nbytes
                before = time.perf_counter()
                got = os.preadv(fd, [buffers[number]], offset)
                if got < nbytes:
                    raise OSError(errno.EIO, f"a read of {nbytes} bytes at {offset} gave {got}")
                times[number].append(time.perf_counter() - before)
        except OSError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    for buffer in buffers:
        buffer.close()
    if failures:
        raise failures[0]
    every = [one for part in times for one in part]
    return every, len(every) * nbytes / seconds
