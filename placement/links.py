"""`Links`: what moving bytes between devices costs, inside a node and between nodes.

Knows bandwidth and latency; neither models, nor plans, nor what the bytes are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from moe_runtime.placement.topology import Topology

from moe_runtime.core import FloatArray
from moe_runtime.errors import PlanError

__all__ = ["Link", "Links", "loads_by_level"]

_RATES = (  # by unit; a lower b alone could be bits as well as bytes, so it is not among them
    {f"{prefix}bit": 1000.0**power / 8 for power, prefix in enumerate(("", "k", "m", "g", "t"))}
    | {f"{prefix}B": 1000.0**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}
    | {f"{prefix}IB": 1024.0**power for power, prefix in enumerate("KMGT", start=1)}
)
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What every device has towards the others of one level.

    Args:
        bandwidth: bytes a second that a device sends, and as many that it receives meanwhile.
        latency: seconds that a collective takes before and beside its bytes.

    Raises:
        PlanError: a bandwidth that is not positive, a latency below 0.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or math.isnan(self.bandwidth):
            raise PlanError(f"a link's bandwidth must be above 0 bytes/s, found {self.bandwidth}")
        if not (math.isfinite(self.latency) and self.latency >= 0):
            raise PlanError(f"a link's latency must be 0 or more seconds, found {self.latency}")

    @classmethod
    def parse(cls, text: str) -> Link:
        """`"1Gbit"`, `"25GB,20us"`: bits or bytes a second, and a latency.

        Raises:
            PlanError: the text is no such pair.
        """
        bandwidth, comma, latency = text.partition(",")
        return cls(
            bandwidth=_quantity(bandwidth.removesuffix("/s"), text, _RATES),
            latency=_quantity(latency, text, _SECONDS) if comma else 0.0,
        )

    def to_dict(self) -> dict[str, float]:
        """Plain data: bytes a second, seconds."""
        return {"bytes_per_second": self.bandwidth, "latency_seconds": self.latency}


@dataclass(frozen=True, kw_only=True)
class Links:
    """The links of a topology of one or two levels; both levels work at the same time.

    A collective takes the latency of the highest level that it spans, and then as long as its most
    loaded device needs, whose links send and receive side by side. That leaves out congestion
    inside the network and the work of packing.

    Args:
        near: between devices of one node.
        far: between nodes; `near` if not given.
        rounds: latencies that one collective takes: 1, or 2 where sizes are sent ahead.
    """

    near: Link
    far: Link | None = None
    rounds: int = 1

    @property
    def levels(self) -> tuple[Link, Link]:
        """Inside a node, between nodes."""
        return self.near, self.far or self.near

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Links:
        """What `to_dict` gave.

        Raises:
            PlanError: a field is missing or no number; names it.
        """
        found = []
        for level in ("same_node", "other_node"):
            try:
                entry = data[level]
                rate, latency = float(entry["bytes_per_second"]), float(entry["latency_seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise PlanError(
                    f"links: field {level!r} is missing or damaged ({error!r}); plan again with "
                    "--link"
                ) from None
            found.append(Link(bandwidth=rate, latency=latency))
        return cls(near=found[0], far=found[1])

    def scaled(self, factor: float) -> Links:
        """With all bandwidths `factor` times as high."""
        near, far = (replace(link, bandwidth=link.bandwidth * factor) for link in self.levels)
        return replace(self, near=near, far=None if self.far is None else far)

    def latency(self, topology: Topology) -> float:
        """Seconds that a collective over all devices takes without bytes; 0 on one device."""
        if topology.devices == 1:
            return 0.0
        return self.rounds * self.levels[topology.node_count > 1].latency

    def transfer_seconds(self, loads: FloatArray) -> FloatArray:
        """Seconds that the bytes of collectives take, latencies left out.

        Args:
            loads: float64 `[..., 2]`, bytes over the most loaded link of each level, as
                `loads_by_level` gives them.

        Returns:
            float64 `[...]`.
        """
        per_byte = np.array([1.0 / link.bandwidth for link in self.levels])
        taken: FloatArray = (loads * per_byte).max(-1)
        return taken

    @classmethod
    def of_topology(cls, topology: Topology, hidden_bytes: int) -> Links:
        """Links as a measured topology implies them; the latency is inside its costs, so 0 here.

        Args:
            topology: with costs in microseconds a token (`moe-runtime topology` measures them).
            hidden_bytes: bytes of one token's hidden state.

        Raises:
            PlanError: costs in another unit, or costs of 0 between devices.
        """
        if topology.unit != "us":
            raise PlanError(
                f"the topology's costs are in {topology.unit}, which says nothing of seconds; give "
                "--link BANDWIDTH,LATENCY, or measure one (moe-runtime topology)"
            )
        same = topology.node_of[:, None] == topology.node_of
        away = ~np.eye(topology.devices, dtype=bool)
        found = []
        for pairs in (same & away, ~same):
            costs = topology.costs[pairs]
            if costs.size and costs.max() <= 0:
                raise PlanError("the topology's costs are 0 between devices; give --link")
            rate = hidden_bytes / (float(np.median(costs)) * 1e-6) if costs.size else math.inf
            found.append(Link(bandwidth=rate))
        return cls(near=found[0], far=found[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        near, far = (link.to_dict() for link in self.levels)
        return {"same_node": near, "other_node": far, "rounds": self.rounds}


def loads_by_level(matrices: FloatArray, topology: Topology) -> FloatArray:
    """Bytes over the most loaded link of each level: the most that a device sends or receives.

    Args:
        matrices: float64 `[..., G, G]`, bytes from each device to each other; what a device keeps
            for itself crosses no link.

    Returns:
        float64 `[..., 2]`, inside a node and between nodes.
    """
    same = topology.node_of[:, None] == topology.node_of
    away = ~np.eye(topology.devices, dtype=bool)
    levels = []
    for pairs in (same & away, ~same):
        crossing = np.where(pairs, matrices, 0.0)
        levels.append(np.maximum(crossing.sum(-1).max(-1), crossing.sum(-2).max(-1)))
    return np.stack(levels, axis=-1)


def _quantity(text: str, whole: str, units: dict[str, float]) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = "" if match is None else match[2]
    unit = unit.upper() if unit[-1:] == "B" else unit.lower()
    if match is None or unit not in units:
        raise PlanError(
            f"link {whole!r}: cannot read {text.strip()!r}; write a bandwidth and, if there is "
            "one, a latency: 1Gbit,0.2ms or 25GB,20us"
        )
    return float(match[1]) * units[unit]
