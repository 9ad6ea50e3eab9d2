"""Plans that are given permutations, and checkpoints baked or changed by hand.

Does not know how a checkpoint is baked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moe_runtime.placement.bake import Bake, bake
from moe_runtime.placement.bake_source import open_source
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology
from safetensors.torch import load_file, save_file

from moe_runtime.model_spec import MoESpec

GATE = "model.layers.1.mlp.gate.weight"  # a router of the tiny model


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


def baked(source: Path, orders: list[list[int]], out: Path, **options: Any) -> Bake:
    """Bake permutations of each layer's experts."""
    opened = open_source(source)
    return bake(opened, plan_of(opened.spec, orders), out, **options)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint that is one file."""
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
