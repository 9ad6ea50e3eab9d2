"""`Run`: a run's record read from plain data, checked once, with typed columns.

Does not know how a record is made nor how it is shown.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import ConfigError
from moe_runtime.report.fields import RunError
from moe_runtime.report.fields import count as _count
from moe_runtime.report.fields import mapping as _mapping
from moe_runtime.report.fields import number as _number
from moe_runtime.report.pinned import PinnedExperts, read_pinned
from moe_runtime.report.predicted import Predicted, read_predicted

__all__ = [
    "DECODE",
    "PREFILL",
    "RUN_FORMAT",
    "RUN_VERSION",
    "Counters",
    "LayerCounters",
    "Residency",
    "Run",
    "RunError",
    "SimulatedPolicy",
    "StepColumns",
    "read_run",
]

RUN_FORMAT = "moe-runtime.run"
RUN_VERSION = 1
PREFILL, DECODE = 0, 1

_SECTIONS = ("model", "config", "budget", "machine", "counters")
_STEP_COLUMNS = ("phase", "tokens", "seconds", "hits", "misses", "bytes", "stall_seconds")


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Totals of a run. Bytes are bytes, times are seconds.

    A hit or a miss is one expert that one layer needed in one forward call, however many tokens
    were routed to it. `rereads` are the misses of experts that had been loaded before, `hosted`
    those that the host computed, `hosted_rows` their tokens.
    """

    steps: int
    tokens: int
    prefill_tokens: int
    decode_tokens: int
    hits: int
    misses: int
    evictions: int
    rereads: int
    bytes_read: int
    host_bytes: int
    stall_seconds: float
    expert_seconds: float
    step_seconds: float
    prefill_seconds: float
    decode_seconds: float
    hosted: int = 0
    hosted_rows: int = 0
    hosted_seconds: float = 0.0

    @property
    def uses(self) -> int:
        """Experts needed, hits and misses together."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Hits over uses, 0 to 1; None if no expert was needed."""
        return self.hits / self.uses if self.uses else None


@dataclass(frozen=True, kw_only=True)
class LayerCounters:
    """Totals of one MoE layer, named by its absolute index."""

    layer: int
    hits: int
    misses: int
    bytes_read: int
    stall_seconds: float

    @property
    def hit_rate(self) -> float | None:
        """Hits over uses, 0 to 1; None if the layer was not used."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else None


@dataclass(frozen=True, kw_only=True)
class StepColumns:
    """One entry for each recorded forward call; `dropped` later calls were not kept."""

    phase: IntArray
    tokens: IntArray
    seconds: FloatArray
    hits: IntArray
    misses: IntArray
    bytes: IntArray
    stall_seconds: FloatArray
    dropped: int = 0

    @property
    def count(self) -> int:
        """Number of recorded calls."""
        return len(self.phase)


@dataclass(frozen=True, kw_only=True)
class Residency:
    """Which experts the fast tier held at some steps: bool `[snapshots, grid.size]`."""

    steps: IntArray
    held: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SimulatedPolicy:
    """What an eviction policy would have done on the same routing."""

    name: str
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float | None:
        """Hits over uses, 0 to 1; None on an empty routing."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked record: the plain data and what was read from it."""

    data: Mapping[str, Any]
    grid: ExpertGrid
    counters: Counters
    layers: tuple[LayerCounters, ...]
    steps: StepColumns
    residency: Residency | None
    simulated: tuple[SimulatedPolicy, ...]
    pinned: PinnedExperts | None = None
    predicted: Predicted | None = None

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the record, empty where it was left out."""
        value = self.data.get(name)
        return value if isinstance(value, Mapping) else {}

    @cached_property
    def mean_expert_bytes(self) -> float | None:
        """Mean bytes of an expert over the whole model; None if the record lacks them."""
        per_layer = self.section("model").get("expert_bytes")
        if not isinstance(per_layer, Sequence) or len(per_layer) != len(self.grid.layers):
            return None
        total = sum(size * count for size, count in zip(per_layer, self.grid.experts, strict=True))
        return float(total) / self.grid.size if self.grid.size else None


def read_run(data: Any) -> Run:
    """Check a run record and read its columns.

    Raises:
        RunError: not a run record, another version, or a field is missing or malformed; the
            message names the field.
    """
    if not isinstance(data, Mapping):
        raise RunError(f"a run record is a JSON object, found {type(data).__name__}")
    if data.get("format") != RUN_FORMAT:
        raise RunError(
            f"not a run record: its format is {data.get('format')!r}, expected {RUN_FORMAT!r}; "
            "give the run.json that `moe-runtime demo` or `generate --run` wrote"
        )
    if data.get("version") != RUN_VERSION:
        raise RunError(
            f"run record of version {data.get('version')!r}; this release reads version "
            f"{RUN_VERSION}: render it with the release that wrote it, or run again"
        )
    for name in _SECTIONS:
        _mapping(data, name)
    grid = _grid(_mapping(data, "model"))
    return Run(
        data=data,
        grid=grid,
        counters=_counters(_mapping(data, "counters")),
        layers=_layers(data.get("layers"), grid),
        steps=_steps(data.get("steps")),
        residency=_residency(data.get("residency"), grid),
        simulated=_simulated(data.get("simulation")),
        pinned=read_pinned(data.get("plan"), grid),
        predicted=read_predicted(data.get("prediction"), grid),
    )


def _counters(data: Mapping[str, Any]) -> Counters:
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(Counters):
        if entry.name not in data and entry.default is not dataclasses.MISSING:
            continue  # a run of before there was this
        read = _number if entry.type == "float" else _count
        values[entry.name] = read(data, entry.name, "counters")
    return Counters(**values)


def _grid(model: Mapping[str, Any]) -> ExpertGrid:
    columns = []
    for name in ("layers", "experts"):
        values = model.get(name)
        if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
            raise RunError(f"run record: model.{name} must be a list of whole numbers")
        columns.append(tuple(values))
    try:
        return ExpertGrid(layers=columns[0], experts=columns[1])
    except ConfigError as error:
        raise RunError(f"run record: model.layers and model.experts do not fit: {error}") from None


def _layers(entries: Any, grid: ExpertGrid) -> tuple[LayerCounters, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, Sequence):
        raise RunError(f"run record: layers must be a list, found {type(entries).__name__}")
    found = []
    for at, entry in enumerate(entries):
        where = f"layers[{at}]"
        if not isinstance(entry, Mapping):
            raise RunError(f"run record: {where} must be an object, found {type(entry).__name__}")
        layer = LayerCounters(
            layer=_count(entry, "layer", where),
            hits=_count(entry, "hits", where),
            misses=_count(entry, "misses", where),
            bytes_read=_count(entry, "bytes_read", where),
            stall_seconds=_number(entry, "stall_seconds", where),
        )
        if layer.layer not in grid.position:
            raise RunError(
                f"run record: {where} is of layer {layer.layer}, which model.layers lacks"
            )
        found.append(layer)
    return tuple(found)


def _steps(data: Any) -> StepColumns:
    if data is None:
        data = {name: [] for name in _STEP_COLUMNS}
    if not isinstance(data, Mapping):
        raise RunError(f"run record: steps must be an object, found {type(data).__name__}")
    columns: dict[str, Any] = {}
    for name in _STEP_COLUMNS:
        kind = np.float64 if name.endswith("seconds") else np.int64
        columns[name] = _column(data.get(name), f"steps.{name}", kind)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RunError(f"run record: the columns of steps differ in length: {lengths}")
    return StepColumns(**columns, dropped=_count({"dropped": 0, **data}, "dropped", "steps"))


def _column(values: Any, where: str, kind: type[np.int64 | np.float64]) -> NDArray[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        found = "it is missing" if values is None else f"found {type(values).__name__}"
        raise RunError(f"run record: {where} must be a list of numbers, {found}")
    try:
        column = np.asarray(values, dtype=kind)
    except (TypeError, ValueError, OverflowError):
        raise RunError(f"run record: {where} must hold numbers only") from None
    if column.ndim != 1 or not np.isfinite(column).all() or (column < 0).any():
        raise RunError(f"run record: {where} must be a flat list of finite numbers of at least 0")
    return column


def _residency(data: Any, grid: ExpertGrid) -> Residency | None:
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise RunError(f"run record: residency must be an object, found {type(data).__name__}")
    steps = _column(data.get("steps"), "residency.steps", np.int64)
    bitmaps = data.get("bitmaps")
    if not isinstance(bitmaps, Sequence) or len(bitmaps) != len(steps):
        raise RunError("run record: residency.bitmaps must be one text for each residency.steps")
    held = np.zeros((len(steps), grid.size), dtype=np.bool_)
    for at, text in enumerate(bitmaps):
        try:
            packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
        except (TypeError, ValueError, binascii.Error):
            raise RunError(f"run record: residency.bitmaps[{at}] is not base64") from None
        if len(packed) != -(-grid.size // 8):
            raise RunError(
                f"run record: residency.bitmaps[{at}] has {len(packed)} bytes, "
                f"{grid.size} experts need {-(-grid.size // 8)}"
            )
        held[at] = np.unpackbits(packed, count=grid.size).astype(np.bool_)
    return Residency(steps=steps, held=held) if len(steps) else None


def _simulated(data: Any) -> tuple[SimulatedPolicy, ...]:
    if data is None:
        return ()
    if not isinstance(data, Mapping):
        raise RunError(f"run record: simulation must be an object, found {type(data).__name__}")
    return tuple(
        SimulatedPolicy(
            name=str(name),
            hits=_count(entry, "hits", f"simulation.{name}"),
            misses=_count(entry, "misses", f"simulation.{name}"),
        )
        for name, entry in data.items()
        if isinstance(entry, Mapping)
    )
