"""What a placement costs, against walking over the tokens one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement import cost as module
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.cost import Metrics, crossing_of, load_of, measure
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace
from planted import held_by, planted_trace, random_placement_of, random_traces, trace_of


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    devices = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes = np.unique(rng.integers(0, 2, devices), return_inverse=True)[1]
    cost = rng.integers(1, 9, (devices, devices)) * (1 - np.eye(devices, dtype=int))
    return Topology(
        nodes=tuple(nodes.tolist()),
        cost=tuple(tuple(float(value) for value in row) for row in cost),
        speed=tuple(rng.uniform(0.5, 2, devices).tolist()),
    )


def experts_of(trace: RoutingTrace, row: int, layer: int) -> list[int]:
    return [int(expert) for expert in trace.topk_ids[row, layer] if expert != UNUSED]


def holders(held: BoolArray, expert: int) -> list[int]:
    return np.flatnonzero(held[expert]).tolist()


def walked(placement: list[BoolArray], topology: Topology, trace: RoutingTrace) -> dict[str, float]:
    """Crossings and hop costs pair by pair: the first expert's replicas in turn, each going on to
    the nearest of the second's."""
    pairs = crossed = crossed_nodes = hop_cost = 0.0
    for layer in range(len(placement) - 1):
        pairs_here = cost_here = 0.0
        for row in range(len(trace)):
            for e, f in product(experts_of(trace, row, layer), experts_of(trace, row, layer + 1)):
                starts, ends = holders(placement[layer], e), holders(placement[layer + 1], f)
                pairs_here += 1
                for start in starts:
                    crossed += (start not in ends) / len(starts)
                    nodes = [topology.nodes[end] for end in ends]
                    crossed_nodes += (topology.nodes[start] not in nodes) / len(starts)
                    cost_here += min(topology.cost[start][end] for end in ends) / len(starts)
        pairs += pairs_here
        hop_cost += cost_here / pairs_here if pairs_here else 0.0
    return {
        "crossing": crossed / pairs if pairs else 0.0,
        "node_crossing": crossed_nodes / pairs if pairs else 0.0,
        "hop_cost": hop_cost,
    }


def visited(
    placement: list[BoolArray], topology: Topology, trace: RoutingTrace
) -> dict[str, float]:
    """Devices of each token and layer over every choice of replicas, and the ways there and back
    from every home."""
    distinct = dispatch = 0.0
    for row in range(len(trace)):
        for layer, held in enumerate(placement):
            choices = [holders(held, expert) for expert in experts_of(trace, row, layer)]
            each = 1.0 / np.prod([len(choice) for choice in choices])
            for chosen in product(*choices):
                devices = set(chosen)
                distinct += each * len(devices)
                for home, device in product(range(topology.devices), devices):
                    both = topology.cost[home][device] + topology.cost[device][home]
                    dispatch += each * both / topology.devices
    return {
        "distinct_devices": distinct / len(trace) / len(placement),
        "dispatch_cost": dispatch / len(trace),
    }


def loads(placement: list[BoolArray], topology: Topology, trace: RoutingTrace) -> list[float]:
    found = []
    for layer, held in enumerate(placement):
        load = np.zeros(topology.devices)
        for row in range(len(trace)):
            for expert in experts_of(trace, row, layer):
                for device in holders(held, expert):
                    load[device] += 1 / held[expert].sum()
        share = np.array(topology.speed) / sum(topology.speed)
        found.append(float((load / (load.sum() * share)).max()) if load.sum() else 1.0)
    return found


@settings(max_examples=60, deadline=None)
@given(
    trace=random_traces(), topology=topologies(), replicas=st.booleans(), seed=st.integers(0, 999)
)
def test_costs_are_those_of_every_token(
    trace: RoutingTrace, topology: Topology, replicas: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    placement = random_placement_of(trace.experts, topology.devices, rng, replicas=replicas)
    found = measure(placement, topology, trace)
    assert found == measure(placement, topology, trace, affinity_of(trace))
    assert found.tokens == len(trace)
    by_layer = loads(placement, topology, trace)
    assert found.load == pytest.approx(np.mean(by_layer))
    assert found.load_worst == pytest.approx(max(by_layer))
    for name, value in visited(placement, topology, trace).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9), name
    if len(placement) == 1:
        assert found.crossing is found.node_crossing is found.hop_cost is None
        return
    for name, value in walked(placement, topology, trace).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9), name


@settings(max_examples=40, deadline=None)
@given(
    trace=random_traces(least_layers=2),
    topology=topologies(),
    replicas=st.booleans(),
    seed=st.integers(0, 999),
)
def test_costs_lie_within_their_bounds(
    trace: RoutingTrace, topology: Topology, replicas: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    placement = random_placement_of(trace.experts, topology.devices, rng, replicas=replicas)
    found = measure(placement, topology, trace)
    assert found.crossing is not None
    assert found.node_crossing is not None
    assert found.distinct_devices is not None
    assert found.hop_cost is not None
    assert -1e-12 <= found.node_crossing <= found.crossing + 1e-12 <= 1 + 2e-12
    most = min(trace.topk_ids.shape[2], topology.devices)
    assert 0 <= found.distinct_devices <= most + 1e-9
    assert 0 <= found.hop_cost <= topology.costs.max() * (len(placement) - 1) + 1e-9
    assert 1 - 1e-9 <= found.load <= found.load_worst + 1e-9
    assert found.load_worst <= 1 / topology.load_shares.min() + 1e-9


def test_a_token_without_gaps_needs_one_device_at_least() -> None:
    trace, homes = planted_trace(3, 8, 4, tokens=200, stay=0.5)
    rng = np.random.default_rng(0)
    for replicas in (False, True):
        placement = random_placement_of(trace.experts, 4, rng, replicas=replicas)
        distinct = measure(placement, Topology.of(4), trace).distinct_devices
        assert distinct is not None
        assert 1 < distinct < 2
    planted = measure(held_by(homes, 4), Topology.of(4), trace)
    assert planted.distinct_devices == pytest.approx(1.0)
    assert planted.dispatch_cost == pytest.approx(3 * 2 * 3 / 4)  # there and back, 3 of 4 homes


def test_one_device_costs_nothing() -> None:
    trace, _ = planted_trace(4, 6, 2, tokens=80)
    placement = [np.ones((6, 1), dtype=np.bool_)] * 4
    assert measure(placement, Topology.of(1), trace) == Metrics(
        tokens=80,
        crossing=0.0,
        node_crossing=0.0,
        distinct_devices=1.0,
        load=1.0,
        load_worst=1.0,
        hop_cost=0.0,
        dispatch_cost=0.0,
    )


def test_everything_everywhere_crosses_nothing() -> None:
    trace, _ = planted_trace(3, 6, 2, tokens=80, stay=0.2)
    found = measure([np.ones((6, 3), dtype=np.bool_)] * 3, Topology.of(3), trace)
    assert found.crossing == pytest.approx(0.0, abs=1e-12)
    assert found.hop_cost == 0.0
    assert found.load == pytest.approx(1.0)


def test_the_planted_placement_crosses_as_planted() -> None:
    trace, homes = planted_trace(5, 16, 4, tokens=4000, stay=0.7)
    found = measure(held_by(homes, 4), Topology.of(4, 2), trace)
    assert found.crossing == pytest.approx(0.3 * 3 / 4, abs=0.02)
    assert found.node_crossing == pytest.approx(0.3 * 2 / 4, abs=0.02)


def test_long_traces_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, _ = planted_trace(3, 8, 4, tokens=101, stay=0.5)
    rng = np.random.default_rng(2)
    placement = random_placement_of(trace.experts, 4, rng, replicas=True)
    whole = measure(placement, Topology.of(4), trace)
    monkeypatch.setattr(module, "_CHUNK_CELLS", 80)  # ten rows
    parts = measure(placement, Topology.of(4), trace)
    for name, value in whole.to_dict().items():
        assert parts.to_dict()[name] == pytest.approx(value), name


def test_counts_know_the_load_only() -> None:
    trace, homes = planted_trace(3, 8, 2, tokens=100, heavy=0.5)
    placement = held_by(homes, 2)
    full = measure(placement, Topology.of(2), trace)
    known = measure(placement, Topology.of(2), RoutingCounts.from_trace(trace))
    assert (known.load, known.load_worst) == (full.load, full.load_worst)
    assert known.crossing is known.node_crossing is known.distinct_devices is None
    assert known.hop_cost is known.dispatch_cost is None


def test_a_fast_device_may_carry_more() -> None:
    topology = Topology(nodes=(0, 0), cost=((0, 1), (1, 0)), speed=(3, 1))
    held = np.array([[True, False], [False, True]])
    assert load_of(held, np.array([3.0, 1.0]), topology) == pytest.approx(1.0)
    assert load_of(held, np.array([1.0, 1.0]), topology) == pytest.approx(2.0)
    assert load_of(held, np.zeros(2), topology) == 1.0


def test_tokens_that_choose_nothing_cross_nothing() -> None:
    trace = trace_of(np.full((4, 2, 1), UNUSED), (2, 2))
    placement = [np.eye(2, dtype=np.bool_)] * 2
    assert crossing_of(placement, affinity_of(trace)) == 0.0
    assert measure(placement, Topology.of(2), trace).distinct_devices == 0.0


def test_a_placement_of_another_model_is_refused() -> None:
    trace = trace_of(np.zeros((4, 2, 1), dtype=int), (2, 3), first_layer=5)
    held = [np.eye(2, dtype=np.bool_), np.eye(3, dtype=np.bool_)]
    with pytest.raises(PlanError, match="layer 6: the placement is 3 experts x 3 devices, the rec"):
        measure(held, Topology.of(2), trace)
