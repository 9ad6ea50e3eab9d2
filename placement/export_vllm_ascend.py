"""vllm-ascend: the expert map that `eplb_config.expert_map_path` names.

Rules of vllm-ascend before v0.25.1. Does not know how a plan was made.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from moe_runtime.placement.export_base import (
    Advice,
    Exporter,
    Extras,
    Hosts,
    Target,
    compare,
    hosts_of_slots,
    read_data,
    slot_rows,
    tier_note,
    whole_rows,
)
from moe_runtime.placement.plan import Plan

from moe_runtime.errors import PlanError
from moe_runtime.files import write_text

__all__ = ["VERSION", "VLLM_ASCEND", "read_vllm_ascend", "validate_vllm_ascend"]

VERSION = "before 0.25.1"


def _write(plan: Plan, path: Path, extras: Extras) -> None:
    Target.of(plan, extras)
    layers = [
        {
            # Not the absolute index: the engine counts MoE layers and looks at list positions.
            "layer_id": ordinal,
            "device_count": plan.devices,
            "device_list": [
                {"device_id": device, "device_expert": row}
                for device, row in enumerate(np.reshape(slots, (plan.devices, -1)).tolist())
            ],
        }
        for ordinal, slots in enumerate(slot_rows(plan))
    ]
    data = {"moe_layer_count": len(layers), "layer_list": layers}
    write_text(path, json.dumps(data) + "\n")


def read_vllm_ascend(path: Path, target: Target) -> Hosts:
    """Devices of each expert of each MoE layer, as the engine takes them from the file.

    Raises:
        PlanError: the engine would refuse the file, or compute wrong maps from it.
    """
    data = read_data(path)
    if not isinstance(data, dict):
        raise PlanError(f"must be an object with layer_list, found a {type(data).__name__}")
    layers = data.get("layer_list")
    if not isinstance(layers, list):
        raise PlanError("layer_list must be a list of layers")
    if data.get("moe_layer_count") != len(layers) or len(layers) != len(target.layer_ids):
        raise PlanError(
            f"moe_layer_count is {data.get('moe_layer_count')!r:.30} and layer_list has "
            f"{len(layers)} layers; the model has {len(target.layer_ids)} MoE layers"
        )
    hosts, slots = {}, 0
    for ordinal, (absolute, layer) in enumerate(zip(target.layer_ids, layers, strict=True)):
        where = f"layer_list[{ordinal}]"
        row = _slots(layer, ordinal, target, where)
        if ordinal and len(row) != slots:
            raise PlanError(f"{where}: {len(row)} slots, but layer_list[0] has {slots}")
        slots = len(row)
        hosts[absolute] = hosts_of_slots(row, target, where)
    return hosts


def _slots(layer: Any, ordinal: int, target: Target, where: str) -> list[int]:
    """Experts of a layer's slots, devices in order."""
    if not isinstance(layer, dict) or not isinstance(layer.get("device_list"), list):
        raise PlanError(f"{where}: must be an object with a device_list")
    devices = layer["device_list"]
    _number(layer, "layer_id", ordinal, f"{where} (the engine goes by the place in the list)")
    _number(layer, "device_count", target.devices, where)
    if len(devices) != target.devices:
        raise PlanError(f"{where}: {len(devices)} devices listed, there are {target.devices}")
    rows = []
    for number, device in enumerate(devices):
        here = f"{where}, device_list[{number}]"
        if not isinstance(device, dict) or not isinstance(device.get("device_expert"), list):
            raise PlanError(f"{here}: must be an object with a list device_expert")
        _number(device, "device_id", number, here)
        row = whole_rows(device["device_expert"], f"{here}.device_expert", (None,)).tolist()
        if len(set(row)) != len(row):
            raise PlanError(
                f"{here}: an expert is there twice ({row!s:.60}); the engine's map would keep only "
                "the last"
            )
        rows.append(row)
    lengths = [len(row) for row in rows]
    if len(set(lengths)) != 1:
        raise PlanError(f"{where}: devices hold {lengths!s:.80} experts; all must hold as many")
    return [expert for row in rows for expert in row]


def _number(data: dict[str, Any], name: str, wanted: int, where: str) -> None:
    if type(data.get(name)) is not int or data[name] != wanted:
        raise PlanError(f"{where}: {name} must be {wanted}, found {data.get(name)!r:.30}")


def validate_vllm_ascend(path: Path, target: Target) -> None:
    """PlanError unless vllm-ascend reads the file rightly for this model and these devices."""
    read_vllm_ascend(path, target)


def _check(plan: Plan, path: Path, extras: Extras) -> None:
    compare(read_vllm_ascend(path, Target.of(plan, extras)), plan)


def _advise(plan: Plan, path: Path) -> Advice:
    config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
    redundant = plan.layers[0].slots - plan.layers[0].experts
    return Advice(
        flags=(f"--enable-expert-parallel --additional-config {shlex.quote(config)}",),
        notes=(
            (
                "the ranks of expert parallelism (tensor times data parallel) must be "
                f"{plan.devices}; the engine reads {redundant} redundant experts off the file"
            ),
            (
                "layers are counted as MoE layers here, from 0; the engine looks for an MTP layer "
                "past the last of them, which a plan does not have"
            ),
            (
                "maps from a file are announced for removal in v0.25.1, and model runner v2 "
                "rejects them; then use `moe-runtime bake`"
            ),
            *tier_note(plan),
        ),
    )


VLLM_ASCEND = Exporter(
    name="vllm-ascend",
    engine="vllm-ascend",
    version=VERSION,
    suffixes=(".json",),
    write=_write,
    check=_check,
    advise=_advise,
)
