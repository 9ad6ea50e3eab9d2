"""Group-limited routing: plans that keep each routing group of experts on one device.

A router that first chooses groups (DeepSeek's `n_group`) computes something else once experts
change groups. So groups are planned as if they were experts, and the plan is taken apart
afterwards. Knows no solver.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.problem import Problem

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["experts_of_groups", "grouped_problem", "in_groups"]


def in_groups(recording: RoutingTrace | RoutingCounts, groups: int) -> RoutingTrace | RoutingCounts:
    """The recording with the experts of each group as one.

    A token that chose several experts of a group names it several times, so that pairs and loads
    stay what they are.

    Raises:
        PlanError: groups that do not divide a layer's experts.
    """
    sizes = [
        _size(layer, count, groups)
        for layer, count in zip(recording.layer_ids, recording.experts, strict=True)
    ]
    experts = (groups,) * len(sizes)
    if isinstance(recording, RoutingCounts):
        counts = tuple(np.asarray(each).reshape(groups, -1).sum(1) for each in recording.counts)
        return replace(recording, counts=counts, experts=experts)
    ids = recording.topk_ids // np.array(sizes, dtype=np.uint16)[None, :, None]
    ids[recording.topk_ids == UNUSED] = UNUSED
    return replace(recording, topk_ids=ids, experts=experts)


def grouped_problem(problem: Problem, groups: int) -> Problem:
    """The problem with groups as experts.

    Raises:
        PlanError: redundant slots, or groups that cannot be shared by the devices.
    """
    if problem.redundant:
        raise PlanError("whole groups cannot be replicated; plan with --redundant 0")
    if groups % problem.devices:
        raise PlanError(
            f"{groups} routing groups cannot stay whole on {problem.devices} devices; take a "
            "number of devices that divides them"
        )
    sizes = [
        _size(layer, count, groups)
        for layer, count in zip(problem.layer_ids, problem.experts, strict=True)
    ]
    bytes_ = tuple(size * each for size, each in zip(sizes, problem.expert_bytes, strict=True))
    return replace(problem, experts=(groups,) * len(sizes), expert_bytes=bytes_)


def experts_of_groups(plan: Plan, experts: tuple[int, ...]) -> Plan:
    """A plan of groups as a plan of their experts; metrics and certificate hold for both.

    Args:
        experts: experts of each layer.
    """
    layers = tuple(
        LayerPlan(
            layer=layer.layer,
            hosts=tuple(layer.hosts[expert * layer.experts // count] for expert in range(count)),
            tiers=tuple(layer.tiers[expert * layer.experts // count] for expert in range(count)),
        )
        for layer, count in zip(plan.layers, experts, strict=True)
    )
    return replace(plan, layers=layers)


def _size(layer: int, count: int, groups: int) -> int:
    if groups < 1 or count % groups:
        raise PlanError(f"layer {layer}: {groups} groups do not divide {count} experts")
    return count // groups
