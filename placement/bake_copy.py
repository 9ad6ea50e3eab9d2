"""Copies of files in which byte ranges come from elsewhere, a chunk at a time.

Knows byte ranges and files; does not know what the bytes mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from moe_runtime.errors import CheckpointError

__all__ = ["CHUNK", "Patch", "copy_whole", "write_patched"]

CHUNK = 4 << 20  # bytes read at a time
_OPEN_FILES = 32


@dataclass(frozen=True, slots=True)
class Patch:
    """`nbytes` bytes at `offset` of a copy that come from `source` in file number `file`.

    `rewrite`, if there is one, gets these bytes whole and returns as many.
    """

    offset: int
    nbytes: int
    file: int
    source: int
    rewrite: Callable[[bytes], bytes] | None = None


class _Readers:
    """Files by number, the last few that were used kept open."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._open: dict[int, FileIO] = {}

    def at(self, number: int, offset: int) -> FileIO:
        file = self._open.pop(number, None)
        if file is None:
            while len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            file = FileIO(self._paths[number], "r")  # closed below
        self._open[number] = file
        file.seek(offset)
        return file

    def close(self) -> None:
        for file in self._open.values():
            file.close()


def write_patched(
    paths: Sequence[str],
    number: int,
    patches: Iterable[Patch],
    target: Path,
    advance: Callable[[int], None],
) -> None:
    """Write `target`, a copy of file `number` of `paths` but for the patches.

    Holds `CHUNK` bytes at a time, and those of one patch with `rewrite`.

    Args:
        advance: told the bytes written, chunk by chunk.

    Raises:
        CheckpointError: patches overlap (the file's tensors do), or a file ends too early.
    """
    size = os.path.getsize(paths[number])
    readers = _Readers(paths)
    buffer = memoryview(bytearray(min(CHUNK, max(size, 1))))
    try:
        with FileIO(target, "x") as out:
            at = 0
            for patch in _joined(sorted(patches, key=lambda one: one.offset)):
                if patch.offset < at or patch.offset + patch.nbytes > size:
                    raise CheckpointError(
                        f"{paths[number]}: tensors overlap at byte {patch.offset}; "
                        "the file is damaged. Fetch it again."
                    )
                _move(readers, number, at, patch.offset - at, out, buffer, advance)
                if patch.rewrite is None:
                    _move(readers, patch.file, patch.source, patch.nbytes, out, buffer, advance)
                else:
                    file = readers.at(patch.file, patch.source)
                    found = bytearray(patch.nbytes)
                    _fill(file, memoryview(found))
                    changed = patch.rewrite(bytes(found))
                    assert len(changed) == patch.nbytes, "a rewrite keeps the length"
                    _put(out, memoryview(changed))
                    advance(patch.nbytes)
                at = patch.offset + patch.nbytes
            _move(readers, number, at, size - at, out, buffer, advance)
    finally:
        readers.close()


def copy_whole(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    """Write `target`, a copy of a file (not of a link to one)."""
    write_patched([str(source)], 0, (), target, advance)


def _joined(patches: Iterable[Patch]) -> Iterable[Patch]:
    """Patches that go on where the last one ended, at both ends, made one."""
    last: Patch | None = None
    for patch in patches:
        if (
            last is not None
            and last.rewrite is None
            and patch.rewrite is None
            and last.file == patch.file
            and last.offset + last.nbytes == patch.offset
            and last.source + last.nbytes == patch.source
        ):
            last = Patch(last.offset, last.nbytes + patch.nbytes, last.file, last.source)
            continue
        if last is not None:
            yield last
        last = patch
    if last is not None:
        yield last


def _move(
    readers: _Readers,
    number: int,
    offset: int,
    nbytes: int,
    out: FileIO,
    buffer: memoryview,
    advance: Callable[[int], None],
) -> None:
    file = readers.at(number, offset)
    while nbytes > 0:
        part = buffer[: min(nbytes, len(buffer))]
        _fill(file, part)
        _put(out, part)
        nbytes -= len(part)
        advance(len(part))


def _fill(file: FileIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise CheckpointError(
                f"{file.name}: ends {len(buffer) - done} bytes too early; it was changed while it "
                "was read"
            )
        done += count


def _put(out: FileIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += out.write(data[done:])
