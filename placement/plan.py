"""`Plan`: which device holds which expert of which layer, in which tier, and what proves its worth.

A value with a file form (`*.plan.json`). Does not know how a plan is found or run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from moe_runtime.placement.topology import Topology
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError
from moe_runtime.files import write_text

__all__ = ["TIERS", "Certificate", "LayerPlan", "Plan"]

FORMAT, VERSION = "moe-runtime.plan", 1
TIERS = ("device", "host", "disk")

BoolArray: TypeAlias = NDArray[np.bool_]
PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Where the experts of one layer live.

    Args:
        layer: absolute Hugging Face layer index.
        hosts: for each expert the devices that hold it: one at least, distinct, ascending; more
            than one are replicas.
        tiers: for each expert where its devices keep it: `"device"`, `"host"` or `"disk"`.
            `"device"` for all if not given.
    """

    layer: int
    hosts: tuple[tuple[int, ...], ...]
    tiers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers) or (TIERS[0],) * len(self.hosts))
        if self.layer < 0:
            raise PlanError(f"layer {self.layer} of the plan: a layer index is 0 or more")
        if not self.hosts:
            raise PlanError(f"layer {self.layer} of the plan has no experts")
        if len(self.tiers) != len(self.hosts):
            raise PlanError(
                f"layer {self.layer} of the plan: {len(self.tiers)} tiers for "
                f"{len(self.hosts)} experts"
            )
        for expert, devices in enumerate(self.hosts):
            if not devices or list(devices) != sorted(set(devices)) or devices[0] < 0:
                raise PlanError(
                    f"layer {self.layer} expert {expert}: devices must be one at least, distinct "
                    f"and ascending, found {list(devices)}"
                )
        unknown = set(self.tiers) - set(TIERS)
        if unknown:
            raise PlanError(
                f"layer {self.layer}: unknown tier {unknown.pop()!r}; known: {', '.join(TIERS)}"
            )

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.hosts)

    @property
    def slots(self) -> int:
        """Number of (expert, device) pairs: the experts and their further replicas."""
        return sum(len(devices) for devices in self.hosts)

    @property
    def has_replicas(self) -> bool:
        """Whether some expert lives on several devices."""
        return self.slots > self.experts


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How good a plan is for the objective and the counts that it was made from.

    Args:
        objective: what was minimised, in words.
        value: the plan's objective; lower is better.
        bound: no plan of the same problem has a lower one. Valid, not necessarily tight.
        bound_method: where the bound comes from.
        status: `"optimal"` (proved), or `"feasible"`.
        method: how the plan was found.
        seconds: how long that took, the bound included.
        seed: of all random choices.
    """

    objective: str
    value: float
    bound: float
    bound_method: str
    status: str
    method: str
    seconds: float
    seed: int

    def __post_init__(self) -> None:
        if self.status not in ("optimal", "feasible"):
            raise PlanError(f"certificate: status must be optimal or feasible, not {self.status!r}")
        try:
            finite = all(map(math.isfinite, (self.value, self.bound, self.seconds)))
        except OverflowError:  # a whole number beyond every float
            finite = False
        if not finite:
            raise PlanError("certificate: value, bound and seconds must be finite numbers")

    @property
    def gap(self) -> float:
        """(value - bound) / value: 0 is proved optimal, 1 says nothing."""
        return max(0.0, (self.value - self.bound) / self.value) if self.value > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the gap included."""
        return {
            "objective": self.objective,
            "value": self.value,
            "bound": self.bound,
            "gap": self.gap,
            "bound_method": self.bound_method,
            "status": self.status,
            "method": self.method,
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A placement of all experts of a model.

    Args:
        topology: the devices.
        layers: the MoE layers in order of execution.
        model_id, fingerprint: of the model that the plan is for; "" if unknown.
        top_k: experts a token in each layer; 0 where unknown.
        certificate: what proves its worth; None for plans that nobody solved for.
        metrics: measured on tokens: `{"train": {...}, "held_out": {...}, "baselines": {...}}`.
        settings: the options that it was made with.
    """

    topology: Topology
    layers: tuple[LayerPlan, ...]
    model_id: str = ""
    fingerprint: str = ""
    top_k: tuple[int, ...] = ()
    certificate: Certificate | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", tuple(self.top_k) or (0,) * len(self.layers))
        if not self.layers:
            raise PlanError("a plan needs one MoE layer at least")
        if len(set(self.layer_ids)) != len(self.layers):
            raise PlanError(f"layers of a plan must be distinct, found {self.layer_ids}")
        if len(self.top_k) != len(self.layers):
            raise PlanError(
                f"top_k names {len(self.top_k)} layers, the plan has {len(self.layers)}"
            )
        if min(self.top_k) < 0:
            raise PlanError(f"top_k of a plan must be 0 (unknown) or more, found {self.top_k}")
        for layer in self.layers:
            highest = max(devices[-1] for devices in layer.hosts)
            if highest >= self.devices:
                raise PlanError(
                    f"layer {layer.layer} names device {highest}, but there are {self.devices}"
                )

    # -- what it is ------------------------------------------------------------------------------

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.topology.devices

    @cached_property
    def layer_ids(self) -> tuple[int, ...]:
        """Absolute index of each MoE layer, in order of execution."""
        return tuple(layer.layer for layer in self.layers)

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """Experts of each layer."""
        return tuple(layer.experts for layer in self.layers)

    @property
    def has_replicas(self) -> bool:
        """Whether some expert lives on several devices."""
        return any(layer.has_replicas for layer in self.layers)

    def matrix(self, position: int) -> BoolArray:
        """Bool `[E, G]` of the layer at `position`: whether the device holds the expert."""
        hosts = self.layers[position].hosts
        held = np.zeros((len(hosts), self.devices), dtype=np.bool_)
        for expert, devices in enumerate(hosts):
            held[expert, list(devices)] = True
        return held

    def matrices(self) -> list[BoolArray]:
        """`matrix` of every layer."""
        return [self.matrix(position) for position in range(len(self.layers))]

    def device_experts(self, position: int) -> list[list[int]]:
        """For each device the experts that it holds of the layer at `position`, ascending."""
        held = self.matrix(position)
        return [np.flatnonzero(held[:, device]).tolist() for device in range(self.devices)]

    def physical_to_logical(self, position: int) -> list[int]:
        """Expert in each physical slot, devices in order, slots dealt out evenly.

        Raises:
            PlanError: devices hold different numbers of experts of this layer.
        """
        groups = self.device_experts(position)
        counts = [len(group) for group in groups]
        if len(set(counts)) != 1:
            raise PlanError(
                f"layer {self.layers[position].layer}: devices hold {counts} experts; engines with "
                "physical slots need the same number on each (plan with equal counts)"
            )
        return [expert for group in groups for expert in group]

    def permutation(self, position: int) -> IntArray:
        """int64 `[E]`: the expert that stands at each place once contiguous blocks are the plan.

        Raises:
            PlanError: the layer has replicas, or devices hold different numbers of experts.
        """
        layer = self.layers[position]
        if layer.has_replicas:
            raise PlanError(
                f"layer {layer.layer} has replicas; only a plan without them is a permutation "
                "(plan with --redundant 0)"
            )
        return np.asarray(self.physical_to_logical(position), dtype=np.int64)

    def residents(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert in the tier `"device"`."""
        return [
            (layer.layer, expert)
            for layer in self.layers
            for expert, tier in enumerate(layer.tiers)
            if tier == TIERS[0]
        ]

    def require_model(
        self,
        *,
        layer_ids: Sequence[int],
        experts: Sequence[int],
        fingerprint: str = "",
        name: str = "the model",
    ) -> None:
        """PlanError unless the plan is for a model of these layers, experts and fingerprint."""
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise PlanError(
                f"the plan is for {self.model_id or 'a model'} with fingerprint "
                f"{self.fingerprint}, {name} has {fingerprint}; make a plan from its own trace"
            )
        if tuple(layer_ids) != self.layer_ids:
            missing = sorted(set(layer_ids) - set(self.layer_ids))
            extra = sorted(set(self.layer_ids) - set(layer_ids))
            what = f"lacks layer {missing[0]}" if missing else ""
            what = what or (
                f"has layer {extra[0]} too many" if extra else "orders layers otherwise"
            )
            raise PlanError(
                f"the plan {what}: it has MoE layers {list(self.layer_ids)}, {name} has "
                f"{list(layer_ids)}"
            )
        for layer, mine, theirs in zip(self.layer_ids, self.experts, experts, strict=True):
            if mine != theirs:
                raise PlanError(
                    f"layer {layer}: the plan places {mine} experts, {name} has {theirs}"
                )

    # -- files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the form of a plan file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": {"id": self.model_id, "fingerprint": self.fingerprint},
            "topology": self.topology.to_dict(),
            "layers": [
                {
                    "layer": layer.layer,
                    "top_k": k,
                    "devices": [list(devices) for devices in layer.hosts],
                    "tiers": list(layer.tiers),
                }
                for layer, k in zip(self.layers, self.top_k, strict=True)
            ],
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "metrics": dict(self.metrics),
            "settings": dict(self.settings),
        }

    def save(self, path: PathLike) -> Path:
        """Write a plan file (`*.plan.json` by custom), whole or not at all."""
        return write_text(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: no such file, no plan, another version, or damaged; names file and field.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not a JSON file ({error}); make the plan again") from error
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """A plan from the plain data of a plan file."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"field 'format' is {found!r}, not {FORMAT!r}; this is no plan")
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise PlanError(
                f"field 'version' is {data.get('version')!r}, this release reads {VERSION}; "
                "make the plan again"
            )
        rows = _field(data, "layers", list)
        certificate = data.get("certificate")
        model = _field(data, "model", dict)
        return cls(
            topology=Topology.from_dict(_field(data, "topology", dict)),
            layers=tuple(_layer(row) for row in rows),
            model_id=_field(model, "id", str),
            fingerprint=_field(model, "fingerprint", str),
            top_k=tuple(_field(row, "top_k", int) for row in rows),
            certificate=None if certificate is None else _certificate(certificate),
            metrics=_field(data, "metrics", dict),
            settings=_field(data, "settings", dict),
        )


def _field(data: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a mapping, of the right kind (a bool is no number)."""
    value = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(f"field {name!r} is missing or damaged: {value!r:.80}; make the plan again")
    return value


def _layer(row: Any) -> LayerPlan:
    hosts = _field(row, "devices", list)
    for expert, devices in enumerate(hosts):
        if not isinstance(devices, list) or any(type(device) is not int for device in devices):
            raise PlanError(
                f"layer {row.get('layer')!r} expert {expert}: devices must be a list of whole "
                f"numbers, found {devices!r:.80}"
            )
    tiers = _field(row, "tiers", list)
    if any(not isinstance(tier, str) for tier in tiers):
        raise PlanError(f"layer {row.get('layer')!r}: tiers must be texts")
    return LayerPlan(
        layer=_field(row, "layer", int),
        hosts=tuple(tuple(devices) for devices in hosts),
        tiers=tuple(tiers),
    )


def _certificate(data: Any) -> Certificate:
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("objective", "bound_method", "status", "method"), (str,)),
        **dict.fromkeys(("value", "bound", "seconds"), (int, float)),
        "seed": (int,),
    }
    return Certificate(**{name: _field(data, name, kind) for name, kind in kinds.items()})
