"""Random plans with equal slots on each device, for tests of what takes a plan."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from moe_runtime.placement import LayerPlan, Plan, Topology
from moe_runtime.placement.replicas import pack, replica_counts

TIERS = ("device", "host", "disk")


def random_plan(
    seed: int, *, devices: int, own: int, redundant: int, layers: tuple[int, ...]
) -> Plan:
    """A plan of `own` experts and `redundant` replicas on each device; tiers at random."""
    random = np.random.default_rng(seed)
    experts = devices * own
    made = []
    for layer in layers:
        load = random.random(experts) ** 4
        counts = replica_counts(load, experts + devices * redundant, devices)
        held = pack(random.random(experts) * counts, counts, devices)
        made.append(
            LayerPlan(
                layer=layer,
                hosts=tuple(tuple(np.flatnonzero(row).tolist()) for row in held),
                tiers=tuple(random.choice(TIERS, experts).tolist()),
            )
        )
    return Plan(topology=Topology.of(devices), layers=tuple(made))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans with and without replicas, with dense layers before and between."""
    devices = draw(st.integers(1, 4))
    own = draw(st.integers(1, 4))
    most = min(2, devices * own - own)
    return random_plan(
        draw(st.integers(0, 10_000)),
        devices=devices,
        own=own,
        redundant=draw(st.integers(0, most)),
        layers=tuple(sorted(draw(st.sets(st.integers(0, 7), min_size=1, max_size=4)))),
    )
