"""The cost model of expert parallelism: replayed bytes against a plain count, and its laws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.baselines import contiguous, random_placement
from moe_runtime.placement.cost import crossing_of, measure
from moe_runtime.placement.decode_steps import (
    DecodeSteps,
    Holders,
    in_lanes,
    recorded_steps,
    starts_of,
)
from moe_runtime.placement.drawn_routing import drawn_trace
from moe_runtime.placement.links import Link, Links, loads_by_level
from moe_runtime.placement.messages import COHERENT, MODES, VANILLA, MessageSizes
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.step_time import Compute, compare_modes, step_seconds, step_time
from moe_runtime.placement.step_traffic import StepTraffic, replay
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace
from tests.routing_traces import planted_trace

LINKS = Links(near=Link(bandwidth=1e9, latency=1e-5))


def sizes_for(trace: RoutingTrace, **over: int) -> MessageSizes:
    made = MessageSizes.of(
        hidden=64,
        keys_values=32,
        layers=trace.layer_ids[-1] + 2,
        top_k=trace.topk_ids.shape[2],
        itemsize=4,
    )
    return replace(made, **over)


def random_trace(rng: np.random.Generator, tokens: int, layers: int, k: int) -> RoutingTrace:
    """8 experts, layers 1, 2, ...; some slots and some rows choose nothing."""
    ids = np.stack([[rng.permutation(8)[:k] for _ in range(layers)] for _ in range(tokens)]).astype(
        np.uint16
    )
    weights = rng.integers(1, 4, size=ids.shape).astype(np.float16)
    ids[rng.random(ids.shape) < 0.1] = UNUSED
    weights[ids == UNUSED] = 0
    trace = planted_trace(tokens=tokens, layers=layers, top_k=k, experts=8, devices=2, stay=0.5)
    return replace(trace, topk_ids=ids, topk_weights=weights)


def random_replicas(rng: np.random.Generator, layers: int, devices: int) -> list[BoolArray]:
    placement = random_placement((8,) * layers, devices, int(rng.integers(1000)))
    return [held | (rng.random(held.shape) < 0.15) for held in placement]


def _nearest(held: BoolArray, topology: Topology, expert: int, here: int) -> int:
    """The row's own device, else the cheapest to reach, replicas by turns."""
    hosts = np.flatnonzero(held[expert]).tolist()
    turn = (here + expert) % topology.devices
    return int(
        min(
            hosts,
            key=lambda d: (d != here, topology.cost[here][d], (d - turn) % topology.devices),
        )
    )


def _target(held: BoolArray, topology: Topology, chosen: list[tuple[float, int]], here: int) -> int:
    """A host of a heaviest expert: with most of the row's experts, then itself, then nearest."""
    heaviest = max(weight for weight, _ in chosen)
    hosts = {
        host
        for weight, expert in chosen
        if weight == heaviest
        for host in np.flatnonzero(held[expert]).tolist()
    }

    def rank(host: int) -> tuple[int, bool, float, int]:
        together = sum(bool(held[expert, host]) for _, expert in chosen)
        return -together, host != here, topology.cost[here][host], host

    return int(min(hosts, key=rank))


def counted(
    placement: list[BoolArray],
    topology: Topology,
    trace: RoutingTrace,
    steps: DecodeSteps,
    sizes: MessageSizes,
    mode: str,
    starts: np.ndarray,
) -> dict[tuple[str, int, int, int, int], int]:
    """Bytes by (kind, step, place in kind, from, to), row by row in plain Python."""
    sent: Counter[tuple[str, int, int, int, int]] = Counter()
    devices = topology.devices
    moe = {layer: at for at, layer in enumerate(trace.layer_ids)}

    def put(kind: str, step: int, at: int, source: int, target: int, size: int) -> None:
        if source != target and size:
            sent[kind, step, at, source, target] += size

    for row in range(len(trace)):
        step = int(steps.steps[row])
        lanes = int(steps.lanes.max()) + 1
        here = int(steps.lanes[row]) * devices // lanes if mode == VANILLA else int(starts[row])
        for layer in range(sizes.layers):
            if mode == COHERENT:
                for other in range(devices):
                    put("keys_values", step, 0, here, other, sizes.keys_values)
            if layer not in moe:
                continue
            at = moe[layer]
            held = placement[at]
            chosen = [
                (float(trace.topk_weights[row, at, slot]), expert)
                for slot, expert in enumerate(trace.topk_ids[row, at].tolist())
                if expert != UNUSED
            ]
            if not chosen:
                continue
            target = here if mode == VANILLA else _target(held, topology, chosen, here)
            needed = set()
            for _, expert in chosen:
                if mode == COHERENT and held[expert, target]:
                    needed.add(target)
                else:
                    needed.add(_nearest(held, topology, expert, here))
            if mode == VANILLA:
                for device in needed:
                    put("dispatch", step, at, here, device, sizes.dispatch)
                    put("combine", step, at, device, here, sizes.combine)
                continue
            for device in needed | {target}:
                put("move", step, at, here, device, sizes.move)
            for device in needed - {target}:
                put("partial_sums", step, at, device, target, sizes.partial_sums)
            here = target
        for other in range(devices):
            put("tokens", step, 0, here, other, sizes.token + sizes.row * (mode == COHERENT))
    return dict(sent)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 4),
    k=st.integers(1, 3),
    shape=st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2)]),
    rows=st.integers(1, 5),
    mode=st.sampled_from(MODES),
)
def test_replay_sends_what_a_plain_count_sends(
    seed: int, layers: int, k: int, shape: tuple[int, int], rows: int, mode: str
) -> None:
    rng = np.random.default_rng(seed)
    topology = Topology.of(*shape)
    trace, steps = in_lanes(random_trace(rng, 12, layers, k), rows)
    placement = random_replicas(rng, layers, topology.devices)
    sizes = sizes_for(trace, frame=0, group=0)
    starts = rng.integers(topology.devices, size=len(trace))
    found = replay(placement, topology, trace, steps, sizes, mode, starts)
    expected = counted(placement, topology, trace, steps, sizes, mode, starts)
    table: dict[str, np.ndarray] = {kind: np.zeros_like(sent) for kind, sent in found.kinds.items()}
    pairs = np.zeros((steps.count, topology.devices, topology.devices))
    for (kind, step, at, source, target), size in expected.items():
        table[kind][step, at] += size
        pairs[step, source, target] += size
    for kind, sent in found.kinds.items():
        np.testing.assert_array_equal(sent, table[kind], err_msg=kind)
    # Loads: no collective is less loaded than the step's bytes spread over its collectives.
    whole = loads_by_level(pairs, topology)
    assert (found.loads.sum(1) >= whole - 1e-9).all()


def test_a_chunked_replay_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, steps = in_lanes(planted_trace(tokens=60), 6)
    placement = random_placement(trace.experts, 4, 1)
    asked = (placement, Topology.of(4), trace, steps, sizes_for(trace))
    whole = replay(*asked, COHERENT, keep=True)
    monkeypatch.setattr("moe_runtime.placement.step_traffic._CHUNK_CELLS", 16 * 3)
    parts = replay(*asked, COHERENT, keep=True)
    assert parts.totals() == whole.totals()
    assert whole.matrices is not None
    assert parts.matrices is not None
    np.testing.assert_array_equal(parts.matrices, whole.matrices)
    np.testing.assert_array_equal(loads_by_level(whole.matrices, Topology.of(4)), whole.loads)
    sent = sum(kind.sum() for kind in whole.kinds.values())
    assert whole.matrices.sum() == pytest.approx(float(sent))
    np.testing.assert_array_equal(parts.loads, whole.loads)
    np.testing.assert_array_equal(parts.uses, whole.uses)
    assert parts.stays == pytest.approx(whole.stays)
    assert parts.rows == whole.rows == 6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), devices=st.sampled_from([2, 4, 8]))
def test_top_1_moves_are_the_plans_crossings(seed: int, devices: int) -> None:
    trace = planted_trace(tokens=80, top_k=1, layers=3, experts=16, devices=8, seed=seed)
    trace, steps = in_lanes(trace, 8)
    placement = random_placement(trace.experts, devices, seed)
    topology = Topology.of(devices)
    # A row that begins where its first expert is makes no move in the first layer.
    first = placement[0].argmax(1)[trace.topk_ids[:, 0, 0]]
    sizes = sizes_for(trace)
    found = replay(placement, topology, trace, steps, sizes, COHERENT, first)
    crossings = crossing_of(placement, affinity_of(trace)) * len(trace) * 2
    assert found.kinds["move"].sum() == pytest.approx(crossings * sizes.move)
    assert found.stays == pytest.approx(1 - crossings / (3 * len(trace)))
    # Vanilla sends each row to one device and back, so half of the exchanges are gone.
    vanilla = replay(placement, topology, trace, steps, sizes, VANILLA)
    assert len(vanilla.collectives) == 7
    assert found.collectives == ("move", "move", "move", "step end")


def test_vanilla_dispatches_are_the_plans_distinct_devices() -> None:
    trace, steps = in_lanes(planted_trace(tokens=400, devices=4), 8)
    placement = random_placement(trace.experts, 4, 3)
    sizes = sizes_for(trace)
    found = replay(placement, Topology.of(4), trace, steps, sizes, VANILLA)
    distinct = measure(placement, Topology.of(4), trace).distinct_devices
    assert distinct is not None
    # A row's own device is among them in a quarter of the cases: count those apart.
    homes = steps.homes(4)
    own = 0
    for position, held in enumerate(placement):
        device = held.argmax(1)[trace.topk_ids[:, position].astype(int)]
        own += int((device == homes[:, None]).any(1).sum())
    messages = distinct * len(trace) * len(placement) - own
    assert found.kinds["dispatch"].sum() == pytest.approx(messages * sizes.dispatch)
    assert found.kinds["combine"].sum() == pytest.approx(messages * sizes.combine)


@pytest.mark.parametrize("mode", MODES)
def test_everything_on_one_device_exchanges_nothing(mode: str) -> None:
    trace, steps = in_lanes(planted_trace(tokens=40), 4)
    # All experts on device 2 of 4; the rows begin there.
    placement = [np.eye(4, dtype=bool)[[2] * experts] for experts in trace.experts]
    start = np.full(len(trace), 2)
    found = replay(placement, Topology.of(4), trace, steps, sizes_for(trace), mode, start)
    sent = found.bytes_by_kind()
    if mode == COHERENT:
        assert sent["move"] == sent["partial_sums"] == 0
        assert found.stays == 1
    else:
        assert sent["dispatch"] > 0  # rows live on all devices
    alone = [held[:, 2:3] for held in placement]
    single = replay(alone, Topology.of(1), trace, steps, sizes_for(trace), mode)
    assert sum(single.bytes_by_kind().values()) == 0
    links = Links(near=Link(bandwidth=1.0, latency=1.0))
    assert step_seconds(single, links, Topology.of(1)).max() == 0


def _both(seed: int, shape: tuple[int, int], k: int) -> tuple[StepTraffic, StepTraffic, Topology]:
    topology = Topology.of(*shape)
    trace = planted_trace(tokens=48, top_k=k, layers=3, devices=4, seed=seed)
    trace, steps = in_lanes(trace, 4)
    placement = random_placement(trace.experts, topology.devices, seed)
    starts = starts_of(placement, topology, trace, steps)
    vanilla, coherent = (
        replay(placement, topology, trace, steps, sizes_for(trace), mode, starts) for mode in MODES
    )
    return vanilla, coherent, topology


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 500),
    shape=st.sampled_from([(2, 1), (4, 2)]),
    k=st.integers(1, 2),
    bandwidth=st.floats(1e3, 1e12),
    latency=st.floats(0, 1e-2),
    faster=st.floats(1, 100),
)
def test_a_better_link_is_never_slower(
    seed: int, shape: tuple[int, int], k: int, bandwidth: float, latency: float, faster: float
) -> None:
    vanilla, coherent, topology = _both(seed, shape, k)
    far = Link(bandwidth=bandwidth / 3, latency=2 * latency)
    links = Links(near=Link(bandwidth=bandwidth, latency=latency), far=far)
    for traffic in (vanilla, coherent):
        before = step_seconds(traffic, links, topology)
        assert (step_seconds(traffic, links.scaled(faster), topology) <= before * (1 + 1e-12)).all()
        near = replace(links, near=replace(links.near, bandwidth=bandwidth * faster))
        assert (step_seconds(traffic, near, topology) <= before * (1 + 1e-12)).all()
        sooner = Links(
            near=replace(links.near, latency=latency / faster),
            far=replace(far, latency=far.latency / faster),
        )
        assert (step_seconds(traffic, sooner, topology) <= before * (1 + 1e-12)).all()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 500),
    shape=st.sampled_from([(4, 1), (4, 2)]),
    k=st.integers(1, 3),
    bandwidth=st.floats(1e4, 1e11),
    latency=st.floats(0, 1e-2),
    compute=st.floats(0, 1e-2),
)
def test_the_better_mode_changes_at_the_crossovers_and_nowhere_else(
    seed: int, shape: tuple[int, int], k: int, bandwidth: float, latency: float, compute: float
) -> None:
    vanilla, coherent, topology = _both(seed, shape, k)
    links = Links(near=Link(bandwidth=bandwidth, latency=latency))
    cost = Compute(step=compute, row=compute / 10, use=compute / 20)
    found = compare_modes(vanilla, coherent, links, topology, cost)
    faster = found.coherent.seconds < found.vanilla.seconds
    assert found.use == (COHERENT if faster else VANILLA)
    edges = [1e-5, *found.bandwidth_factors, 1e5]
    uses = [
        compare_modes(vanilla, coherent, links.scaled(mid), topology, cost).use
        for mid in ((a * b) ** 0.5 for a, b in pairwise(edges))
    ]
    assert all(a != b for a, b in pairwise(uses))
    assert found.use == uses[sum(factor < 1 for factor in found.bandwidth_factors)]


def test_rows_at_which_the_modes_meet() -> None:
    """Traffic that grows with its rows meets at the rows that were said."""
    vanilla, coherent, topology = _both(3, (4, 1), 1)
    links = Links(near=Link(bandwidth=2e5, latency=1e-4))
    cost = Compute(step=1e-4, row=1e-4, use=1e-5)
    found = compare_modes(vanilla, coherent, links, topology, cost)
    assert found.rows is not None
    assert found.rows > 0
    for factor, coherent_wins in ((0.9, False), (1.1, True)):
        grown = [
            replace(
                traffic,
                rows=traffic.rows * (scale := factor * found.rows / traffic.rows),
                loads=traffic.loads * scale,
                held=traffic.held * scale,
                uses=traffic.uses * scale,
            )
            for traffic in (vanilla, coherent)
        ]
        times = [step_time(traffic, links, topology, cost).seconds for traffic in grown]
        assert (times[1] < times[0]) == (coherent_wins == found.rows_coherent_above)


def test_a_step_takes_its_most_loaded_links_one_after_another() -> None:
    """Four devices in two nodes, by hand: 100 bytes within, 30 between."""
    matrix = np.zeros((4, 4))
    matrix[0, 1], matrix[1, 0], matrix[0, 2], matrix[3, 2], matrix[2, 2] = 100, 40, 10, 20, 999
    matrix[1, 2] = 20
    topology = Topology.of(4, 2)
    loads = loads_by_level(matrix, topology)
    np.testing.assert_array_equal(loads, [100, 30])
    links = Links(near=Link(bandwidth=100.0), far=Link(bandwidth=10.0, latency=0.5))
    assert links.transfer_seconds(loads) == pytest.approx(3.0)
    assert links.latency(topology) == 0.5


@pytest.mark.parametrize(
    ("text", "bandwidth", "latency"),
    [
        ("1Gbit,0.2ms", 1.25e8, 2e-4),
        ("100 Mbit/s", 1.25e7, 0.0),
        ("25GB,20us", 2.5e10, 2e-5),
        ("1GiB/s, 1s", 2.0**30, 1.0),
        ("5 KIB", 5120.0, 0.0),
    ],
)
def test_links_are_read_from_text(text: str, bandwidth: float, latency: float) -> None:
    link = Link.parse(text)
    assert link.bandwidth == pytest.approx(bandwidth)
    assert link.latency == pytest.approx(latency)


@pytest.mark.parametrize(
    "text", ["", "fast", "1Gbit,", "1Gbit,2km", "0Gbit", "-1Gbit", "1Gbit,-1s"]
)
def test_texts_that_are_no_link_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="link"):
        Link.parse(text)


def test_measured_topologies_say_their_bandwidth() -> None:
    seconds = np.array([[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]]) * 1e-6
    topology = Topology.measured(seconds)
    links = Links.of_topology(topology, hidden_bytes=8192)
    assert links.near.bandwidth == pytest.approx(8192 / 1e-6)
    assert links.levels[1].bandwidth == pytest.approx(8192 / 9e-6)
    with pytest.raises(PlanError, match="hops"):
        Links.of_topology(Topology.of(4), hidden_bytes=8192)


def test_the_nearest_holder_is_the_device_itself_if_it_can() -> None:
    held = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    nearest = Holders.of(held, Topology.of(4, 2)).nearest
    assert nearest.tolist() == [[0, 1, 3], [0, 1, 3], [3, 2, 3], [3, 2, 3]]
    # Equally near replicas take turns: 0 and 3 for rows of 1 and 2.
    assert Holders.of(held, Topology.of(4)).nearest[:, 0].tolist() == [0, 3, 3, 3]


def test_a_sequence_begins_where_it_ended() -> None:
    trace, steps = in_lanes(planted_trace(tokens=40, top_k=1), 4)
    placement = random_placement(trace.experts, 4, 0)
    starts = starts_of(placement, Topology.of(4), trace, steps, by_token=False)
    ends = placement[-1].argmax(1)[trace.topk_ids[:, -1, 0]]
    for row, (step, lane) in enumerate(zip(steps.steps, steps.lanes, strict=True)):
        before = np.flatnonzero((steps.steps == step - 1) & (steps.lanes == lane))
        assert starts[row] == (ends[before[0]] if len(before) else lane)


def test_a_sequence_begins_where_its_token_went_before() -> None:
    source = planted_trace(tokens=60, top_k=1)
    source = replace(source, token_ids=(np.arange(60) % 7 - 1).astype(np.int32))  # -1: unknown
    trace, steps = in_lanes(source, 4)
    placement = random_placement(trace.experts, 4, 0)
    starts = starts_of(placement, Topology.of(4), trace, steps)
    plain = starts_of(placement, Topology.of(4), trace, steps, by_token=False)
    first = placement[0].argmax(1)[trace.topk_ids[:, 0, 0]]
    for row, (step, token) in enumerate(zip(steps.steps, trace.token_ids, strict=True)):
        same = np.flatnonzero((steps.steps < step) & (trace.token_ids == token) & (token >= 0))
        assert starts[row] == (first[same[-1]] if len(same) else plain[row])
    assert (starts != plain).any()


def test_lanes_hold_neighbouring_tokens() -> None:
    source = planted_trace(tokens=23)
    trace, steps = in_lanes(source, 4)
    assert (len(trace), steps.count, steps.rows) == (20, 5, 4)
    for lane in range(4):
        rows = trace.positions[steps.lanes == lane].tolist()
        assert rows == list(range(lane * 5, lane * 5 + 5))
    own = recorded_steps(trace)
    assert own.steps.tolist() == steps.steps.tolist()
    with pytest.raises(PlanError, match="23 tokens"):
        in_lanes(source, 24)


def test_drawn_routing_has_the_counts_shares() -> None:
    counts = RoutingCounts(
        counts=(np.array([8.0, 4, 4, 0]), np.array([1.0, 1, 1, 1])), layer_ids=(2, 5), top_k=(1, 2)
    )
    trace = drawn_trace(counts, 20_000, seed=4)
    assert trace.layer_ids == (2, 5)
    first = np.bincount(trace.topk_ids[:, 0, 0], minlength=4) / len(trace)
    np.testing.assert_allclose(first, [0.5, 0.25, 0.25, 0], atol=0.02)
    assert (trace.topk_ids[:, 0, 1] == UNUSED).all()
    pairs = trace.topk_ids[:, 1]
    assert (pairs[:, 0] != pairs[:, 1]).all()
    np.testing.assert_allclose(np.bincount(pairs.ravel()) / len(trace), [0.5] * 4, atol=0.02)
    with pytest.raises(PlanError, match="layer 2"):
        drawn_trace(replace(counts, top_k=(0, 2)), 10)


def test_the_fewest_bytes_of_all_placements_are_found_where_they_should_be() -> None:
    """Every placement of 2 layers x 4 experts on 2 devices: the one that keeps what belongs
    together sends least, in both modes."""
    rng = np.random.default_rng(0)
    group = rng.integers(2, size=200)  # experts {0, 2} belong together, and {1, 3}
    ids = np.stack([group + 2 * rng.integers(2, size=200) for _ in range(2)], 1)[:, :, None]
    base = planted_trace(tokens=200, layers=2, experts=4, devices=2, top_k=1)
    trace, steps = in_lanes(
        replace(base, topk_ids=ids.astype(np.uint16), topk_weights=np.ones(ids.shape, np.float16)),
        10,
    )
    found: dict[tuple[tuple[int, ...], ...], float] = {}
    halves = [half for half in product((0, 1), repeat=4) if sum(half) == 2]
    for choice in product(halves, repeat=2):
        placement = [np.eye(2, dtype=bool)[list(half)] for half in choice]
        starts = np.array(choice[0])[trace.topk_ids[:, 0, 0].astype(int)]
        traffic = replay(
            placement, Topology.of(2), trace, steps, sizes_for(trace), COHERENT, starts
        )
        found[choice] = step_time(traffic, LINKS, Topology.of(2)).bytes_by_kind["move"]
    best = min(found.values())
    assert best == 0
    assert {choice for choice, sent in found.items() if sent == best} == {
        ((0, 1, 0, 1), (0, 1, 0, 1)),
        ((1, 0, 1, 0), (1, 0, 1, 0)),
    }


def test_what_does_not_fit_is_refused() -> None:
    trace, steps = in_lanes(planted_trace(tokens=20), 4)
    placement = contiguous(trace.experts, 4)
    sizes = sizes_for(trace)
    with pytest.raises(PlanError, match="unknown mode 'fast'"):
        replay(placement, Topology.of(4), trace, steps, sizes, "fast")
    with pytest.raises(PlanError, match="layer 1"):
        replay(placement, Topology.of(2), trace, steps, sizes, VANILLA)
    with pytest.raises(PlanError, match="3 layers"):
        replay(placement[:3], Topology.of(4), trace, steps, sizes, VANILLA)
    with pytest.raises(PlanError, match="rows"):
        replay(placement, Topology.of(4), trace[:5], steps, sizes, VANILLA)
    with pytest.raises(PlanError, match="use"):
        Compute(use=-1.0)
    with pytest.raises(PlanError, match="move"):
        sizes_for(trace, move=-1)
