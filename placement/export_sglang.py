"""SGLang: `--init-expert-location` as `physical_to_logical_map` or as `logical_count`.

Rules of SGLang 0.5.23. Does not know how a plan was made.
"""

from __future__ import annotations

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
    write_data,
)
from moe_runtime.placement.plan import Plan

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = [
    "COUNTS",
    "MAP",
    "VERSION",
    "counts_for",
    "read_counts",
    "read_map",
    "validate_counts",
    "validate_map",
    "write_counts",
]

VERSION = "0.5.23"
_MAP, _COUNT = "physical_to_logical_map", "logical_count"


# -- the map ---------------------------------------------------------------------------------------


def _write_map(plan: Plan, path: Path, extras: Extras) -> None:
    target = Target.of(plan, extras, whole_model=True)
    rows = slot_rows(plan)
    # Dense layers have a row too; the engine never looks at it, but it must be a valid one.
    table = np.tile(np.arange(len(rows[0])) % target.experts, (target.hidden_layers, 1))
    table[list(plan.layer_ids)] = rows
    write_data(path, {_MAP: table})


def read_map(path: Path, target: Target) -> Hosts:
    """Devices of each expert of each MoE layer, as the engine takes them from the file.

    Raises:
        PlanError: the engine would refuse the file.
    """
    data = read_data(path)
    if not isinstance(data, dict) or _MAP not in data:
        raise PlanError(f"must be an object with the key {_MAP!r}, found {_keys(data)}")
    extra = sorted(str(key) for key in data if key != _MAP)
    if extra:
        raise PlanError(f"key {extra[0]!r} is one too many: the engine takes {_MAP!r} alone")
    table = whole_rows(data[_MAP], _MAP, (target.hidden_layers, None))
    # The engine asks the same of the rows of dense layers as of all others.
    hosts = {
        layer: hosts_of_slots(row.tolist(), target, f"{_MAP}, layer {layer}")
        for layer, row in enumerate(table)
    }
    return {layer: hosts[layer] for layer in target.layer_ids}


def validate_map(path: Path, target: Target) -> None:
    """PlanError unless SGLang accepts the file for this model and number of devices."""
    read_map(path, target)


def _check_map(plan: Plan, path: Path, extras: Extras) -> None:
    compare(read_map(path, Target.of(plan, extras, whole_model=True)), plan)


def _advise_map(plan: Plan, path: Path) -> Advice:
    redundant = plan.layers[0].slots - plan.layers[0].experts
    return Advice(
        flags=(
            (
                f"--ep-size {plan.devices} --ep-num-redundant-experts {redundant} "
                f"--init-expert-location {shlex.quote(str(path))}"
            ),
        ),
        notes=(
            (
                "with --moe-a2a-backend none, --ep-dispatch-algorithm must be dynamic; "
                "0.5.6 was seen to ignore placements silently on its plain forward path, so look "
                "for it in the server's log"
            ),
            *tier_note(plan),
        ),
    )


MAP = Exporter(
    name="sglang",
    engine="SGLang",
    version=VERSION,
    suffixes=(".json", ".pt"),
    write=_write_map,
    check=_check_map,
    advise=_advise_map,
)


# -- counts ----------------------------------------------------------------------------------------


def counts_for(plan: Plan, source: Path) -> IntArray:
    """int64 `[L, E]`: tokens of each expert in the plan's layers.

    Args:
        source: a routing trace, or a file with a `logical_count` over all hidden layers (`.pt` as
            SGLang's recorder writes it, or `.json`).

    Raises:
        PlanError, TraceError: the file is damaged or of another model.
    """
    if source.suffix not in (".pt", ".json"):
        trace = RoutingTrace.load(source)
        plan.require_model(
            layer_ids=trace.layer_ids,
            experts=trace.experts,
            fingerprint=trace.fingerprint,
            name=str(source),
        )
        chosen = np.moveaxis(trace.topk_ids, 1, 0)
        return np.stack(
            [np.bincount(layer[layer != UNUSED], minlength=max(plan.experts)) for layer in chosen]
        ).astype(np.int64)
    try:
        counts = _counts_in(source)
        if counts.shape[0] <= max(plan.layer_ids) or counts.shape[1] != max(plan.experts):
            raise PlanError(
                f"{_COUNT} has {counts.shape[0]} layers of {counts.shape[1]} experts, the plan "
                f"names layer {max(plan.layer_ids)} and {max(plan.experts)} experts"
            )
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from error
    return counts[list(plan.layer_ids)]


def write_counts(path: Path, counts: IntArray, target: Target, *, steps: bool) -> None:
    """Write `logical_count`: int64 over all hidden layers, dense rows zero.

    Args:
        counts: `[L, E]` of the MoE layers.
        steps: give it the leading dimension of the recorder's steps, of length 1.
    """
    table = np.zeros((target.hidden_layers, target.experts), dtype=np.int64)
    table[list(target.layer_ids)] = counts
    write_data(path, {_COUNT: table[None] if steps else table})


def read_counts(path: Path, target: Target) -> IntArray:
    """int64 `[L, E]` of the MoE layers, summed over steps as the engine does.

    Raises:
        PlanError: the engine would refuse the file.
    """
    counts = _counts_in(path)
    wanted = (target.hidden_layers, target.experts)
    if counts.shape != wanted:
        raise PlanError(
            f"{_COUNT}: must have {wanted[0]} hidden layers of {wanted[1]} experts, found "
            f"{counts.shape[0]} of {counts.shape[1]}"
        )
    return counts[list(target.layer_ids)]


def validate_counts(path: Path, target: Target) -> None:
    """PlanError unless SGLang accepts the counts for this model."""
    read_counts(path, target)


def _counts_in(path: Path) -> IntArray:
    """int64 `[hidden layers, E]`; further keys are ignored, as by the engine."""
    data = read_data(path)
    if not isinstance(data, dict) or _COUNT not in data:
        raise PlanError(f"must be an object with the key {_COUNT!r}, found {_keys(data)}")
    value = data[_COUNT]
    deep = np.ndim(value) == 3 if isinstance(value, np.ndarray) else _depth(value) == 3
    counts = whole_rows(value, _COUNT, (None,) * (3 if deep else 2))
    if counts.size and (counts.min() < 0 or counts.max() > 2**53):
        raise PlanError(f"{_COUNT}: counts must be 0 to 2^53, found {counts.min()}..{counts.max()}")
    return counts.sum(axis=0) if deep else counts


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and depth < 4:
        depth, value = depth + 1, value[0] if value else None
    return depth


def _write_counts(plan: Plan, path: Path, extras: Extras) -> None:
    write_counts(path, _given(extras), Target.of(plan, extras, whole_model=True), steps=False)


def _check_counts(plan: Plan, path: Path, extras: Extras) -> None:
    found = read_counts(path, Target.of(plan, extras, whole_model=True))
    if extras.counts is None:
        return
    different = np.argwhere(found != extras.counts)
    if len(different):
        at, expert = (int(i) for i in different[0])
        raise PlanError(
            f"layer {plan.layer_ids[at]} expert {expert}: the file counts {found[at, expert]}, "
            f"--counts has {extras.counts[at, expert]}"
        )


def _given(extras: Extras) -> IntArray:
    if extras.counts is None:
        raise PlanError("counts are not in a plan: give --counts with a trace or a count file")
    return extras.counts


def _advise_counts(plan: Plan, path: Path) -> Advice:
    redundant = plan.layers[0].slots - plan.layers[0].experts
    return Advice(
        flags=(
            (
                f"--ep-size {plan.devices} --ep-num-redundant-experts {redundant} "
                f"--init-expert-location {shlex.quote(str(path))}"
            ),
        ),
        notes=(
            (
                "the plan is NOT carried: SGLang balances these counts itself (EPLB) at the start; "
                "use --to sglang to hand over the plan"
            ),
        ),
    )


COUNTS = Exporter(
    name="counts",
    engine="SGLang",
    version=VERSION,
    suffixes=(".pt", ".json"),
    write=_write_counts,
    check=_check_counts,
    advise=_advise_counts,
)


def _keys(data: Any) -> str:
    if isinstance(data, dict):
        return f"the keys {sorted(map(str, data))!s:.100}"
    return f"a {type(data).__name__}"
