"""The cost model of prefill: replayed bytes against a plain count, and what does not fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.baselines import contiguous, random_placement
from moe_runtime.placement.links import Link, Links
from moe_runtime.placement.messages import COHERENT, MODES, MessageSizes, number_bytes
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.prefill_traffic import (
    PrefillCalls,
    prompts_in_lanes,
    recorded_prefill,
    replay_prefill,
)
from moe_runtime.placement.step_time import Compute, step_time
from moe_runtime.placement.timed_plan import Serving, predict_prefill
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace
from tests.routing_traces import planted_trace

SIZES = MessageSizes.of(hidden=64, keys_values=32, layers=9, top_k=2, itemsize=4, weight=2)


def batches(rng: np.random.Generator, tokens: int) -> RoutingTrace:
    """Rows of some calls with some prompts each, in the order of a recording; slots unused."""
    trace = planted_trace(tokens=tokens, layers=3, top_k=2, experts=8, devices=2, stay=0.5)
    call = np.sort(rng.integers(0, 3, size=tokens))
    prompt = rng.integers(0, 4, size=tokens) + 10 * call
    order = np.lexsort((prompt, call))
    ids = trace.topk_ids.copy()
    ids[rng.random(ids.shape) < 0.1] = UNUSED
    return replace(
        trace,
        topk_ids=ids,
        step_ids=(2 * call[order]).astype(np.int32),  # decode steps between them are left out
        sequence_ids=prompt[order].astype(np.int32),
    )


def counted(
    placement: list[BoolArray], devices: int, trace: RoutingTrace, mode: str, follow: bool
) -> dict[str, list[int]]:
    """Bytes by kind and layer, prompt by prompt and row by row, of an unreplicated placement."""
    layers = len(placement)
    sent = {kind: [0] * layers for kind in ("dispatch", "combine")}
    ends: Counter[str] = Counter()
    for call in np.unique(trace.step_ids):
        rows = np.flatnonzero(trace.step_ids == call)
        prompts = sorted(set(trace.sequence_ids[rows].tolist()))
        ends["tokens"] += 4 * len(prompts) * (devices - 1)
        for row in rows:
            home = prompts.index(trace.sequence_ids[row]) * devices // len(prompts)
            for at, held in enumerate(placement):
                chosen = [e for e in trace.topk_ids[row, at].tolist() if e != UNUSED]
                away = {int(held[expert].argmax()) for expert in chosen} - {home}
                sent["dispatch"][at] += len(away) * (64 * 4 + 2 * (1 + 2))
                sent["combine"][at] += len(away) * 64 * 4
            ends["homes"] += devices - 1
            ends["keys_values"] += (devices - 1) * 9 * 32 * 4
    calls = len(np.unique(trace.step_ids))
    pairs = devices * (devices - 1)
    groups = (2 + follow) * (mode == COHERENT)
    found = sent | {
        "tokens": [ends["tokens"]],
        "frames": [2 * 8 * pairs * calls] * layers,
        "end_frames": [(8 + 8 * groups) * pairs * calls],
    }
    if mode == COHERENT:
        found["homes"] = [ends["homes"]]
        if follow:
            found["keys_values"] = [ends["keys_values"]]
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    devices=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 30),
    mode=st.sampled_from(MODES),
    follow=st.booleans(),
)
def test_replay_sends_what_a_plain_count_sends(
    seed: int, devices: int, tokens: int, mode: str, follow: bool
) -> None:
    rng = np.random.default_rng(seed)
    trace = batches(rng, tokens)
    placement = random_placement((8,) * 3, devices, seed)
    calls = recorded_prefill(trace)
    found = replay_prefill(
        placement, Topology.of(devices), trace, calls, SIZES, mode, steps_follow=follow
    )
    assert found.totals() == counted(placement, devices, trace, mode, follow)
    assert found.collectives == ("dispatch", "combine") * 3 + ("prefill end",)
    assert bool(found.present.all())
    assert found.rows == len(trace) / calls.count
    away = sum(found.totals()["combine"]) / SIZES.combine
    assert found.stays >= 1 - away / (3 * len(trace)) - 1e-9
    assert (found.stays == 1) == (away == 0)


def test_forms_of_keys_and_values_cost_a_size_each() -> None:
    trace, calls = prompts_in_lanes(planted_trace(tokens=64), 4, 8)
    placement = contiguous(trace.experts, 4)
    one, two = (
        replay_prefill(placement, Topology.of(4), trace, calls, SIZES, COHERENT, forms=forms)
        for forms in (1, 2)
    )
    more = two.totals().pop("end_frames")[0] - one.totals().pop("end_frames")[0]
    assert more == 8 * 4 * 3
    assert one.totals()["keys_values"] == two.totals()["keys_values"]


def test_prompts_begin_each_equal_part_of_a_recording() -> None:
    source = planted_trace(tokens=43)
    trace, calls = prompts_in_lanes(source, 4, 3)
    assert calls.count == 1
    for prompt in range(4):
        mine = trace.positions[calls.prompts == prompt].tolist()
        assert mine == [10 * prompt, 10 * prompt + 1, 10 * prompt + 2]
    assert len(prompts_in_lanes(source, 4, 1000)[0]) == 40
    assert sorted(calls.homes(2).tolist()) == [0] * 6 + [1] * 6
    assert calls.homes(8).max() == 6  # four prompts leave half of eight devices without one


def test_time_is_latencies_and_the_most_loaded_links() -> None:
    trace, calls = prompts_in_lanes(planted_trace(tokens=64), 4, 8)
    topology, links = Topology.of(4), Links(near=Link(bandwidth=1e6, latency=1e-3))
    found = replay_prefill(contiguous(trace.experts, 4), topology, trace, calls, SIZES, COHERENT)
    time = step_time(found, links, topology, Compute(row=1e-5))
    assert time.latency_seconds == pytest.approx(1e-3 * len(found.collectives))
    assert time.transfer_seconds == pytest.approx(found.loads.sum() / 1e6)
    assert time.compute_seconds == pytest.approx(1e-5 * 8 * len(trace.layer_ids))
    whole = sum(found.bytes_by_kind().values())
    assert whole / 4 <= time.slowest_bytes <= whole


def test_prefill_is_predicted_of_traces_and_of_counts() -> None:
    trace = planted_trace(tokens=600)
    serving = Serving(rows=4, sizes=SIZES, links=Links(near=Link(bandwidth=1e6)), prompt_tokens=20)
    placement = contiguous(trace.experts, 4)
    for recording in (trace, RoutingCounts.from_trace(trace)):
        found = predict_prefill(placement, Topology.of(4), recording, serving)
        assert [one.rows for one in found.values()] == [80, 80]
        assert found["coherent"].cross_bytes > found["vanilla"].cross_bytes
        double = replace(serving, prompt_tokens=40)
        again = predict_prefill(placement, Topology.of(4), recording, double)
        assert again["vanilla"].seconds == pytest.approx(2 * found["vanilla"].seconds, rel=0.2)


def test_what_does_not_fit_is_refused() -> None:
    trace, calls = prompts_in_lanes(planted_trace(tokens=20), 4, 2)
    placement = contiguous(trace.experts, 4)
    with pytest.raises(PlanError, match="unknown mode 'fast'"):
        replay_prefill(placement, Topology.of(4), trace, calls, SIZES, "fast")
    for wrong in ((placement[1:], trace), (placement, trace[:3])):
        with pytest.raises(PlanError, match="do not fit a trace"):
            replay_prefill(wrong[0], Topology.of(4), wrong[1], calls, SIZES, COHERENT)
    with pytest.raises(PlanError, match="no prefill"):
        recorded_prefill(trace[:0])
    with pytest.raises(PlanError, match="calls must be numbered"):
        PrefillCalls(calls=np.array([0, 2]), prompts=np.array([0, 0]))
    with pytest.raises(PlanError, match="prompts of call 1"):
        PrefillCalls(calls=np.array([0, 1, 1]), prompts=np.array([0, 0, 2]))


def test_links_read_back_and_damage_is_named() -> None:
    links = Links(near=Link(bandwidth=1e9, latency=1e-5), far=Link(bandwidth=1e8))
    assert Links.from_dict(links.to_dict()) == links
    for damaged in ({}, {"same_node": 3}, {"same_node": {"bytes_per_second": "quick"}}):
        with pytest.raises(PlanError, match="'same_node' is missing or damaged"):
            Links.from_dict(damaged)


def test_numbers_are_as_wide_as_they_need() -> None:
    assert [number_bytes(count) for count in (1, 256, 257, 1 << 15, (1 << 15) + 1)] == [
        *(1, 1, 2, 2, 4)
    ]
