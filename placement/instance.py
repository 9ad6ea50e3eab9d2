"""`Instance`: a problem and the counts of one trace as the arrays that solvers work on.

Built once from `Problem` and `Affinity`; knows how an assignment is valued, not how one is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from moe_runtime.placement.affinity import Affinity
from moe_runtime.placement.assign import LayerSlots
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.replicas import replica_counts

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError

__all__ = ["Assignment", "Instance", "make_instance"]

Assignment: TypeAlias = list[IntArray]  # for each layer int64 [S]: the device of each slot


@dataclass(frozen=True, kw_only=True, eq=False)
class Instance:
    """Slots of L layers and what pairs of slots are worth together.

    Args:
        slots: the slots of each layer.
        pairs: `(a, b, float64 [S_a, S_b])` with a < b: what a slot of layer a and one of layer b
            are worth when they are on one device.
        together: for each layer float64 `[S, S]` symmetric, what two slots of it are worth on one
            device; empty if nothing.
        near: float64 `[G, G]`, 1 on the diagonal: the part of a pair's worth that is kept when its
            slots are on two devices.
        total: the worth of everything on one device; no assignment is worth more.
    """

    slots: tuple[LayerSlots, ...]
    pairs: tuple[tuple[int, int, FloatArray], ...]
    together: tuple[FloatArray, ...] = ()
    near: FloatArray
    total: float = 1.0

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.near)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.slots)

    @cached_property
    def neighbours(self) -> list[list[tuple[int, FloatArray]]]:
        """For each layer the layers that it has pairs with, each `[S, S_other]`."""
        found: list[list[tuple[int, FloatArray]]] = [[] for _ in self.slots]
        for a, b, matrix in self.pairs:
            found[a].append((b, matrix))
            found[b].append((a, np.ascontiguousarray(matrix.T)))
        return found

    @cached_property
    def elsewhere(self) -> float | None:
        """What two different devices keep of a pair's worth; None if that differs by devices."""
        off = self.near[~np.eye(self.devices, dtype=bool)]
        kept = float(off[0]) if off.size else 0.0
        return kept if bool((off == kept).all()) else None

    def renamable(self) -> bool:
        """Whether the devices can be renamed in some layers and nothing but pairs notices."""
        return self.elsewhere is not None and all(
            len(set(slots.limits.most.tolist())) == 1 and len(set(slots.limits.load.tolist())) == 1
            for slots in self.slots
        )

    def values(self, assignment: Assignment, layer: int) -> FloatArray:
        """float64 `[S, G]`: what each slot of a layer is worth on each device, the rest fixed."""
        values = np.zeros((len(self.slots[layer].owner), self.devices))
        for other, matrix in self.neighbours[layer]:
            # Costs of hops may differ by direction: tokens go from the earlier layer to the later.
            near = self.near.T if other > layer else self.near
            values += matrix @ near[assignment[other]]
        if self.together:
            values += self.together[layer] @ np.eye(self.devices)[assignment[layer]]
        return values

    def value(self, assignment: Assignment) -> float:
        """The worth of an assignment: what solvers make large."""
        worth = 0.0
        for a, b, matrix in self.pairs:
            worth += float((matrix * self.near[assignment[a]][:, assignment[b]]).sum())
        for matrix, device in zip(self.together, assignment, strict=False):
            worth += 0.5 * float((matrix * (device[:, None] == device[None, :])).sum())
        return worth

    def cost(self, assignment: Assignment) -> float:
        """What solvers make small: the worth that is missed, 0 to the objective's weights."""
        return self.total - self.value(assignment)

    def placement(self, assignment: Sequence[IntArray]) -> list[BoolArray]:
        """For each layer bool `[E, G]`."""
        return [slots.held(device) for slots, device in zip(self.slots, assignment, strict=True)]

    def assignment(self, placement: Sequence[BoolArray]) -> Assignment:
        """The other way round; the placement must have this instance's replicas."""
        result = []
        for slots, held in zip(self.slots, placement, strict=True):
            owner, device = np.nonzero(held)
            if not np.array_equal(owner, slots.owner):
                raise PlanError("the placement has other replicas than the problem")
            result.append(device.astype(np.int64))
        return result


def make_instance(
    problem: Problem,
    affinity: Affinity,
    *,
    lag_weights: Sequence[float] = (1.0,),
    power: float = 1.0,
    witness: Sequence[BoolArray] | None = None,
    load_caps: Sequence[float] | None = None,
) -> Instance:
    """Arrays for the solvers.

    Args:
        affinity: counts; its layers and experts must be the problem's.
        lag_weights: weight of the pairs of layers 1, 2, ... apart; only as many lags as counted.
        power: each count is raised to it (below 1 tames cells that few tokens filled).
        witness: a placement that keeps all limits; its replica counts are taken over. Without it
            the counts are those that make the heaviest replica lightest.
        load_caps: for each layer the highest load of a device over its share, in the place of the
            problem's.

    Raises:
        PlanError: layers that differ, a load cap that cannot be kept, no affinity where the
            objective needs it.
    """
    if affinity.layer_ids != problem.layer_ids or affinity.experts != problem.experts:
        raise PlanError(
            f"the counts are of layers {list(affinity.layer_ids)} with "
            f"{sorted(set(affinity.experts))} experts, the problem of {list(problem.layer_ids)} "
            f"with {sorted(set(problem.experts))}"
        )
    owners, slots = [], []
    for position, load in enumerate(affinity.load):
        limits = problem.limits(position, load)
        if load_caps is not None and load.sum() > 0:
            highest = load_caps[position] * load.sum() * problem.topology.load_shares
            limits = replace(limits, load=highest)
        copies = np.ones(len(load), dtype=np.int64)
        if witness is not None:
            copies = witness[position].sum(1)
        elif problem.redundant:
            copies = replica_counts(load, len(load) + problem.redundant, problem.devices)
        owner = np.repeat(np.arange(len(load)), copies)
        owners.append((owner, copies))
        slots.append(LayerSlots(owner=owner, load=load[owner] / copies[owner], limits=limits))
    pair_weight, near = _nearness(problem)
    pairs = []
    if pair_weight:
        affinity.transitions  # noqa: B018  says what is missing
        pairs = _pairs(affinity, owners, lag_weights, power, pair_weight, replicas_near=near)
    together: tuple[FloatArray, ...] = ()
    if problem.objective.distinct:
        if len(affinity.together) != len(affinity.layer_ids):
            raise PlanError(
                "the objective distinct needs routing per token; these are counts without tokens, "
                "or pairs inside layers were not counted: record a trace (moe-runtime trace)"
            )
        together = _together(affinity, owners, power, problem.objective.distinct)
    total = (pair_weight if any(m.any() for _, _, m in pairs) else 0.0) + (
        problem.objective.distinct if any(m.any() for m in together) else 0.0
    )
    return Instance(
        slots=tuple(slots), pairs=tuple(pairs), together=together, near=near, total=total
    )


def _nearness(problem: Problem) -> tuple[float, FloatArray]:
    """The weight of all pairs, and what of a pair's worth two devices keep."""
    objective, costs = problem.objective, problem.topology.costs
    weight = objective.crossing + objective.time
    near = np.eye(problem.devices)
    if objective.time and costs.max() > 0:
        near = (objective.crossing * near + objective.time * (1.0 - costs / costs.max())) / weight
    return weight, near


def _pairs(
    affinity: Affinity,
    owners: Sequence[tuple[IntArray, IntArray]],
    lag_weights: Sequence[float],
    power: float,
    weight: float,
    *,
    replicas_near: FloatArray,
) -> list[tuple[int, int, FloatArray]]:
    # Where a replica elsewhere is worth something too, a pair is shared by both sides' replicas;
    # else by those of the first only: the second's on the same device serves.
    both = not np.array_equal(replicas_near, np.eye(len(replicas_near)))
    found = []
    for lag, (hops, lag_weight) in enumerate(zip(affinity.hops, lag_weights, strict=False), 1):
        if not lag_weight:
            continue
        for a, hop in enumerate(hops):
            (first, copies), (second, others) = owners[a], owners[a + lag]
            matrix = lag_weight * hop**power
            matrix = matrix[first][:, second] / copies[first][:, None]
            if both:
                matrix = matrix / others[second][None, :]
            found.append((a, a + lag, matrix))
    total = sum(float(matrix.sum()) for _, _, matrix in found)
    if not both and total > 0:
        # A pair stays at most once, although each replica of the second could keep it.
        total = sum(
            lag_weight * float((hop**power).sum())
            for hops, lag_weight in zip(affinity.hops, lag_weights, strict=False)
            for hop in hops
        )
    scale = weight / total if total > 0 else 0.0
    return [(a, b, matrix * scale) for a, b, matrix in found]


def _together(
    affinity: Affinity,
    owners: Sequence[tuple[IntArray, IntArray]],
    power: float,
    weight: float,
) -> tuple[FloatArray, ...]:
    found = []
    for (owner, copies), pairs in zip(owners, affinity.together, strict=True):
        matrix = pairs**power
        matrix = matrix[owner][:, owner] / (copies[owner][:, None] * copies[owner][None, :])
        matrix[owner[:, None] == owner[None, :]] = 0.0
        found.append(matrix)
    total = 0.5 * sum(float(matrix.sum()) for matrix in found)
    scale = weight / total if total > 0 else 0.0
    return tuple(matrix * scale for matrix in found)
