"""Plans that are given permutations.

Does not know how a checkpoint is baked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology

from moe_runtime.model_spec import MoESpec


def plan_of(spec: MoESpec, permutations: Sequence[Sequence[int]], *, devices: int = 0) -> Plan:
    """The plan whose contiguous blocks are these permutations of each layer's experts.

    With 0 devices there is one for each expert of a layer (all layers have as many).
    """
    counts = {len(order) for order in permutations}
    devices = devices or counts.pop()
    layers = []
    for layer, order in zip(spec.layers, permutations, strict=True):
        each = len(order) // devices
        hosts = [(0,)] * len(order)
        for place, expert in enumerate(order):
            hosts[expert] = (place // each,)
        layers.append(LayerPlan(layer=layer.layer, hosts=tuple(hosts)))
    cost = tuple(tuple(float(a != b) for b in range(devices)) for a in range(devices))
    return Plan(
        topology=Topology(nodes=(0,) * devices, cost=cost),
        layers=tuple(layers),
        model_id=spec.model_id,
        fingerprint=spec.fingerprint,
    )


def random_orders(spec: MoESpec, seed: int) -> list[list[int]]:
    """A permutation of each layer's experts."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(layer.num_experts).tolist() for layer in spec.layers]
