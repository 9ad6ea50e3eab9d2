"""`TraceReader`: a routing trace read in blocks of rows, so that a long one need not fit in memory.

Knows the trace's file form through `trace.py`; does not know what the rows are read for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import TraceError
from moe_runtime.trace import (
    COLUMNS,
    Array,
    PathLike,
    RoutingTrace,
    check_header,
    part_files,
    read_description,
)

__all__ = ["TraceReader"]

_SMALL = tuple(name for name, (_, dimensions) in COLUMNS.items() if dimensions == 1)


class TraceReader:
    """A trace file, the parts of an interrupted recording, or a trace in memory, block by block.

        reader = TraceReader("run.trace.safetensors")
        tokens = reader.column("token_ids")          # a short column, whole
        for start, rows in reader.blocks(4096):      # the routing: a RoutingTrace at a time
            rows.topk_ids

    Nothing but the short columns that were asked for and one block is held. Each block is checked
    as `RoutingTrace.load` checks a file.

    Args:
        source: a `*.trace.safetensors` file, a recording's folder `x.trace`, or a trace.

    Raises:
        TraceError: no trace there, a damaged one, or parts that are not of one recording; names
            the file, the field and the remedy.
    """

    def __init__(self, source: RoutingTrace | PathLike) -> None:
        self._trace = source if isinstance(source, RoutingTrace) else None
        self.name = "the trace" if isinstance(source, RoutingTrace) else str(source)
        self._parts: list[tuple[Path, int]] = []  # file, rows
        self._first = source[:0] if isinstance(source, RoutingTrace) else None
        if not isinstance(source, RoutingTrace):
            where = Path(source)
            for path in part_files(where) if where.is_dir() else [where]:
                self._add(path)

    def _add(self, path: Path) -> None:
        """One more file of the recording."""
        with _opened(path) as file:
            header = file.metadata() or {}
            check_header(path, header)
            absent = sorted(set(COLUMNS) - set(file.keys()))
            if absent:
                raise TraceError(f"{path}: tensor {absent[0]!r} is missing; record the trace again")
            rows = _rows_of(file, "token_ids")
            for name in COLUMNS:
                if _rows_of(file, name) != rows:
                    raise TraceError(
                        f"{path}: {name} has {_rows_of(file, name)} rows, token_ids {rows}; record "
                        "the trace again"
                    )
        empty = self._read(path, 0, 0)
        if self._first is None:
            self._first = empty
        empty.require_like(self._first, str(path))
        self._parts.append((path, rows))

    # -- what it is ------------------------------------------------------------------------------

    @property
    def like(self) -> RoutingTrace:
        """A trace of the same description without rows."""
        assert self._first is not None
        return self._first

    @property
    def grid(self) -> ExpertGrid:
        """The dense numbering of the experts."""
        return self.like.grid

    def __len__(self) -> int:
        """Number of rows (tokens)."""
        return len(self._trace) if self._trace is not None else sum(n for _, n in self._parts)

    # -- rows ------------------------------------------------------------------------------------

    def column(self, name: str) -> Array:
        """A column of one number a row, `[N]`, whole; by its name in `RoutingTrace`."""
        assert name in _SMALL, name
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, Array]:
        if self._trace is not None:
            return {name: getattr(self._trace, name) for name in _SMALL}
        found: dict[str, list[Array]] = {name: [] for name in _SMALL}
        for path, _ in self._parts:
            with _opened(path) as file:
                for name in _SMALL:
                    found[name].append(np.array(file.get_tensor(name), COLUMNS[name][0]))
        columns = {name: np.concatenate(parts) for name, parts in found.items()}
        steps = columns["step_ids"]
        if np.any(np.diff(steps) < 0):
            raise TraceError(
                f"{self.name}: step_ids decrease from row {int(np.argmax(np.diff(steps) < 0))} to "
                "the next; separate the rows of two recordings"
            )
        return columns

    def blocks(self, rows: int) -> Iterator[tuple[int, RoutingTrace]]:
        """The first row's number and a trace of at most so many rows, one block after another.

        Routing weights are not read: they are 0 in the blocks of a file.

        Raises:
            TraceError: a block is damaged.
        """
        assert rows > 0
        before = 0
        if self._trace is not None:
            for start in range(0, len(self._trace), rows):
                stop = min(start + rows, len(self._trace))
                columns: dict[str, Any] = {
                    name: column[start:stop] for name, column in self._trace.columns().items()
                }
                yield start, replace(self._trace, **columns)
            return
        for path, count in self._parts:
            for start in range(0, count, rows):
                yield before + start, self._read(path, start, min(start + rows, count))
            before += count

    @staticmethod
    def _read(path: Path, start: int, stop: int) -> RoutingTrace:
        # The file is opened for each block: what a mapping has shown counts as this process's
        # memory until it is closed.
        with _opened(path) as file:
            columns: dict[str, Any] = {
                name: file.get_slice(name)[start:stop] for name in COLUMNS if name != "topk_weights"
            }
            header = file.metadata() or {}
        columns["topk_weights"] = np.broadcast_to(np.float16(0), columns["topk_ids"].shape)
        try:
            return RoutingTrace(**columns, **read_description(header))
        except TraceError as error:
            where = f"{path}, rows from {start}" if stop > start else str(path)
            raise TraceError(f"{where}: {error}") from error


def _rows_of(file: Any, name: str) -> int:
    """Rows of a tensor in an open safetensors file."""
    shape = file.get_slice(name).get_shape()
    return int(shape[0]) if shape else 0


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open; its errors as TraceError that names it."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError as error:
        raise TraceError(f"{path}: no such trace; check the path") from error
    except (SafetensorError, OSError) as error:
        raise TraceError(
            f"{path}: not a complete safetensors file ({error}); copy or record it again"
        ) from error
