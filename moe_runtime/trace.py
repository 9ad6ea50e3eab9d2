"""`RoutingTrace`: which experts each token was routed to, in memory and as a file.

Knows nothing of models or of other engines' recordings; it holds arrays and checks them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import TraceError
from moe_runtime.files import replacing

__all__ = ["DECODE", "PREFILL", "UNUSED", "RoutingTrace"]

UNUSED = 65535  # an entry of topk_ids that names no expert
PREFILL, DECODE = 0, 1
FORMAT, VERSION = "moe-runtime.trace", 1
PART = "part-{:06d}.safetensors"

Array: TypeAlias = NDArray[Any]
PathLike: TypeAlias = str | os.PathLike[str]

COLUMNS: dict[str, tuple[type[np.generic], int]] = {  # name -> dtype, number of dimensions
    "topk_ids": (np.uint16, 3),
    "topk_weights": (np.float16, 3),
    "token_ids": (np.int32, 1),
    "sequence_ids": (np.int32, 1),
    "positions": (np.int32, 1),
    "phase": (np.uint8, 1),
    "step_ids": (np.int32, 1),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routing of N tokens through L MoE layers, at most K experts a layer; rows in run order.

    Args:
        topk_ids: uint16 `[N, L, K]`, expert numbers; 65535 where nothing was chosen.
        topk_weights: float16 `[N, L, K]`, the router's weights; 0 where nothing was chosen.
        token_ids: int32 `[N]`, the token that went in; -1 if unknown.
        sequence_ids: int32 `[N]`, number of the sequence (prompt with its continuation).
        positions: int32 `[N]`, place of the token in its sequence.
        phase: uint8 `[N]`, 0 prefill, 1 decode.
        step_ids: int32 `[N]`, number of the forward call; never decreases from row to row.
        layer_ids: absolute Hugging Face index of each of the L layers, in order of execution.
        experts: routed experts of each of the L layers.
        top_k: experts chosen per token in each of the L layers; K everywhere if not given.
        model_id, fingerprint, tokenizer_id: what was recorded; free text, "" if unknown.

    Raises:
        TraceError: on construction, if a column has another shape or type, or holds numbers out
            of range; the message names the column.
    """

    topk_ids: NDArray[np.uint16]
    topk_weights: NDArray[np.float16]
    token_ids: NDArray[np.int32]
    sequence_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    phase: NDArray[np.uint8]
    step_ids: NDArray[np.int32]
    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...] = ()
    model_id: str = ""
    fingerprint: str = ""
    tokenizer_id: str = ""

    def __post_init__(self) -> None:
        _check_columns(self)
        layers, slots = self.topk_ids.shape[1:]
        if not self.top_k:
            object.__setattr__(self, "top_k", (slots,) * layers)
        for name in ("layer_ids", "experts", "top_k"):
            if len(getattr(self, name)) != layers:
                raise TraceError(
                    f"{name} names {len(getattr(self, name))} layers, but topk_ids has {layers}"
                )
        _check_values(self)

    # -- what it is ------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of rows (tokens)."""
        return len(self.token_ids)

    @property
    def tokens(self) -> int:
        """Number of rows (tokens)."""
        return len(self)

    @cached_property
    def grid(self) -> ExpertGrid:
        """The dense numbering of the experts of these layers."""
        return ExpertGrid(layers=self.layer_ids, experts=self.experts)

    def columns(self) -> dict[str, Array]:
        """The seven arrays by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    def description(self) -> dict[str, Any]:
        """The six fields that are not arrays, by name: what `select` keeps and `concat` compares.

        `RoutingTrace(**columns, **trace.description())` makes a trace of the same model.
        """
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in COLUMNS}

    def header(self) -> dict[str, str]:
        """The metadata of a trace file, `docs/formats.md`: format, version and the description."""
        header = {"format": FORMAT, "version": str(VERSION)}
        for name, value in self.description().items():
            header[name] = value if isinstance(value, str) else json.dumps(value)
        return header

    # -- parts of it -----------------------------------------------------------------------------

    def select(
        self,
        *,
        phase: int | None = None,
        sequences: Sequence[int] | None = None,
        rows: slice | Array | None = None,
    ) -> RoutingTrace:
        """The rows that fit all that is given; nothing given: all rows. Order is kept.

        Args:
            phase: 0 (prefill) or 1 (decode).
            sequences: sequence ids.
            rows: a slice, a bool mask `[N]`, or ascending row numbers.
        """
        keep = np.ones(len(self), dtype=bool)
        if phase is not None:
            keep &= self.phase == phase
        if sequences is not None:
            keep &= np.isin(self.sequence_ids, np.asarray(sequences))
        if rows is not None:
            chosen = np.zeros(len(self), dtype=bool)
            chosen[rows] = True
            keep &= chosen
        kept: dict[str, Any] = {name: column[keep] for name, column in self.columns().items()}
        return replace(self, **kept)

    def __getitem__(self, rows: slice) -> RoutingTrace:
        """`trace[10:20]`: these rows."""
        return self.select(rows=rows)

    def decode(self) -> RoutingTrace:
        """The rows of decoding."""
        return self.select(phase=DECODE)

    def prefill(self) -> RoutingTrace:
        """The rows of prefill."""
        return self.select(phase=PREFILL)

    def accesses(self) -> list[Access]:
        """The run as the cache saw it: each forward call, layer by layer, experts as a set."""
        return list(self.iter_accesses())

    def iter_accesses(self) -> Iterator[Access]:
        """`accesses()` one at a time. A layer in which a call chose nothing is left out."""
        starts: list[int] = np.flatnonzero(np.diff(self.step_ids, prepend=-1)).tolist()
        stops = [*starts[1:], len(self)] if starts else []
        for start, stop in zip(starts, stops, strict=True):
            for position in range(len(self.layer_ids)):
                chosen = self.topk_ids[start:stop, position]
                experts, tokens = np.unique(chosen[chosen != UNUSED], return_counts=True)
                if len(experts):
                    yield Access(
                        position=position,
                        experts=experts.astype(np.int64),
                        tokens=tokens.astype(np.int64),
                    )

    def with_first_step(self, step: int) -> RoutingTrace:
        """The same rows with step ids that start at `step`."""
        if not len(self):
            return self
        moved = self.step_ids.astype(np.int64) - int(self.step_ids[0]) + step
        if moved[-1] > np.iinfo(np.int32).max:
            raise TraceError(f"step_ids reach {moved[-1]}, past int32; start another trace")
        return replace(self, step_ids=moved.astype(np.int32))

    def require_like(self, first: RoutingTrace, name: str) -> None:
        """TraceError unless this trace, called `name`, is of the model and layers of `first`."""
        mine, theirs = self.description(), first.description()
        mine["experts a layer"] = self.topk_ids.shape[2]
        theirs["experts a layer"] = first.topk_ids.shape[2]
        for field, value in mine.items():
            if value != theirs[field]:
                raise TraceError(
                    f"{name} has another {field} than the first: {value!r} instead of "
                    f"{theirs[field]!r}; put together traces of one model only"
                )

    @classmethod
    def concat(cls, traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """One trace after another; steps are renumbered to go on, sequence ids are kept.

        Raises:
            TraceError: no traces, or traces of different models or layers.
        """
        if not traces:
            raise TraceError("nothing to concatenate: give one trace at least")
        first, step = traces[0], 0
        steps = []
        for number, trace in enumerate(traces):
            trace.require_like(first, f"trace {number}")
            if len(trace):
                steps.append(trace.with_first_step(step).step_ids)
                step = int(steps[-1][-1]) + 1
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(t, name) for t in traces]) for name in COLUMNS
        }
        joined["step_ids"] = np.concatenate(steps).astype(np.int32) if steps else joined["step_ids"]
        return replace(first, **joined)

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: PathLike) -> Path:
        """Write one file (`*.trace.safetensors` by custom), whole or not at all.

        Returns:
            The path written.
        """
        header = self.header()
        arrays = {name: np.ascontiguousarray(column) for name, column in self.columns().items()}
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata=header)
        return Path(path)

    @classmethod
    def load(cls, path: PathLike) -> RoutingTrace:
        """Read a file, or all complete parts in the folder of an interrupted recording.

        Raises:
            TraceError: nothing there, or a damaged file; names the file, the field and the remedy.
        """
        path = Path(path)
        if not path.is_dir():
            return _load_file(path)
        parts = part_files(path)
        # The parts of one recording number their steps through, so they keep their numbers.
        loaded = [_load_file(part) for part in parts]
        joined = cls.concat(loaded)
        steps = np.concatenate([part.step_ids for part in loaded])
        if np.any(np.diff(steps) < 0):
            raise TraceError(
                f"{path}: step_ids decrease from part to part; separate the parts of two recordings"
            )
        return replace(joined, step_ids=steps)


def part_files(folder: Path) -> list[Path]:
    """The parts in the folder of an interrupted recording, in order.

    Raises:
        TraceError: there are none, or one is missing from the middle.
    """
    parts = sorted(folder.glob(PART.replace("{:06d}", "*")))
    if not parts:
        raise TraceError(
            f"{folder}: a folder without part-*.safetensors, so no trace; give a "
            "*.trace.safetensors file, or record again"
        )
    missing = [n for n, part in enumerate(parts) if part.name != PART.format(n)]
    if missing:
        raise TraceError(
            f"{folder}: {PART.format(missing[0])} is missing among {len(parts)} parts; "
            "restore it, or move the parts before it to a folder of their own"
        )
    return parts


def _check_columns(trace: RoutingTrace) -> None:
    """Types and shapes of the seven columns."""
    rows = len(trace.token_ids) if np.ndim(trace.token_ids) else 0
    for name, (dtype, dimensions) in COLUMNS.items():
        column = getattr(trace, name)
        if not isinstance(column, np.ndarray) or column.dtype != dtype:
            found = getattr(column, "dtype", type(column).__name__)
            raise TraceError(f"{name} must be an array of {dtype.__name__}, found {found}")
        if column.ndim != dimensions or len(column) != rows:
            shape = "[N, L, K]" if dimensions == 3 else "[N]"
            raise TraceError(
                f"{name} must have shape {shape} with N = {rows}, found {column.shape}"
            )
    if trace.topk_weights.shape != trace.topk_ids.shape:
        raise TraceError(
            f"topk_weights must have the shape of topk_ids {trace.topk_ids.shape}, "
            f"found {trace.topk_weights.shape}"
        )


def _check_values(trace: RoutingTrace) -> None:
    """Ranges of the numbers; the shapes are right already."""
    slots = trace.topk_ids.shape[2]
    if len(set(trace.layer_ids)) != len(trace.layer_ids):
        raise TraceError(f"layer_ids must be distinct, found {trace.layer_ids}")
    for layer, count, k in zip(trace.layer_ids, trace.experts, trace.top_k, strict=True):
        if not 1 <= count < UNUSED:
            raise TraceError(f"experts of layer {layer} must be 1 to {UNUSED - 1}, found {count}")
        if not 0 <= k <= slots:
            raise TraceError(f"top_k of layer {layer} must be 0 to K = {slots}, found {k}")
    limits = np.asarray(trace.experts, dtype=np.int64)[None, :, None]
    wrong = (trace.topk_ids >= limits) & (trace.topk_ids != UNUSED)
    if wrong.any():
        row, at, slot = (int(i) for i in np.argwhere(wrong)[0])
        raise TraceError(
            f"topk_ids[{row}, {at}, {slot}] is {trace.topk_ids[row, at, slot]}, but layer "
            f"{trace.layer_ids[at]} has {trace.experts[at]} experts"
        )
    if np.any(trace.phase > DECODE):
        raise TraceError(f"phase must be 0 or 1, found {int(trace.phase.max())}")
    if len(trace) and (trace.step_ids[0] < 0 or np.any(np.diff(trace.step_ids) < 0)):
        row = int(np.argmax(np.diff(trace.step_ids, prepend=0) < 0))
        raise TraceError(f"step_ids must start at 0 or more and never decrease; wrong in row {row}")


def _load_file(path: Path) -> RoutingTrace:
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            check_header(path, header)
            names = set(file.keys())
            absent = [name for name in COLUMNS if name not in names]
            if absent:
                raise TraceError(f"{path}: tensor {absent[0]!r} is missing; record the trace again")
            columns = {name: file.get_tensor(name) for name in COLUMNS}
    except FileNotFoundError as error:
        raise TraceError(f"{path}: no such trace; check the path") from error
    except (SafetensorError, OSError) as error:
        raise TraceError(
            f"{path}: not a complete safetensors file ({error}); copy or record it again"
        ) from error
    try:
        return RoutingTrace(**columns, **read_description(header))
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


def check_header(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise TraceError(
            f"{path}: header field 'format' is {header.get('format')!r}, not {FORMAT!r}; "
            "this is no routing trace"
        )
    if header.get("version") != str(VERSION):
        raise TraceError(
            f"{path}: header field 'version' is {header.get('version')!r}, this release reads "
            f"{VERSION}; read it with the release that wrote it, or record it again"
        )


def read_description(header: dict[str, str]) -> dict[str, Any]:
    """The fields of `RoutingTrace.description` from a file's header."""
    result: dict[str, Any] = {}
    for name in ("layer_ids", "experts", "top_k"):
        try:
            value = json.loads(header[name])
            if not isinstance(value, list) or any(type(item) is not int for item in value):
                raise ValueError(f"not a list of integers: {header[name]!r}")
        except (KeyError, ValueError) as error:
            raise TraceError(
                f"header field {name!r} is missing or damaged ({error}); record the trace again"
            ) from error
        result[name] = tuple(value)
    for name in ("model_id", "fingerprint", "tokenizer_id"):
        if name not in header:
            raise TraceError(f"header field {name!r} is missing; record the trace again")
        result[name] = header[name]
    return result
