"""A plan file's facts for people: measures beside its rivals', findings, warnings.

Does not know how they were measured, nor how they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.placement.plan import Certificate, Plan
from moe_runtime.report.summary import NONE, count, duration, percent, size

__all__ = [
    "MEASURES",
    "best_known",
    "certificate_line",
    "certificate_of",
    "comparison",
    "devices_line",
    "headline",
    "interval_of",
    "layer_rows",
    "pair",
    "residency_line",
    "section",
    "support_line",
    "value_of",
    "warnings_of",
]

# The measures that are compared, and what they are called. All are better when lower.
MEASURES = {
    "crossing": "crossing",
    "distinct_devices": "devices a token",
    "load": "load",
    "hop_cost": "hop cost",
}
_TRAIN, _HELD_OUT = "train", "held_out"
# Of what the plan gains over contiguous placement on its own tokens, at least this much should be
# left on others.
_LEAST_KEPT, _WORTH_MENTIONING = 0.5, 0.01


def section(data: Any, name: str) -> Mapping[str, Any]:
    """A part of a plan's metrics or settings; empty if it is missing or is something else."""
    value = data.get(name) if isinstance(data, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def value_of(measured: Any, field: str) -> float | None:
    """A finite number of one section of measures; None if it is not there."""
    value = measured.get(field) if isinstance(measured, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def comparison(plan: Plan) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, {"train": ..., "held_out": ...}) of the plan and of each baseline."""
    mine = {name: section(plan.metrics, name) for name in (_TRAIN, _HELD_OUT)}
    rivals = section(plan.metrics, "baselines")
    return [("this plan", mine), *((str(name), section(rivals, name)) for name in rivals)]


def pair(measured: Any, field: str, *, held: bool) -> str:
    """`0.412     0.455`: train and held-out."""
    first = _three(value_of(section(measured, _TRAIN), field))
    return f"{first}  {_three(value_of(section(measured, _HELD_OUT), field)):>7}" if held else first


def best_known(plan: Plan) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """(which tokens, the plan's measures on them, contiguous placement's): held-out if possible."""
    rivals = section(section(plan.metrics, "baselines"), "contiguous")
    for name, words in ((_HELD_OUT, "held-out"), (_TRAIN, "training")):
        if section(plan.metrics, name):
            return words, section(plan.metrics, name), section(rivals, name)
    return "", {}, {}


def headline(plan: Plan) -> str:
    """The plan in one line."""
    which, mine, theirs = best_known(plan)
    residency = section(plan.metrics, "residency")
    if plan.devices == 1 and residency:
        share = percent(value_of(residency, "predicted_share"))
        return f"{count(value_of(residency, 'pinned'))} experts stay; they should serve {share}"
    ours, contiguous = value_of(mine, "crossing"), value_of(theirs, "crossing")
    if ours is not None and contiguous is not None:
        line = (
            f"{percent(ours)} of {which} expert pairs cross devices, "
            f"contiguous {percent(contiguous)}"
        )
        load = value_of(mine, "load")
        return line if load is None else f"{line}; highest load {load:.2f} times the mean"
    load, even = value_of(mine, "load"), value_of(theirs, "load")
    if load is not None and even is not None:
        return f"highest load {load:.2f} times the mean on {which} tokens, contiguous {even:.2f}"
    return f"{len(plan.layers)} MoE layers on {devices_line(plan)}, not measured"


def certificate_line(plan: Plan) -> str:
    """What is proved of the plan, in words."""
    proof = certificate_of(plan)
    if proof is None:
        return "no certificate: nobody solved for this plan"
    how = f"{proof.method}, {duration(proof.seconds)}, seed {proof.seed}"
    if proof.status == "optimal":
        return f"proved optimal: {proof.value:.4f}, {proof.objective} ({proof.bound_method}; {how})"
    gap = "less than 0.1 %" if proof.gap < 0.001 else f"at most {percent(proof.gap)}"
    return (
        f"{proof.value:.4f}, {proof.objective}; no plan is below {proof.bound:.4f} "
        f"({proof.bound_method}), so {gap} could be gained; not proved optimal "
        f"({how})"
    )


def certificate_of(plan: Plan) -> Certificate | None:
    """The plan's certificate; on one device, where only residents are chosen, that of its tiers."""
    inner = section(section(plan.metrics, "residency"), "certificate")
    if plan.devices > 1 or not inner:
        return plan.certificate
    try:
        return Certificate(**{name: value for name, value in inner.items() if name != "gap"})
    except (PlanError, TypeError):
        return plan.certificate


def interval_of(support: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of the affinity's excess, if two numbers stand there."""
    ends = support.get("interval")
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = (value_of({"end": end}, "end") for end in ends)
    return None if low is None or high is None else (low, high)


def support_line(plan: Plan) -> str | None:
    """How far the counts carry; None where tokens were not known."""
    support = section(plan.metrics, "support")
    excess = value_of(support, "excess")
    if excess is None:
        return None
    interval = interval_of(support)
    span = f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}; " if interval else ""
    return (
        f"{count(value_of(support, 'tokens'))} tokens in "
        f"{count(value_of(support, 'sequences'))} sequences, "
        f"{value_of(support, 'pairs_a_cell') or 0:.1f} expert pairs a cell; affinity "
        f"{excess:.3f} beyond popularity ({span}shuffled control "
        f"{value_of(support, 'excess_shuffled') or 0:.3f})"
    )


def residency_line(plan: Plan) -> str | None:
    """What the tiers keep and should serve; None where all experts are on devices."""
    residency = section(plan.metrics, "residency")
    if not residency:
        return None
    total = sum(plan.experts)
    memory = sum(plan.topology.memory)
    limit = f"{size(memory)} of " if memory else ""
    return (
        f"{count(value_of(residency, 'pinned'))} of {count(total)} experts stay in {limit}device "
        f"memory and should serve {percent(value_of(residency, 'predicted_share'))} of the uses; "
        f"host memory {percent(value_of(residency, 'predicted_host_share'))}"
    )


def warnings_of(plan: Plan) -> list[str]:
    """What a user should know before relying on the plan."""
    if plan.devices == 1:
        return []  # nothing crosses, and all load is the one device's
    found = []
    rival = section(section(plan.metrics, "baselines"), "contiguous")
    gains = []
    for name in (_TRAIN, _HELD_OUT):
        ours = value_of(section(plan.metrics, name), "crossing")
        theirs = value_of(section(rival, name), "crossing")
        gains.append(None if ours is None or theirs is None else theirs - ours)
    train, held_out = gains
    if (
        train is not None
        and held_out is not None
        and train > _WORTH_MENTIONING
        and held_out < _LEAST_KEPT * train
    ):
        found.append(
            f"of {_points(train)} points gained over contiguous placement on the training tokens, "
            f"{_points(held_out)} are left on held-out ones: the plan fits its own tokens; record "
            "more, or plan with --smoothing strong"
        )
    loads = [value_of(section(plan.metrics, name), "load") for name in (_TRAIN, _HELD_OUT)]
    if loads[0] is not None and loads[1] is not None and loads[1] > 1.25 * loads[0]:
        found.append(
            f"the highest load is {loads[0]:.2f} times the mean on the training tokens, but "
            f"{loads[1]:.2f} on held-out ones: record more varied text, or add redundant slots"
        )
    support = section(plan.metrics, "support")
    interval, noise = interval_of(support), value_of(support, "excess_shuffled")
    if interval is not None and noise is not None and interval[0] <= 1.05 * noise:
        found.append(
            "the affinity of this trace is hardly above that of the shuffled control: there is "
            "little to plan from; record more"
        )
    return found


def layer_rows(plan: Plan) -> list[dict[str, Any]]:
    """For each layer its experts, slots, experts a device and device loads where known."""
    loads = section(plan.metrics, "blocks").get("load")
    rows = []
    for at, layer in enumerate(plan.layers):
        sizes = [len(group) for group in plan.device_experts(at)]
        shares = loads[at] if isinstance(loads, list) and len(loads) == len(plan.layers) else []
        known = [value for value in shares if isinstance(value, int | float)]
        rows.append(
            {
                "layer": layer.layer,
                "experts": layer.experts,
                "top_k": plan.top_k[at],
                "slots": layer.slots,
                "fewest": min(sizes),
                "most": max(sizes),
                "resident": sum(tier == "device" for tier in layer.tiers),
                "load": max(known) * len(known) if known and sum(known) > 0 else None,
            }
        )
    return rows


def devices_line(plan: Plan) -> str:
    """`8 devices in 2 nodes`."""
    nodes = plan.topology.node_count
    return f"{plan.devices} device{'s' * (plan.devices > 1)}" + f" in {nodes} nodes" * (nodes > 1)


def _points(share: float) -> str:
    return f"{100 * share:.1f}".replace("-", "\N{MINUS SIGN}")


def _three(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
