"""The shared value types: expert names, their dense numbering, tiers, byte sizes.

Knows nothing of models, tensors or caches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import ConfigError

__all__ = [
    "ExpertGrid",
    "ExpertId",
    "FloatArray",
    "IntArray",
    "Tier",
    "format_bytes",
    "parse_bytes",
    "parse_share",
]

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


class ExpertId(NamedTuple):
    """One routed expert: `layer` is the absolute Hugging Face layer index."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


class Tier(IntEnum):
    """Where an expert's weights are, fastest first."""

    FAST = 0
    HOST = 1
    DISK = 2


@dataclass(frozen=True, kw_only=True)
class ExpertGrid:
    """Dense numbering `0..size-1` of all routed experts, layers in order of execution.

    Args:
        layers: absolute layer index of each MoE layer, in order of execution, distinct.
        experts: number of routed experts of each of these layers.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.experts):
            raise ConfigError(
                f"a grid needs one expert count a layer: {len(self.layers)} layers, "
                f"{len(self.experts)} counts"
            )
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers of a grid must be distinct, found {self.layers}")
        if any(count < 1 for count in self.experts):
            raise ConfigError(f"every MoE layer needs an expert, found counts {self.experts}")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First dense index of each layer, by position in `layers`."""
        return tuple(accumulate(self.experts[:-1], initial=0)) if self.experts else ()

    @cached_property
    def position(self) -> dict[int, int]:
        """Position in `layers` of each absolute layer index."""
        return {layer: at for at, layer in enumerate(self.layers)}

    @property
    def size(self) -> int:
        """Number of experts over all layers."""
        return sum(self.experts)

    def index(self, layer: int, expert: int) -> int:
        """Dense index of an expert; ConfigError if there is no such expert."""
        position = self.position.get(layer)
        if position is None or not 0 <= expert < self.experts[position]:
            raise ConfigError(f"no expert {expert} in layer {layer} (MoE layers: {self.layers})")
        return self.offsets[position] + expert

    def expert_id(self, index: int) -> ExpertId:
        """The expert with this dense index; ConfigError if out of range."""
        if not 0 <= index < self.size:
            raise ConfigError(f"expert index {index} is outside 0..{self.size - 1}")
        position = int(np.searchsorted(np.asarray(self.offsets), index, side="right")) - 1
        return ExpertId(self.layers[position], int(index) - self.offsets[position])


def parse_bytes(text: int | str) -> int:
    """Bytes of `123`, `"8GiB"`, `"500 MB"`; ConfigError on anything else."""
    if isinstance(text, bool):
        raise ConfigError(f"a byte size is a number or a text like '8GiB', found {text!r}")
    if isinstance(text, int):
        if text < 0:
            raise ConfigError(f"a byte size cannot be negative, found {text}")
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].upper() not in _UNITS:
        known = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise ConfigError(f"cannot read {text!r} as a byte size; write '8GiB' (units: {known})")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_share(text: int | str) -> float | None:
    """The fraction of a text like `"25%"`, or None if it is not a percentage."""
    match = _SHARE.fullmatch(text) if isinstance(text, str) else None
    return float(match[1]) / 100 if match else None


def format_bytes(count: float) -> str:
    """A size for people: `1.50 GiB`, `640 B`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
