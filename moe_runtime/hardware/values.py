"""A machine as measured: `HardwareProfile` and what it is made of, and what can be asked of it.

Does not know how anything is measured or stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_runtime.errors import ConfigError
from moe_runtime.hardware.curves import seconds_at

__all__ = [
    "CopyTime",
    "DeviceFacts",
    "DiskFacts",
    "DiskRead",
    "ExpertShape",
    "ExpertTime",
    "HardwareProfile",
    "HostFacts",
    "MemoryRate",
    "Note",
    "Spread",
]

# Bytes a second of one PCI Express lane, by generation, after the line code's overhead.
_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one quantity: its median, and the lowest and highest of them."""

    median: float
    low: float
    high: float
    samples: int

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 < self.low <= self.median <= self.high < float("inf"):
            raise ConfigError(
                f"a measurement needs 0 < low <= median <= high and a sample at least, found "
                f"{self.low}, {self.median}, {self.high} of {self.samples}; measure again"
            )


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that was not measured, or not as it should be, and why."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """The host as the system describes it.

    Args:
        cores: processors that this process may use.
        compute_threads: threads that PyTorch computed with while the host was measured.
        memory_bytes: physical memory; cache_bytes: its last-level caches, 0 if unknown.
        version: of PyTorch.
    """

    processor: str
    cores: int
    compute_threads: int
    memory_bytes: int
    cache_bytes: int
    version: str


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """A GPU as its driver describes it.

    Args:
        cuda: PyTorch's name for it, like `"cuda:0"`; None where PyTorch cannot use it.
        memory_bytes, free_bytes: all of its memory, and what was free of it.
        driver: version of the driver; empty if unknown.
        link_generation, link_width: of PCI Express, the most that device and slot can do together;
            None where the driver does not say.
        peer_links: active NVLinks to other devices; None where the driver does not say.
    """

    name: str
    cuda: str | None
    memory_bytes: int
    free_bytes: int
    driver: str
    link_generation: int | None
    link_width: int | None
    peer_links: int | None

    @property
    def link_bytes_per_second(self) -> float | None:
        """What the PCI Express link can carry one way; None if its form is not known."""
        lane = _LANE.get(self.link_generation or 0)
        return lane * self.link_width if lane and self.link_width else None


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """What was read.

    Args:
        path: the folder that the file lies in.
        mount, filesystem: where that is mounted, and as what.
        file_bytes: size of the file.
        existing: whether it was there before (a checkpoint's shard), else made and removed.
        direct: whether reads went past the page cache.
    """

    path: str
    mount: str
    filesystem: str
    file_bytes: int
    existing: bool
    direct: bool


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The gated MLP that compute is measured with: weights `[2I, D]` and `[D, I]`.

    Raises:
        ConfigError: sizes below 1, or a dtype that is none of float32, float16, bfloat16.
    """

    hidden: int = 2048
    intermediate: int = 768
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.intermediate < 1:
            raise ConfigError(
                f"an expert's shape is hidden,intermediate with both at least 1, found "
                f"{self.hidden},{self.intermediate}"
            )
        if self.dtype not in _DTYPE_BYTES:
            raise ConfigError(
                f"an expert's dtype must be one of {', '.join(_DTYPE_BYTES)}, found {self.dtype!r}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's weights."""
        return 3 * self.hidden * self.intermediate * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class MemoryRate:
    """How fast `place` (`"host"` or `"cuda:0"`) reads or copies its own memory.

    `rate` is bytes a second; a copy counts what is read and what is written.
    """

    place: str
    kind: Literal["read", "copy"]
    threads: int
    rate: Spread


@dataclass(frozen=True, kw_only=True)
class DiskRead:
    """Reads of `nbytes` at random places by so many threads at once.

    `seconds` is one read's time, `rate` the bytes a second of all threads together.
    """

    nbytes: int
    threads: int
    seconds: Spread
    rate: Spread


@dataclass(frozen=True, kw_only=True)
class CopyTime:
    """One copy of `nbytes` from host memory (page-locked or not) to a device, in seconds."""

    place: str
    nbytes: int
    pinned: bool
    seconds: Spread


@dataclass(frozen=True, kw_only=True)
class ExpertTime:
    """One expert's MLP on so many tokens, weights cold in the caches, in seconds."""

    place: str
    tokens: int
    seconds: Spread


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """One machine's measured speeds. Bytes, seconds, bytes a second.

    Args:
        machine: name of the kind of machine, see `cache.machine_key`.
        measured: when, ISO 8601 in UTC; seconds: how long it took.
        load_average: of the last minute when it began: above 0 others were at work too.
        disk: None if nothing could be read.
        expert: the expert that `experts` are times of.
        notes: what could not be measured.
    """

    machine: str
    measured: str
    seconds: float
    load_average: float
    host: HostFacts
    devices: tuple[DeviceFacts, ...]
    disk: DiskFacts | None
    expert: ExpertShape
    memory: tuple[MemoryRate, ...]
    reads: tuple[DiskRead, ...]
    copies: tuple[CopyTime, ...]
    experts: tuple[ExpertTime, ...]
    notes: tuple[Note, ...]

    def device(self, cuda: str) -> DeviceFacts | None:
        """The device of this PyTorch name; None if it was not there."""
        return next((device for device in self.devices if device.cuda == cuda), None)

    def memory_rate(self, place: str, kind: Literal["read", "copy"] = "read") -> float | None:
        """The most bytes a second of a place's memory, over thread counts; None if not measured."""
        rates = [m.rate.median for m in self.memory if (m.place, m.kind) == (place, kind)]
        return max(rates, default=None)

    def read_seconds(self, nbytes: int, *, threads: int = 1, piece: int = 1 << 20) -> float | None:
        """Seconds to bring `nbytes` from disk in pieces, read by so many threads.

        Taken at the most threads measured that are not more, and the fewest if all are. None if
        not measured.
        """
        counts = sorted({read.threads for read in self.reads})
        if not counts or nbytes <= 0:
            return 0.0 if counts else None
        at = max((count for count in counts if count <= threads), default=counts[0])
        points = [
            # A read of all threads together brings `at` pieces in about one read's time.
            (float(read.nbytes), read.nbytes / read.rate.median)
            for read in self.reads
            if read.threads == at
        ]
        piece = min(piece, nbytes)
        seconds = seconds_at(points, piece) * nbytes / piece
        # However many threads there are, a read's latency passes before the first bytes come.
        latency = min(read.seconds.median for read in self.reads if read.threads == at)
        return max(seconds, latency)

    def copy_seconds(self, place: str, nbytes: int, *, pinned: bool = True) -> float | None:
        """Seconds of a copy from host memory to a device; None if not measured."""
        points = [
            (float(copy.nbytes), copy.seconds.median)
            for copy in self.copies
            if copy.place == place and copy.pinned == pinned
        ]
        return seconds_at(points, nbytes) if points else None

    def expert_seconds(self, place: str, tokens: int, *, nbytes: int | None = None) -> float | None:
        """Seconds of one expert on so many tokens; None if not measured.

        Args:
            nbytes: bytes of the expert's weights where they are not those of `expert`: time is
                taken in proportion, as both the bytes to stream and the products are.
        """
        points = [
            (float(time.tokens), time.seconds.median)
            for time in self.experts
            if time.place == place
        ]
        if not points:
            return None
        return seconds_at(points, tokens) * (1 if nbytes is None else nbytes / self.expert.nbytes)
