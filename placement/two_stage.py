"""ExFlow's two stages: experts go to nodes first, then to the devices inside each node.

Cuts an instance into smaller ones and puts their answers together; the sweep solves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from moe_runtime.placement.assign import LayerSlots
from moe_runtime.placement.instance import Assignment, Instance
from moe_runtime.placement.problem import LayerLimits
from moe_runtime.placement.topology import Topology

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError

__all__ = ["inside_node", "over_nodes", "solve_in_stages"]


def solve_in_stages(
    instance: Instance, topology: Topology, solve: Callable[[Instance], Assignment]
) -> Assignment:
    """First few crossings between nodes, then few between the devices of a node.

    Args:
        solve: solves one of the smaller instances.

    Raises:
        PlanError: the problem has replicas, which the first stage cannot keep apart.
    """
    if any(slots.has_replicas for slots in instance.slots):
        raise PlanError("two stages are for plans without replicas; use one stage")
    groups = topology.by_node()
    nodes = solve(over_nodes(instance, groups))
    result = [np.zeros(len(node), dtype=np.int64) for node in nodes]
    for number, devices in enumerate(groups):
        members = [np.flatnonzero(node == number) for node in nodes]
        inner = solve(inside_node(instance, devices, members))
        for layer, (rows, device) in enumerate(zip(members, inner, strict=True)):
            result[layer][rows] = np.asarray(devices)[device]
    return result


def over_nodes(instance: Instance, groups: Sequence[Sequence[int]]) -> Instance:
    """The instance with nodes as devices: a relaxation, every placement on devices is one."""
    slots = []
    for layer in instance.slots:
        limits = layer.limits
        summed: dict[str, Any] = {
            name: np.array([getattr(limits, name)[list(devices)].sum() for devices in groups])
            for name in ("least", "most", "load")
        }
        slots.append(replace(layer, limits=replace(limits, **summed)))
    near = np.array([[instance.near[np.ix_(a, b)].max() for b in groups] for a in groups])
    return replace(instance, slots=tuple(slots), near=near)


def inside_node(instance: Instance, devices: list[int], members: list[IntArray]) -> Instance:
    """What is left for one node: its slots of each layer, its devices."""
    slots = []
    for one, rows in zip(instance.slots, members, strict=True):
        limits = one.limits
        slots.append(
            LayerSlots(
                owner=np.arange(len(rows)),
                load=one.load[rows],
                limits=LayerLimits(
                    least=limits.least[devices],
                    most=limits.most[devices],
                    slots=len(rows),
                    load=limits.load[devices],
                ),
            )
        )
    pairs = tuple((a, b, matrix[members[a]][:, members[b]]) for a, b, matrix in instance.pairs)
    together = tuple(
        matrix[rows][:, rows] for matrix, rows in zip(instance.together, members, strict=False)
    )
    near = instance.near[np.ix_(devices, devices)]
    return replace(instance, slots=tuple(slots), pairs=pairs, together=together, near=near)
