"""`Part`: some slots of an instance on some devices as an instance of its own, the rest fixed.

Cuts out and puts back; does not know how a part is solved or why it was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from moe_runtime.placement.assign import LayerSlots
from moe_runtime.placement.instance import Assignment, Instance
from moe_runtime.placement.problem import LayerLimits

from moe_runtime.core import FloatArray, IntArray

__all__ = ["Part", "part_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Free slots as an instance.

    Args:
        instance: the free slots alone, devices numbered as in `devices`, layers as in `layers`;
            its limits are what the fixed slots leave. Its `total` is 0: costs are negative worths.
        given: for each layer of the part float64 `[S, G]`, what a free slot is worth on a device
            beside the fixed slots.
        layers: positions of the layers in the whole, ascending.
        devices: int64 `[G]`, devices of the whole.
        free: for each layer of the part int64 `[S]`, the free slots' numbers in the whole.
    """

    instance: Instance
    given: tuple[FloatArray, ...]
    layers: tuple[int, ...]
    devices: IntArray
    free: tuple[IntArray, ...]

    def restrict(self, assignment: Assignment) -> Assignment:
        """The part of an assignment of the whole; its free slots are on the part's devices."""
        number = np.full(int(self.devices.max()) + 1, -1, dtype=np.int64)
        number[self.devices] = np.arange(len(self.devices))
        return [
            number[assignment[layer][slots]]
            for layer, slots in zip(self.layers, self.free, strict=True)
        ]

    def insert(self, assignment: Assignment, found: Assignment) -> Assignment:
        """The assignment of the whole with the free slots as found; a new list."""
        result = list(assignment)
        for layer, slots, device in zip(self.layers, self.free, found, strict=True):
            result[layer] = assignment[layer].copy()
            result[layer][slots] = self.devices[device]
        return result

    def value(self, found: Assignment) -> float:
        """What the free slots are worth, the pairs with fixed slots included."""
        beside = sum(
            float(given[np.arange(len(device)), device].sum())
            for given, device in zip(self.given, found, strict=True)
        )
        return self.instance.value(found) + beside


def part_of(
    instance: Instance,
    assignment: Assignment,
    *,
    layers: Sequence[int],
    devices: Sequence[int] | IntArray,
    free: Sequence[IntArray] | None = None,
) -> Part:
    """Cut out the slots that lie on some devices in some layers.

    Args:
        layers: positions, ascending.
        devices: distinct.
        free: for each of the layers the free slots, ascending: all of these devices, or fewer; of
            an expert with several slots on these devices all or none. One at least.
    """
    chosen = np.asarray(devices, dtype=np.int64)
    if free is None:
        free = [np.flatnonzero(np.isin(assignment[layer], chosen)) for layer in layers]
    slots = tuple(
        _slots(instance.slots[layer], assignment[layer], mine, chosen)
        for layer, mine in zip(layers, free, strict=True)
    )
    number = {layer: at for at, layer in enumerate(layers)}
    pairs = tuple(
        (number[a], number[b], matrix[np.ix_(free[number[a]], free[number[b]])])
        for a, b, matrix in instance.pairs
        if a in number and b in number
    )
    together: tuple[FloatArray, ...] = ()
    if instance.together:
        together = tuple(
            instance.together[layer][np.ix_(mine, mine)]
            for layer, mine in zip(layers, free, strict=True)
        )
    return Part(
        instance=Instance(
            slots=slots,
            pairs=pairs,
            together=together,
            near=instance.near[np.ix_(chosen, chosen)],
            total=0.0,
        ),
        given=tuple(
            _beside_fixed(instance, assignment, layer, chosen, number, free) for layer in layers
        ),
        layers=tuple(layers),
        devices=chosen,
        free=tuple(free),
    )


def _slots(slots: LayerSlots, device: IntArray, free: IntArray, devices: IntArray) -> LayerSlots:
    """The free slots, with limits less what the fixed ones use up."""
    fixed = np.ones(len(device), dtype=bool)
    fixed[free] = False
    size = len(slots.limits.most)
    counts = np.bincount(device[fixed], minlength=size)[devices]
    loads = np.bincount(device[fixed], slots.load[fixed], minlength=size)[devices]
    _, owner = np.unique(slots.owner[free], return_inverse=True)
    return LayerSlots(
        owner=owner.astype(np.int64),
        load=slots.load[free],
        limits=LayerLimits(
            least=np.maximum(slots.limits.least[devices] - counts, 0),
            most=slots.limits.most[devices] - counts,
            slots=len(free),
            load=slots.limits.load[devices] - loads,
        ),
    )


def _beside_fixed(
    instance: Instance,
    assignment: Assignment,
    layer: int,
    devices: IntArray,
    number: dict[int, int],
    free: Sequence[IntArray],
) -> FloatArray:
    """float64 `[S, G]`: what a layer's free slots are worth beside all that is fixed."""
    mine = free[number[layer]]
    values = np.zeros((len(mine), len(devices)))
    for other, matrix in instance.neighbours[layer]:
        weights = matrix[mine]
        if other in number:
            weights = weights.copy()
            weights[:, free[number[other]]] = 0.0
        near = instance.near.T if other > layer else instance.near
        values += weights @ near[assignment[other]][:, devices]
    if instance.together:
        weights = instance.together[layer][mine].copy()
        weights[:, mine] = 0.0
        values += weights @ np.eye(instance.devices)[assignment[layer]][:, devices]
    return values
