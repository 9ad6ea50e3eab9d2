"""TensorRT-LLM: the YAML that `moe_config.load_balancer` names.

Rules of TensorRT-LLM's `MoeLoadBalancerConfig` as of November 2026. Does not know how a plan was
made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from moe_runtime.placement.export_base import (
    Advice,
    Exporter,
    Extras,
    Hosts,
    Target,
    compare,
    hosts_of_slots,
    slot_rows,
    tier_note,
    whole_rows,
)
from moe_runtime.placement.plan import Plan

from moe_runtime.errors import PlanError
from moe_runtime.files import write_text

__all__ = ["TRTLLM", "VERSION", "read_trtllm", "validate_trtllm"]

VERSION = "November 2026"
_SLOTS, _ASSIGNED, _UPDATES = "num_slots", "initial_global_assignments", "layer_updates_per_iter"


def _write(plan: Plan, path: Path, extras: Extras) -> None:
    Target.of(plan, extras)
    rows = slot_rows(plan)
    data = {
        _SLOTS: len(rows[0]),
        _ASSIGNED: dict(zip(plan.layer_ids, rows, strict=True)),
        _UPDATES: 0,  # a static placement
    }
    text: str = yaml.safe_dump(data, default_flow_style=None, sort_keys=False, width=1_000_000)
    write_text(path, text)


def read_trtllm(path: Path, target: Target) -> Hosts:
    """Devices of each expert of each MoE layer, as the engine takes them from the file.

    Raises:
        PlanError: the engine would refuse the file, or miss a layer in it while it runs.
    """
    data = _mapping(path)
    unknown = sorted(str(key) for key in data if key not in (_SLOTS, _ASSIGNED, _UPDATES))
    if unknown:
        raise PlanError(f"field {unknown[0]!r} is one too many: the engine forbids unknown fields")
    slots, updates, layers = data.get(_SLOTS), data.get(_UPDATES, 0), data.get(_ASSIGNED)
    if type(slots) is not int or slots < target.experts or slots % target.devices:
        raise PlanError(
            f"{_SLOTS} must be a multiple of {target.devices} devices and {target.experts} at "
            f"least, found {slots!r:.60}"
        )
    if type(updates) is not int or updates != 0:
        raise PlanError(f"{_UPDATES} must be 0 for a static placement, found {updates!r:.60}")
    if not isinstance(layers, dict) or any(type(layer) is not int for layer in layers):
        raise PlanError(f"{_ASSIGNED} must map absolute layer indices to lists")
    missing = [layer for layer in target.layer_ids if layer not in layers]
    if missing:
        raise PlanError(f"{_ASSIGNED}: layer {missing[0]} is missing; the engine fails without it")
    unused = sorted(set(layers) - set(target.layer_ids))
    if unused:
        raise PlanError(
            f"{_ASSIGNED}: layer {unused[0]} is no MoE layer of the model; keys are absolute layer "
            "indices"
        )
    hosts = {}
    for layer in target.layer_ids:
        where = f"{_ASSIGNED}, layer {layer}"
        row = layers[layer]
        if not isinstance(row, list):
            raise PlanError(f"{where}: must be a list, found {row!r:.60}")
        hosts[layer] = hosts_of_slots(whole_rows(row, where, (slots,)).tolist(), target, where)
    return hosts


def validate_trtllm(path: Path, target: Target) -> None:
    """PlanError unless TensorRT-LLM accepts the file for this model and number of devices."""
    read_trtllm(path, target)


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror}); check the path") from error
    # Values like impossible dates fail in the parser with other errors than its own.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise PlanError(f"not a YAML file ({str(error)[:200]})") from error
    if not isinstance(data, dict):
        raise PlanError(f"must be a mapping with {_SLOTS} and {_ASSIGNED}, found {data!r:.60}")
    return data


def _check(plan: Plan, path: Path, extras: Extras) -> None:
    compare(read_trtllm(path, Target.of(plan, extras)), plan)


def _advise(plan: Plan, path: Path) -> Advice:
    return Advice(
        flags=(
            f"moe_expert_parallel_size: {plan.devices}",
            "enable_attention_dp: true",
            f"moe_config: {{load_balancer: {path}}}",
        ),
        notes=(
            (
                "the file is silently ignored with expert parallelism 1, without attention data "
                "parallelism, and for architectures that the engine has not listed"
            ),
            (
                "a model with MTP layers fails with a KeyError unless the file names those too; "
                f"this one names layers {plan.layer_ids[0]} to {plan.layer_ids[-1]}"
            ),
            *tier_note(plan),
        ),
    )


TRTLLM = Exporter(
    name="trtllm",
    engine="TensorRT-LLM",
    version=VERSION,
    suffixes=(".yaml", ".yml"),
    write=_write,
    check=_check,
    advise=_advise,
)
