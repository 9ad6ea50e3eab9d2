"""`Problem`: what a plan has to respect, and what it should make small.

States constraints and checks whether they can be met at all; does not solve.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from moe_runtime.placement.topology import Topology

from moe_runtime.core import FloatArray, IntArray, format_bytes
from moe_runtime.errors import PlanError

__all__ = ["LayerLimits", "Objective", "Problem"]

_TERMS = ("crossing", "distinct", "time")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is made small: a weighted sum of shares that each lie between 0 and 1.

    Args:
        crossing: weight of the share of consecutive-layer expert pairs on different devices
            (ExFlow's objective).
        distinct: weight of the share of co-activated expert pairs on different devices: fewer
            distinct devices for a token and layer, which engines that return tokens home pay for.
        time: weight of the expected cost over the topology of going from one layer's expert to
            the next one's, as a share of the topology's highest cost.

    All 0: only the load is balanced.
    """

    crossing: float = 1.0
    distinct: float = 0.0
    time: float = 0.0

    def __post_init__(self) -> None:
        for name in _TERMS:
            weight = getattr(self, name)
            if not np.isfinite(weight) or weight < 0:
                raise PlanError(f"objective: the weight of {name} must be 0 or more, is {weight}")

    @property
    def is_load(self) -> bool:
        """Whether only the load counts."""
        return not (self.crossing or self.distinct or self.time)

    @classmethod
    def parse(cls, text: str) -> Objective:
        """`"crossing"`, `"crossing+0.5*distinct"`, `"time"`, `"load"`."""
        if text.strip() == "load":
            return cls(crossing=0.0)
        weights = dict.fromkeys(_TERMS, 0.0)
        for term in text.split("+"):
            match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*\*)?\s*([a-z]+)\s*", term)
            if match is None or match[2] not in _TERMS:
                raise PlanError(
                    f"objective {text!r}: cannot read {term.strip()!r}; write load, or a sum such "
                    f"as crossing+0.5*distinct of {', '.join(_TERMS)}"
                )
            weights[match[2]] += float(match[1] or 1.0)
        return cls(**weights)

    def __str__(self) -> str:
        terms = [(name, getattr(self, name)) for name in _TERMS]
        return "+".join(n if w == 1 else f"{w:g}*{n}" for n, w in terms if w) or "load"


@dataclass(frozen=True, kw_only=True)
class LayerLimits:
    """What one layer's placement has to keep.

    Args:
        least, most: int64 `[G]`, how many experts (replicas counted) each device holds.
        slots: how many (expert, device) pairs there are in all.
        load: float64 `[G]`, the highest load of each device; infinite where there is no cap.
    """

    least: IntArray
    most: IntArray
    slots: int
    load: FloatArray


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A placement problem.

    Args:
        layer_ids: absolute index of each MoE layer, in order of execution.
        experts: experts of each layer.
        topology: the devices.
        redundant: further slots a layer for replicas, over all devices.
        counts: `"equal"`, every device holds the same number of experts of a layer (what engines
            ask for); `"capped"`, up to `slack` times as many as its share.
        slack: see `counts`.
        load_cap: highest load of a device in each layer over its share of the layer's load
            (1.05: five percent above); None for no cap.
        objective: what is made small.
        expert_bytes: bytes of one expert of each layer; 0 where unknown.
        spill: whether experts beyond a device's memory may live in host memory or on disk.

    Raises:
        PlanError: devices that do not divide the slots, or cannot hold them; says by how much.
    """

    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    topology: Topology
    redundant: int = 0
    counts: str = "equal"
    slack: float = 1.25
    load_cap: float | None = None
    objective: Objective = Objective()
    expert_bytes: tuple[int, ...] = ()
    spill: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "expert_bytes", tuple(self.expert_bytes) or (0,) * len(self.layer_ids)
        )
        if not self.layer_ids:
            raise PlanError("a problem needs one MoE layer at least")
        if self.counts not in ("equal", "capped"):
            raise PlanError(f"counts must be equal or capped, found {self.counts!r}")
        if self.redundant < 0:
            raise PlanError(f"redundant slots cannot be negative, found {self.redundant}")
        if not np.isfinite(self.slack) or self.slack < 1:
            raise PlanError(f"slack must be 1 or more, found {self.slack}")
        if self.load_cap is not None and not (np.isfinite(self.load_cap) and self.load_cap >= 1):
            raise PlanError(
                f"a load cap is a factor over the mean, 1 or more, found {self.load_cap}; no "
                "placement has a highest load below the mean"
            )
        for layer, count in zip(self.layer_ids, self.experts, strict=True):
            self._check_slots(layer, count)
        self._check_memory()

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.topology.devices

    def _check_slots(self, layer: int, count: int) -> None:
        devices, slots = self.devices, count + self.redundant
        if self.redundant > count * (devices - 1):
            raise PlanError(
                f"layer {layer}: {self.redundant} redundant slots, but {count} experts on "
                f"{devices} devices have use for {count * (devices - 1)} at most"
            )
        if count < devices and slots < devices:
            raise PlanError(f"layer {layer}: {count} experts are fewer than {devices} devices")
        if self.counts == "equal" and slots % devices:
            more = -slots % devices
            raise PlanError(
                f"layer {layer}: {slots} slots ({count} experts, {self.redundant} redundant) "
                f"cannot be shared equally by {devices} devices; take {self.redundant + more} "
                "redundant slots, or counts='capped'"
            )

    def _check_memory(self) -> None:
        memory = self.topology.memory
        if self.spill or not any(memory) or not all(self.expert_bytes):
            return
        if self.counts == "equal":
            need = sum(
                (count + self.redundant) // self.devices * size
                for count, size in zip(self.experts, self.expert_bytes, strict=True)
            )
            for device, has in enumerate(memory):
                if has and need > has:
                    raise PlanError(
                        f"device {device} has {format_bytes(has)} for experts, an equal share of "
                        f"them takes {format_bytes(need)}: {format_bytes(need - has)} too little; "
                        "give more devices or memory, or let experts spill to host memory"
                    )
        elif all(memory):
            need = sum(
                (count + self.redundant) * size
                for count, size in zip(self.experts, self.expert_bytes, strict=True)
            )
            if need > sum(memory):
                raise PlanError(
                    f"all devices together have {format_bytes(sum(memory))} for experts, which "
                    f"take {format_bytes(need)}: {format_bytes(need - sum(memory))} too little"
                )

    def limits(self, position: int, load: FloatArray | None = None) -> LayerLimits:
        """What the layer at `position` has to keep.

        Args:
            load: float64 `[E]`, the uses of its experts, for the load cap.

        Raises:
            PlanError: a single expert exceeds the cap whatever is done.
        """
        devices, slots = self.devices, self.experts[position] + self.redundant
        if self.counts == "equal":
            least = most = np.full(devices, slots // devices, dtype=np.int64)
        else:
            share = self._memory_shares()
            most = np.ceil(self.slack * slots * share - 1e-9).astype(np.int64)
            most = np.minimum(most, self.experts[position])
            least = np.zeros(devices, dtype=np.int64)
            if most.sum() < slots:
                raise PlanError(
                    f"layer {self.layer_ids[position]}: {slots} slots, but the devices hold "
                    f"{most.tolist()} at most; raise the slack"
                )
        highest = np.full(devices, np.inf)
        if self.load_cap is not None and load is not None and load.sum() > 0:
            highest = self.load_cap * load.sum() * self.topology.load_shares
            self._check_cap(position, load, highest)
        return LayerLimits(least=least, most=most, slots=slots, load=highest)

    def _memory_shares(self) -> FloatArray:
        memory = np.asarray(self.topology.memory, dtype=np.float64)
        if not memory.all():
            return np.full(self.devices, 1.0 / self.devices)
        shares: FloatArray = memory / memory.sum()
        return shares

    def _check_cap(self, position: int, load: FloatArray, highest: FloatArray) -> None:
        """The largest expert, split over as many replicas as there can be, has to fit."""
        most = min(self.devices, self.redundant + 1)
        expert = int(load.argmax())
        least = load[expert] / most
        if least > highest.max() * (1 + 1e-9):
            factor = least / (load.sum() * self.topology.load_shares.max())
            raise PlanError(
                f"the load cap of {self.load_cap} cannot be kept in layer "
                f"{self.layer_ids[position]}: expert {expert} alone has {factor:.3f} times a "
                f"device's mean load{'' if most == 1 else f' on each of {most} devices'}; raise "
                "the cap above that, or add redundant slots"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options, for a plan file's settings."""
        return {
            "objective": str(self.objective),
            "redundant": self.redundant,
            "counts": self.counts,
            "slack": self.slack,
            "load_cap": self.load_cap,
            "spill": self.spill,
            "expert_bytes": list(self.expert_bytes),
        }
