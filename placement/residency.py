"""Static residency: which memory tier each expert of a placed model should live in.

Counts and bytes in, tiers out; a prediction with them. Does not know the runtime, nor how the
placement was found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from moe_runtime.placement.packing import BoolArray, Floor, Packing, pack
from moe_runtime.placement.plan import TIERS, Certificate, Plan

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace

__all__ = ["TierAssignment", "apply_tiers", "assign_tiers", "count_uses", "shrink_counts"]

DEVICE, HOST, DISK = TIERS


@dataclass(frozen=True, kw_only=True)
class TierAssignment:
    """A tier for every expert of every layer.

    Args:
        tiers: `"device"`, `"host"` or `"disk"` for each expert of each layer.
        certificate: of the device tier; what is minimised is the share of uses that it does not
            serve.
    """

    tiers: tuple[tuple[str, ...], ...]
    certificate: Certificate


def count_uses(trace: RoutingTrace) -> list[FloatArray]:
    """Uses of each expert, float64 `[E]` for each layer, as the runtime counts them.

    One use is one forward call in which a token was routed to the expert, however many were: a
    long prompt counts once, like one decoded token.
    """
    uses = [np.zeros(count) for count in trace.experts]
    for access in trace.accesses():
        uses[access.position][access.experts] += 1.0
    return uses


def shrink_counts(counts: Sequence[FloatArray], weight: float) -> list[FloatArray]:
    """Counts moved towards the mean of their layer; each layer's sum stays.

    Args:
        counts: float64 `[E]` for each layer.
        weight: of the mean, 0 (the counts as they are) to 1 (all experts of a layer alike). With
            few tokens, what was not seen is not what will not come.

    Raises:
        PlanError: a weight outside 0 to 1.
    """
    if not 0.0 <= weight <= 1.0:
        raise PlanError(f"counts are shrunk by a weight of 0 to 1, found {weight}")
    return [(1.0 - weight) * uses + weight * uses.mean() for uses in counts]


def assign_tiers(
    counts: Sequence[FloatArray],
    expert_bytes: Sequence[int],
    held: Sequence[BoolArray],
    memory: Sequence[int],
    *,
    host_bytes: int | None = 0,
    floor: int = 0,
    time_limit: float = 10.0,
) -> TierAssignment:
    """Give each expert a tier, so that the device tier serves the most uses, then the host tier.

    Every device fills its own memory with the experts that it holds. Exact by sorting where all
    experts of a device have the same bytes and none has replicas, else an integer program.

    Args:
        counts: uses of each expert, float64 `[E]` for each layer; what matters is their ratio.
        expert_bytes: bytes of one expert of each layer.
        held: bool `[E, G]` for each layer, which devices hold the expert.
        memory: bytes for residents on each device, `[G]`; 0 where there is no limit.
        host_bytes: bytes of host memory for experts in all; None for no limit.
        floor: residents that each device keeps at least of each layer (all that it holds of the
            layer, if these are fewer).
        time_limit: seconds for integer programs.

    Raises:
        PlanError: counts, bytes or memories that make no sense, or a floor that does not fit; says
            by how many bytes.
    """
    began = time.perf_counter()
    uses, nbytes, devices = _checked(counts, expert_bytes, held, memory)
    capacity = np.array([float(limit) if limit else math.inf for limit in memory])
    _require_floor(expert_bytes, held, capacity, floor)
    packing = Packing(
        uses=uses,
        nbytes=nbytes,
        held=devices,
        capacity=capacity,
        floors=_floors(held, floor),
    )
    first = pack(packing, time_limit=time_limit)
    rest = np.flatnonzero(~first.chosen)
    tiers = np.full(len(uses), DISK, dtype=object)
    tiers[first.chosen] = DEVICE
    if len(rest):
        room = math.inf if host_bytes is None else float(host_bytes)
        second = Packing(
            uses=uses[rest],
            nbytes=nbytes[rest],
            held=np.ones((len(rest), 1), np.bool_),
            capacity=np.array([room]),
        )
        tiers[rest[pack(second, time_limit=time_limit).chosen]] = HOST
    total = float(uses.sum()) or 1.0
    served = min(1.0, packing.value(first.chosen) / total)
    return TierAssignment(
        tiers=tuple(
            tuple(part.tolist())
            for part in np.split(tiers, np.cumsum([len(matrix) for matrix in held])[:-1])
        ),
        certificate=Certificate(
            objective="share of the uses that the device tier does not serve",
            value=1.0 - served,
            bound=max(0.0, min(1.0 - served, 1.0 - first.bound / total)),
            bound_method="exact" if first.proved else "linear relaxation",
            status="optimal" if first.proved else "feasible",
            method=first.method,
            seconds=time.perf_counter() - began,
            seed=0,
        ),
    )


def apply_tiers(
    plan: Plan,
    counts: Sequence[FloatArray],
    expert_bytes: Sequence[int],
    *,
    memory: Sequence[int] | None = None,
    host_bytes: int | None = 0,
    reserve: int | None = None,
    floor: int = 0,
    shrink: float = 0.0,
    time_limit: float = 10.0,
) -> Plan:
    """The same placement with a tier for every expert, and what the tiers should serve.

    `metrics["residency"]` of the result holds the prediction; `docs/formats.md` lists it.

    Args:
        counts: uses of each expert, float64 `[E]` for each layer (`count_uses` of a trace).
        expert_bytes: bytes of one expert of each layer.
        memory: bytes for experts on each device, `[G]`; 0 for no limit. The topology's if None.
        host_bytes: bytes of host memory for experts; None for no limit, 0 for none.
        reserve: bytes of each device's memory that are left to experts which come and go. None
            for what a runtime needs: room for a token's experts of any one layer.
        floor, time_limit: see `assign_tiers`.
        shrink: see `shrink_counts`.

    Raises:
        PlanError: as `assign_tiers`; or a device's memory does not hold a token's experts of one
            layer, or not the reserve: says by how many bytes.
    """
    limits = tuple(plan.topology.memory if memory is None else memory)
    held = plan.matrices()
    _checked(counts, expert_bytes, held, limits)
    expected = shrink_counts(counts, shrink)
    pinnable = [
        _pinnable(plan, expert_bytes, device, limit, reserve) for device, limit in enumerate(limits)
    ]
    found = assign_tiers(
        expected,
        expert_bytes,
        held,
        pinnable,
        host_bytes=host_bytes,
        floor=floor,
        time_limit=time_limit,
    )
    layers = tuple(
        replace(layer, tiers=tiers) for layer, tiers in zip(plan.layers, found.tiers, strict=True)
    )
    tiered = replace(plan, layers=layers, topology=replace(plan.topology, memory=limits))
    options = {"floor": floor, "shrink": shrink, "reserve": reserve, "host_bytes": host_bytes}
    return replace(
        tiered,
        metrics={**plan.metrics, "residency": _prediction(tiered, expected, expert_bytes, found)},
        settings={**plan.settings, "residency": options},
    )


# -- the prediction ------------------------------------------------------------------------------


def _prediction(
    plan: Plan, counts: Sequence[FloatArray], expert_bytes: Sequence[int], found: TierAssignment
) -> dict[str, Any]:
    """What the tiers should serve, for the plan file."""
    on = {tier: [np.array(row.tiers) == tier for row in plan.layers] for tier in (DEVICE, HOST)}
    held = [matrix & on[DEVICE][at][:, None] for at, matrix in enumerate(plan.matrices())]
    return {
        "predicted_share": _share(counts, on[DEVICE]),
        "predicted_host_share": _share(counts, on[HOST]),
        "pinned": int(sum(flags.sum() for flags in on[DEVICE])),
        "layers": [
            {
                "layer": row.layer,
                "pinned": int(flags.sum()),
                "predicted_share": _share([uses], [flags]),
            }
            for row, uses, flags in zip(plan.layers, counts, on[DEVICE], strict=True)
        ],
        "devices": [
            {
                "device": device,
                "memory": limit,
                "pinned": int(sum(matrix[:, device].sum() for matrix in held)),
                "pinned_bytes": int(
                    sum(
                        matrix[:, device].sum() * size
                        for matrix, size in zip(held, expert_bytes, strict=True)
                    )
                ),
            }
            for device, limit in enumerate(plan.topology.memory)
        ],
        "certificate": found.certificate.to_dict(),
    }


def _share(counts: Sequence[FloatArray], flags: Sequence[BoolArray]) -> float | None:
    """Share of the uses that the flagged experts serve; None where nothing was used."""
    total = sum(float(uses.sum()) for uses in counts)
    served = sum(float(uses[chosen].sum()) for uses, chosen in zip(counts, flags, strict=True))
    return round(served / total, 6) if total else None


# -- checks --------------------------------------------------------------------------------------


def _checked(
    counts: Sequence[FloatArray],
    expert_bytes: Sequence[int],
    held: Sequence[BoolArray],
    memory: Sequence[int],
) -> tuple[FloatArray, IntArray, BoolArray]:
    """Uses, bytes and devices of all experts, layer after layer."""
    for name, given in (("counts", counts), ("expert_bytes", expert_bytes)):
        if len(given) != len(held):
            raise PlanError(f"{name} name {len(given)} layers, the plan has {len(held)}")
    for at, (uses, size, matrix) in enumerate(zip(counts, expert_bytes, held, strict=True)):
        if np.shape(uses) != (len(matrix),):
            raise PlanError(
                f"counts of MoE layer {at} have shape {np.shape(uses)}, the plan places "
                f"{len(matrix)} experts there"
            )
        wrong = np.flatnonzero(~np.isfinite(uses) | (np.asarray(uses) < 0))
        if len(wrong):
            raise PlanError(
                f"counts of MoE layer {at}: expert {wrong[0]} has {uses[wrong[0]]}; counts are "
                "finite and not negative"
            )
        if size < 1:
            raise PlanError(f"an expert of MoE layer {at} has {size} bytes; give its real size")
        if matrix.shape[1] != len(memory):
            raise PlanError(
                f"memory names {len(memory)} devices, the plan has {matrix.shape[1]}; give one "
                "number for each"
            )
    if any(limit < 0 for limit in memory):
        raise PlanError(f"memory cannot be negative, found {list(memory)}")
    nbytes = np.concatenate(
        [np.full(len(m), size, np.int64) for m, size in zip(held, expert_bytes, strict=True)]
    )
    return np.concatenate(counts).astype(np.float64), nbytes, np.concatenate(held)


def _floors(held: Sequence[BoolArray], floor: int) -> tuple[Floor, ...]:
    """What each device has to keep of each layer."""
    if floor < 0:
        raise PlanError(f"a floor of residents cannot be negative, found {floor}")
    found, offset = [], 0
    for matrix in held:
        for device in range(matrix.shape[1]):
            members = offset + np.flatnonzero(matrix[:, device])
            if floor and len(members):
                found.append(Floor(members=members, least=min(floor, len(members))))
        offset += len(matrix)
    return tuple(found)


def _require_floor(
    expert_bytes: Sequence[int], held: Sequence[BoolArray], capacity: FloatArray, floor: int
) -> None:
    for device, room in enumerate(capacity.tolist()):
        need = sum(
            min(floor, int(matrix[:, device].sum())) * size
            for matrix, size in zip(held, expert_bytes, strict=True)
        )
        if need > room:
            raise PlanError(
                f"device {device}: {floor} residents of every layer take {need} bytes, "
                f"{int(need - room)} more than there are for residents; lower the floor or give "
                "more memory"
            )


def _pinnable(
    plan: Plan, expert_bytes: Sequence[int], device: int, limit: int, reserve: int | None
) -> int:
    """Bytes of one device for experts that stay; 0 for no limit."""
    if not limit:
        return 0
    sizes = [int(matrix[:, device].sum()) for matrix in plan.matrices()]
    whole = sum(count * size for count, size in zip(sizes, expert_bytes, strict=True))
    if whole <= limit:
        return 0
    steps = [
        (min(k or 1, count) * size, layer, min(k or 1, count))
        for k, count, size, layer in zip(
            plan.top_k, sizes, expert_bytes, plan.layer_ids, strict=True
        )
    ]
    step, layer, active = max(steps)
    if step > limit:
        raise PlanError(
            f"device {device}: {limit} bytes do not hold the {active} experts that a token needs "
            f"of layer {layer} at once ({step} bytes): {step - limit} bytes are missing"
        )
    kept = step if reserve is None else reserve
    if not 0 <= kept <= limit:
        raise PlanError(
            f"device {device}: a reserve of {kept} bytes cannot be kept free of {limit} bytes; "
            f"give 0 to {limit}"
        )
    # 0 would mean no limit; a byte holds no expert either.
    return max(limit - kept, 1)
