"""`Walk`: calls of an expert-parallel run on their way, and what they send added up.

Knows messages, devices and links' loads; not the order in which an engine sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from moe_runtime.placement.links import loads_by_level
from moe_runtime.placement.messages import MessageSizes
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.topology import Topology

from moe_runtime.core import FloatArray, IntArray

__all__ = ["Walk", "vanilla_layer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """Some steps on their way; makes matrices of (step, from, to) and adds up what was sent."""

    steps: IntArray
    count: int
    layers: int
    topology: Topology
    sizes: MessageSizes
    kinds: dict[str, FloatArray] = field(default_factory=dict)
    collectives: list[str] = field(default_factory=list)
    loads: list[FloatArray] = field(default_factory=list)
    present: list[BoolArray] = field(default_factory=list)
    matrices: list[FloatArray] | None = None

    def tally(self, rows: IntArray, device: IntArray) -> FloatArray:
        """float64 `[S, G]`: how many of these are on each device."""
        devices = self.topology.devices
        cells = self.steps[rows] * devices + device
        counts = np.bincount(cells, minlength=self.count * devices)
        return counts.reshape(self.count, devices).astype(np.float64)

    def messages(self, rows: IntArray, source: IntArray, target: IntArray) -> FloatArray:
        """float64 `[S, G, G]`: how many of these go from device to device; none to itself."""
        devices = self.topology.devices
        away = source != target
        cells = (self.steps[rows] * devices + source) * devices + target
        counts = np.bincount(cells[away], minlength=self.count * devices**2)
        return counts.reshape(self.count, devices, devices).astype(np.float64)

    def send(
        self,
        name: str,
        parts: Mapping[str, FloatArray],
        position: int | None,
        present: BoolArray | None = None,
    ) -> None:
        """Record a collective of a MoE layer, or of the step's end (None).

        Args:
            parts: bytes by kind, float64 `[S, G, G]`, zero on the diagonal.
            present: bool `[S]`, in which steps it takes place; in all if not given.
        """
        present = np.ones(self.count, dtype=np.bool_) if present is None else present
        frames = self.frames(self.sizes.frame) * present[:, None, None]
        parts = {**parts, "frames": frames} if position is not None else dict(parts)
        for kind, matrix in parts.items():
            width = 1 if position is None else self.layers
            sent = self.kinds.setdefault(kind, np.zeros((self.count, width)))
            sent[:, position or 0] += matrix.sum((1, 2))
        self.collectives.append(name)
        self.present.append(present)
        whole = sum(parts.values(), np.zeros(()))
        self.loads.append(loads_by_level(whole, self.topology))
        if self.matrices is not None:
            self.matrices.append(whole)

    def everywhere(self, amount: FloatArray) -> FloatArray:
        """float64 `[S, G, G]`: each device sends its amount `[S, G]` to every other device."""
        away = ~np.eye(self.topology.devices, dtype=bool)
        return np.asarray(amount)[:, :, None] * away

    def frames(self, size: int) -> FloatArray:
        """float64 `[S, G, G]`: so many bytes from each device to each other."""
        devices = self.topology.devices
        return self.everywhere(np.full((self.count, devices), float(size)))


def vanilla_layer(walk: Walk, position: int, home: IntArray, need: BoolArray) -> None:
    """Rows to the devices of their experts, one message each, and the sums back.

    Args:
        home: int64 `[N]`, the device of each row.
        need: bool `[N, G]`, the devices that compute for it.
    """
    rows, devices = np.nonzero(need)
    there = walk.messages(rows, home[rows], devices)
    walk.send("dispatch", {"dispatch": there * walk.sizes.dispatch}, position)
    walk.send("combine", {"combine": there.swapaxes(1, 2) * walk.sizes.combine}, position)
