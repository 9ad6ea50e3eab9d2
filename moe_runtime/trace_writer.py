"""`TraceWriter`: a routing trace written while it is being recorded, safe from interruption.

Knows nothing of models; it is given rows and leaves files that `RoutingTrace.load` reads.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import safe_open

from moe_runtime.errors import TraceError
from moe_runtime.files import replacing
from moe_runtime.trace import PART, Array, PathLike, RoutingTrace

__all__ = ["TraceWriter", "open_writer"]

_CODES = {"int32": "I32", "uint16": "U16", "float16": "F16", "uint8": "U8"}  # as safetensors says


class TraceWriter:
    """Numbered, complete part files in `x.trace/` while recording; `x.trace.safetensors` at close.

        with TraceWriter("run.trace") as writer:
            writer.append(rows)          # a RoutingTrace of one or more forward calls
        RoutingTrace.load("run.trace.safetensors")

    A part is written under another name and renamed, so whatever stops the process leaves a folder
    that `RoutingTrace.load` reads. Closing merges the parts into one file and removes the folder.
    Neither holds more than `rows_per_part` rows and one call in memory, however long the trace.

    Args:
        folder: a new or empty folder, `x.trace` by custom.
        rows_per_part: rows that are gathered before a part is written.
        path: the file that `close` writes; the folder's name with `.safetensors` if not given.

    Raises:
        TraceError: the folder holds parts of an earlier recording, or is a file.
    """

    def __init__(
        self, folder: PathLike, *, rows_per_part: int = 4096, path: PathLike | None = None
    ) -> None:
        if rows_per_part < 1:
            raise TraceError(f"a part needs a row at least, found rows_per_part={rows_per_part}")
        self._folder = Path(folder)
        named = self._folder.with_name(self._folder.name + ".safetensors")
        self._path = named if path is None else Path(path)
        self._rows_per_part = rows_per_part
        self._first: RoutingTrace | None = None  # no rows: what the others are compared with
        self._pending: list[RoutingTrace] = []
        self._pending_rows = 0
        self._part_rows: list[int] = []
        self._steps = 0
        self._closed = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise TraceError(f"{self._folder}: is a file; name a folder for the parts") from error
        left = sorted(self._folder.glob(PART.replace("{:06d}", "*")))
        if left:
            raise TraceError(
                f"{self._folder}: holds {len(left)} parts of an earlier recording; load or remove "
                "them, or name another folder"
            )

    @property
    def path(self) -> Path:
        """The file that `close` writes."""
        return self._path

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return sum(self._part_rows) + self._pending_rows

    def append(self, rows: RoutingTrace) -> None:
        """Add rows; their steps are renumbered to follow what was added before.

        Raises:
            TraceError: after `close`, or rows of another model than the first ones.
        """
        if self._closed:
            raise TraceError(f"{self.path}: the recording is closed; open a new writer")
        if len(rows) == 0:
            return
        if self._first is None:
            self._first = rows[:0]
        rows.require_like(self._first, "the added trace")
        renumbered = rows.with_first_step(self._steps)
        self._steps = int(renumbered.step_ids[-1]) + 1
        self._pending.append(renumbered)
        self._pending_rows += len(rows)
        if self._pending_rows >= self._rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what has been gathered as one more complete part."""
        if self._pending:
            part = RoutingTrace.concat(self._pending).with_first_step(
                int(self._pending[0].step_ids[0])
            )
            part.save(self._part(len(self._part_rows)))
            self._part_rows.append(len(part))
            self._pending, self._pending_rows = [], 0

    def close(self) -> Path | None:
        """Merge all parts into `path` and remove the folder; None if nothing was added."""
        if not self._closed:
            self.flush()
            self._closed = True
            if self._first is not None:
                self._merge(self._first)
            self._remove()
        return self.path if self._part_rows else None

    def discard(self) -> None:
        """Remove what was written; nothing is left of the recording."""
        if not self._closed:
            self._closed = True
            self._pending, self._pending_rows = [], 0
            self._remove()
            self._part_rows = []

    def _part(self, number: int) -> Path:
        return self._folder / PART.format(number)

    def _remove(self) -> None:
        for number in range(len(self._part_rows)):
            self._part(number).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # files of others keep the folder
            self._folder.rmdir()

    def _merge(self, first: RoutingTrace) -> None:
        """Copy the parts' columns, one after another, into one file of the same form."""
        # Wide items first, so that every tensor starts at a multiple of its item's size.
        columns = sorted(first.columns().items(), key=lambda item: -item[1].dtype.itemsize)
        header = _header(first, columns, sum(self._part_rows))
        with replacing(self._path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for name, _ in columns:
                for values in self._column(name):
                    file.write(np.ascontiguousarray(values).data)

    def _column(self, name: str) -> Iterator[Array]:
        for number in range(len(self._part_rows)):
            with safe_open(self._part(number), framework="numpy") as part:
                yield part.get_tensor(name)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_writer(path: PathLike) -> TraceWriter:
    """A writer whose `close` makes this file; its parts lie in a folder of the same name.

    Raises:
        TraceError: the file exists, its name does not end in `.safetensors`, or there are parts of
            an earlier recording.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise TraceError(f"{path}: a trace's name ends in .trace.safetensors; name it so")
    if path.exists():
        raise TraceError(f"{path}: exists already; move it away or name another file")
    return TraceWriter(path.with_suffix(""), path=path)


def _header(first: RoutingTrace, columns: Sequence[tuple[str, Array]], rows: int) -> bytes:
    """The beginning of a trace file: the header's length and the header, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": first.header()}
    start = 0
    for name, column in columns:
        shape = (rows, *column.shape[1:])
        stop = start + int(np.prod(shape, dtype=np.int64)) * column.dtype.itemsize
        header[name] = {
            "dtype": _CODES[column.dtype.name],
            "shape": shape,
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
