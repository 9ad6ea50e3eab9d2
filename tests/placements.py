"""Placement instances at random and by hand, every assignment of one, and a check of limits that
shares no code with any solver."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from hypothesis import strategies as st
from moe_runtime.placement.affinity import Affinity
from moe_runtime.placement.assign import LayerSlots
from moe_runtime.placement.instance import Assignment, Instance, make_instance
from moe_runtime.placement.problem import LayerLimits, Problem
from moe_runtime.placement.topology import Topology


def check_limits(instance: Instance, assignment: Assignment) -> None:
    """Equal or capped counts, load caps, one device a slot, replicas on distinct devices."""
    assert len(assignment) == instance.layers
    for number, (slots, devices) in enumerate(zip(instance.slots, assignment, strict=True)):
        where = f"layer {number}"
        assert len(devices) == len(slots.owner), where
        held: dict[int, list[int]] = {device: [] for device in range(instance.devices)}
        load = dict.fromkeys(held, 0.0)
        for slot, device in enumerate(devices.tolist()):
            assert device in held, where
            assert int(slots.owner[slot]) not in held[device], f"{where}: two replicas together"
            held[device].append(int(slots.owner[slot]))
            load[device] += float(slots.load[slot])
        for device, mine in held.items():
            assert slots.limits.least[device] <= len(mine) <= slots.limits.most[device], where
            assert load[device] <= slots.limits.load[device] * (1 + 1e-9) + 1e-9, where
        assert {owner for mine in held.values() for owner in mine} == set(slots.owner.tolist())


def all_assignments(instance: Instance) -> Iterator[Assignment]:
    """Every assignment that keeps the limits. For instances with very few slots."""
    layers = []
    for slots in instance.slots:
        alone = Instance(slots=(slots,), pairs=(), near=instance.near)
        states = []
        for devices in product(range(instance.devices), repeat=len(slots.owner)):
            state = np.array(devices, dtype=np.int64)
            try:
                check_limits(alone, [state])
            except AssertionError:
                continue
            states.append(state)
        layers.append(states)
    for chosen in product(*layers):
        yield list(chosen)


def least_cost(instance: Instance) -> float | None:
    """The optimum by trying all; None if nothing keeps the limits."""
    return min((instance.cost(found) for found in all_assignments(instance)), default=None)


@st.composite
def instances(draw: st.DrawFn, *, layers: int = 3, lag: int = 1) -> Instance:
    """Up to 3 layers of up to 4 experts on 2 devices, with every kind of limit and worth."""
    count = draw(st.integers(1, layers))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    devices = 2
    kind = draw(st.sampled_from(("equal", "capped", "replicas")))
    slots = []
    for _ in range(count):
        experts = {"equal": int(rng.choice([2, 4])), "capped": int(rng.integers(2, 5))}.get(kind, 3)
        copies = np.ones(experts, dtype=np.int64)
        if kind == "replicas":
            copies[rng.integers(experts)] = 2
        owner = np.repeat(np.arange(experts), copies)
        load = (rng.integers(0, 9, experts) / copies)[owner]
        share = -(-len(owner) // devices)
        least, most = (0, min(share + 1, experts)) if kind == "capped" else (share, share)
        cap = np.inf
        if draw(st.booleans()):  # halves, so that no load is a rounding away from a cap
            cap = float(np.floor(load.sum() / devices * rng.choice([1.05, 1.3, 2])) + 0.25)
        limits = LayerLimits(
            least=np.full(devices, least),
            most=np.full(devices, most),
            slots=len(owner),
            load=np.full(devices, cap),
        )
        slots.append(LayerSlots(owner=owner, load=load, limits=limits))
    sizes = [len(layer.owner) for layer in slots]
    pairs = tuple(
        (
            a,
            a + far,
            _alike(rng.integers(0, 6, (sizes[a], sizes[a + far])).astype(float), slots, a, far),
        )
        for far in range(1, lag + 1)
        for a in range(count - far)
    )
    together = ()
    if draw(st.booleans()):
        made = [rng.integers(0, 4, (size, size)).astype(float) for size in sizes]
        together = tuple(np.triu(matrix, 1) + np.triu(matrix, 1).T for matrix in made)
        together = tuple(
            _same_for_replicas(matrix, layer) for matrix, layer in zip(together, slots, strict=True)
        )
    near = np.eye(devices)
    if draw(st.booleans()):
        near = near + (1 - near) * np.array([[0, rng.random()], [rng.random(), 0]])
    total = sum(float(matrix.sum()) for _, _, matrix in pairs)
    total += sum(float(matrix.sum()) / 2 for matrix in together)
    return Instance(slots=tuple(slots), pairs=pairs, together=together, near=near, total=total)


def _alike(matrix: np.ndarray, slots: list[LayerSlots], first: int, far: int) -> np.ndarray:
    """Replicas of one expert are worth the same: each takes the expert's first slot's."""
    rows, columns = (
        np.searchsorted(layer.owner, layer.owner) for layer in (slots[first], slots[first + far])
    )
    return matrix[rows][:, columns]


def _same_for_replicas(matrix: np.ndarray, slots: LayerSlots) -> np.ndarray:
    first = np.searchsorted(slots.owner, slots.owner)
    result = matrix[first][:, first]
    result[slots.owner[:, None] == slots.owner[None, :]] = 0.0
    return result


def planted(
    layers: int, experts: int, devices: int, *, stay: float, pairs: int, seed: int = 0
) -> tuple[Affinity, Assignment]:
    """Counts of tokens that stay with their device with a probability, and that placement."""
    rng = np.random.default_rng(seed)
    even = np.repeat(np.arange(devices), experts // devices)
    homes = [rng.permutation(even) for _ in range(layers)]
    popular = [np.exp(0.5 * rng.standard_normal(experts)) for _ in range(layers)]
    hops = []
    for a in range(layers - 1):
        base = popular[a][:, None] * popular[a + 1][None, :]
        same = homes[a][:, None] == homes[a + 1][None, :]
        share = stay * base * same / (base * same).sum() + (1 - stay) * base / base.sum()
        hops.append(rng.poisson(share * pairs).astype(np.float64))
    affinity = Affinity(
        layer_ids=tuple(range(layers)),
        experts=(experts,) * layers,
        load=(*(hop.sum(1) for hop in hops), hops[-1].sum(0)),
        hops=(tuple(hops),),
        together=tuple(np.zeros((experts, experts)) for _ in range(layers)),
    )
    return affinity, homes


def planted_instance(
    layers: int,
    experts: int,
    devices: int,
    *,
    stay: float,
    pairs: int = 4000,
    seed: int = 0,
    nodes: int = 1,
    load_cap: float | None = None,
) -> Instance:
    """The same as an instance of the crossing objective."""
    affinity, _ = planted(layers, experts, devices, stay=stay, pairs=pairs, seed=seed)
    problem = Problem(
        layer_ids=affinity.layer_ids,
        experts=affinity.experts,
        topology=Topology.of(devices, nodes),
        load_cap=load_cap,
    )
    return make_instance(problem, affinity)
