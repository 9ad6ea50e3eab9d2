"""`TraceWriter`: a routing trace written while it is being recorded, safe from interruption.

Knows nothing of models; it is given rows and leaves files that `RoutingTrace.load` reads.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

from moe_runtime.errors import TraceError
from moe_runtime.trace import PART, PathLike, RoutingTrace

__all__ = ["TraceWriter"]


class TraceWriter:
    """Numbered, complete part files in `x.trace/` while recording; `x.trace.safetensors` at close.

        with TraceWriter("run.trace") as writer:
            writer.append(rows)          # a RoutingTrace of one or more forward calls
        RoutingTrace.load("run.trace.safetensors")

    A part is written under another name and renamed, so whatever stops the process leaves a folder
    that `RoutingTrace.load` reads. Closing merges the parts into one file and removes the folder.

    Args:
        folder: a new or empty folder, `x.trace` by custom.
        rows_per_part: rows that are gathered before a part is written.

    Raises:
        TraceError: the folder holds parts of an earlier recording, or is a file.
    """

    def __init__(self, folder: PathLike, *, rows_per_part: int = 4096) -> None:
        if rows_per_part < 1:
            raise TraceError(f"a part needs a row at least, found rows_per_part={rows_per_part}")
        self._folder = Path(folder)
        self._rows_per_part = rows_per_part
        self._first: RoutingTrace | None = None  # no rows: what the others are compared with
        self._pending: list[RoutingTrace] = []
        self._pending_rows = 0
        self._parts = 0
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
        return self._folder.with_name(self._folder.name + ".safetensors")

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
            part.save(self._folder / PART.format(self._parts))
            self._parts += 1
            self._pending, self._pending_rows = [], 0

    def close(self) -> Path | None:
        """Merge all parts into `path` and remove the folder; None if nothing was added."""
        if self._closed:
            return self.path if self._parts else None
        self.flush()
        self._closed = True
        if self._parts:
            RoutingTrace.load(self._folder).save(self.path)
        for part in range(self._parts):
            os.unlink(self._folder / PART.format(part))
        with contextlib.suppress(OSError):  # files of others keep the folder
            self._folder.rmdir()
        return self.path if self._parts else None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
