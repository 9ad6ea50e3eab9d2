"""`Topology`: devices, the nodes they stand in, and what it costs to move a token between them.

Knows neither models nor plans. Read from a small YAML file or made from a few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_runtime.core import FloatArray, IntArray, parse_bytes
from moe_runtime.errors import PlanError
from moe_runtime.files import write_text

__all__ = ["Topology"]

# What ExFlow's own evaluation charges for a hop (its published code, `calculate_cost`).
_SAME_DEVICE, _SAME_NODE, _OTHER_NODE = 0.0, 1.0, 2.0
_MOST_MEMORY = 1 << 62  # bytes: what a whole number of the numeric libraries holds
_KEYS = ("devices", "nodes", "memory", "speed", "same_node", "other_node", "cost", "unit")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """G devices in nodes.

    Args:
        nodes: node of each device, `[G]`, numbered from 0.
        cost: `[G][G]`, cost of moving one token's hidden state from one device to another; 0 on
            the diagonal. In `unit`.
        memory: bytes for experts on each device, `[G]`; 0 where it is not limited.
        speed: relative speed of each device, `[G]`; a device of speed 2 should get twice the load.
        unit: what a cost is counted in: `"hops"`, or `"us"` (microseconds a token).

    Raises:
        PlanError: lengths that disagree, negative or non-finite numbers.
    """

    nodes: tuple[int, ...]
    cost: tuple[tuple[float, ...], ...]
    memory: tuple[int, ...] = ()
    speed: tuple[float, ...] = ()
    unit: str = "hops"

    def __post_init__(self) -> None:
        count = len(self.nodes)
        if not count:
            raise PlanError("a topology needs one device at least")
        object.__setattr__(self, "memory", tuple(self.memory) or (0,) * count)
        object.__setattr__(self, "speed", tuple(self.speed) or (1.0,) * count)
        for name in ("cost", "memory", "speed"):
            if len(getattr(self, name)) != count:
                raise PlanError(
                    f"topology: {name} has {len(getattr(self, name))} entries for {count} devices"
                )
        if sorted(set(self.nodes)) != list(range(max(self.nodes) + 1)):
            raise PlanError(f"topology: nodes must be numbered from 0 on, found {self.nodes}")
        for device, row in enumerate(self.cost):
            if len(row) != count:
                raise PlanError(
                    f"topology: cost row {device} has {len(row)} entries for {count} devices"
                )
            if row[device] != 0:
                raise PlanError(
                    f"topology: cost[{device}][{device}] must be 0, found {row[device]}"
                )
        if not np.isfinite(self.costs).all() or (self.costs < 0).any():
            raise PlanError("topology: costs must be finite and not negative")
        if not all(np.isfinite(value) and value > 0 for value in self.speed):
            raise PlanError(f"topology: speeds must be positive, found {self.speed}")
        if any(value < 0 for value in self.memory):
            raise PlanError(f"topology: memory cannot be negative, found {self.memory}")

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.nodes)

    @property
    def node_count(self) -> int:
        """Number of nodes."""
        return max(self.nodes) + 1

    @cached_property
    def costs(self) -> FloatArray:
        """float64 `[G, G]`."""
        return np.asarray(self.cost, dtype=np.float64)

    @cached_property
    def node_of(self) -> IntArray:
        """int64 `[G]`."""
        return np.asarray(self.nodes, dtype=np.int64)

    @cached_property
    def load_shares(self) -> FloatArray:
        """float64 `[G]`, the share of a layer's load that each device should get; sums to 1."""
        speed = np.asarray(self.speed, dtype=np.float64)
        shares: FloatArray = speed / speed.sum()
        return shares

    @property
    def uniform(self) -> bool:
        """Whether every pair of different devices costs the same: then devices can be renamed."""
        off = self.costs[~np.eye(self.devices, dtype=bool)]
        return bool(off.size == 0 or (off == off[0]).all()) and len(set(self.speed)) == 1

    def by_node(self) -> list[list[int]]:
        """Devices of each node."""
        return [
            [device for device, node in enumerate(self.nodes) if node == number]
            for number in range(self.node_count)
        ]

    @classmethod
    def of(
        cls,
        devices: int,
        nodes: int = 1,
        *,
        memory: int = 0,
        same_node: float = _SAME_NODE,
        other_node: float = _OTHER_NODE,
        unit: str = "hops",
    ) -> Topology:
        """`devices` equal devices spread evenly over `nodes`, in order.

        Args:
            memory: bytes for experts on each device; 0 for no limit.
            same_node, other_node: cost of a hop; ExFlow's 1 and 2 unless given.
        """
        if devices < 1 or nodes < 1 or devices % nodes:
            raise PlanError(
                f"{devices} devices cannot be spread evenly over {nodes} nodes; give a multiple, "
                "or a topology file that lists the node of each device"
            )
        node_of = tuple(device * nodes // devices for device in range(devices))
        cost = tuple(
            tuple(
                _SAME_DEVICE if a == b else (same_node if node_of[a] == node_of[b] else other_node)
                for b in range(devices)
            )
            for a in range(devices)
        )
        return cls(nodes=node_of, cost=cost, memory=(memory,) * devices, unit=unit)

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: Path | str) -> Topology:
        """Read a YAML file; its form is in `docs/formats.md`.

        Raises:
            PlanError: no such file, no YAML, unknown or wrong fields; names file and field.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. a 99th of May
            raise PlanError(f"{path}: not a YAML file: {error}") from error
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def save(self, path: Path | str) -> Path:
        """Write a YAML file that `load` reads, whole or not at all."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)
        return write_text(path, text)

    @classmethod
    def measured(
        cls, seconds: FloatArray, *, memory: tuple[int, ...] = (), near: float = 2.0
    ) -> Topology:
        """Devices whose hops were timed; those that reach each other quickly share a node.

        Args:
            seconds: `[G, G]`, seconds to move one token's hidden state; the diagonal is ignored.
            memory: as in the constructor.
            near: devices up to `near` times as far apart as the closest pair are of one node.

        Raises:
            PlanError: no square, or times that are not positive.
        """
        times = np.array(seconds, dtype=np.float64)
        if times.ndim != 2 or times.shape[0] != times.shape[1]:
            raise PlanError(f"measured times need shape [G, G], found {times.shape}")
        away = ~np.eye(len(times), dtype=bool)
        if not np.isfinite(times[away]).all() or (times[away] <= 0).any():
            raise PlanError("measured times must be positive and finite")
        times[~away] = 0.0
        limit = near * times[away].min() if away.any() else 0.0
        nodes = np.full(len(times), -1, dtype=np.int64)
        for device in range(len(times)):
            if nodes[device] < 0:
                close = (times[device] <= limit) & (times[:, device] <= limit) & (nodes < 0)
                nodes[close] = nodes.max() + 1
        return cls(
            nodes=tuple(nodes.tolist()),
            cost=tuple(tuple(row) for row in (times * 1e6).round(4).tolist()),
            memory=memory,
            unit="us",
        )

    @classmethod
    def from_dict(cls, data: Any) -> Topology:
        """A topology from the plain data of a YAML or plan file."""
        if not isinstance(data, Mapping):
            raise PlanError("a topology is a mapping with the field 'devices'")
        unknown = sorted(set(map(str, data)) - set(_KEYS))
        if unknown:
            raise PlanError(f"topology: unknown field {unknown[0]!r}; known: {', '.join(_KEYS)}")
        count = data.get("devices")
        if type(count) is not int or not 1 <= count <= 4096:
            raise PlanError(f"topology: devices must be a whole number 1 to 4096, found {count!r}")
        nodes = data.get("nodes", 1)
        unit = data.get("unit", "hops")
        if not isinstance(unit, str):
            raise PlanError(f"topology: unit must be a text, found {unit!r}")
        costs = [
            _number(data.get(key, default), key)
            for key, default in (("same_node", _SAME_NODE), ("other_node", _OTHER_NODE))
        ]
        if isinstance(nodes, list):
            node_of = tuple(_whole(item, "nodes") for item in nodes)
            cost = tuple(
                tuple(0.0 if a == b else costs[x != y] for b, y in enumerate(node_of))
                for a, x in enumerate(node_of)
            )
        else:
            even = cls.of(count, _whole(nodes, "nodes"), same_node=costs[0], other_node=costs[1])
            node_of, cost = even.nodes, even.cost
        if "cost" in data:
            rows = data["cost"]
            if not isinstance(rows, Sequence) or any(not isinstance(row, list) for row in rows):
                raise PlanError("topology: cost must be a list of lists of numbers")
            cost = tuple(tuple(_number(item, "cost") for item in row) for row in rows)
        if len(node_of) != count:
            raise PlanError(f"topology: nodes names {len(node_of)} devices, devices says {count}")
        return cls(
            nodes=node_of,
            cost=cost,
            memory=tuple(_each(data.get("memory", 0), count, "memory", _memory)),
            speed=tuple(_each(data.get("speed", 1.0), count, "speed", _number)),
            unit=unit,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` gives an equal topology."""
        return {
            "devices": self.devices,
            "nodes": list(self.nodes),
            "memory": list(self.memory),
            "speed": list(self.speed),
            "cost": [list(row) for row in self.cost],
            "unit": self.unit,
        }


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"topology: {name} must be a number, found {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise PlanError(f"topology: {name} must be a finite number, found one too large") from None


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= 4096:
        raise PlanError(f"topology: {name} must be whole numbers, found {value!r}")
    return value


def _memory(value: Any, name: str) -> int:
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise PlanError(f"topology: {name}: {error}") from None
    except OverflowError:
        size = _MOST_MEMORY + 1
    if size > _MOST_MEMORY:
        raise PlanError(f"topology: {name}: more bytes than any device has; correct the size")
    return size


def _each(value: Any, count: int, name: str, read: Any) -> list[Any]:
    """One value for all devices, or a list of one for each."""
    values = value if isinstance(value, list) else [value] * count
    return [read(item, name) for item in values]
