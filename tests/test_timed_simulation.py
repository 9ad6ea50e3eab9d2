"""The timed simulator: it counts as the runtime and the plain simulator do, its clock and its link
are sound, and every load ahead of need has one fate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.predictors.oracle import OraclePredictor, PreGatePredictor

from moe_runtime.cache import ExpertCache
from moe_runtime.core import ExpertGrid
from moe_runtime.decision_log import replay_log
from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.eviction import Belady, EvictionPolicy, make_policy
from moe_runtime.prefetch_planner import PlannerRules
from moe_runtime.simulate import simulate
from moe_runtime.timed_result import TimedResult
from moe_runtime.timed_simulation import (
    ComputeModel,
    Forecasting,
    simulate_timed,
    slots_of,
)
from moe_runtime.trace import RoutingTrace
from moe_runtime.virtual_link import LinkModel
from routing_traces import EXPERTS, LAYERS, planted_trace

SIZE = 1000
BYTES = (SIZE,) * LAYERS
SLOW = LinkModel(bytes_per_second=1e6, latency=1e-4)
FAST = LinkModel(bytes_per_second=1e15)
COMPUTE = ComputeModel(layer=2e-3, expert=1e-3, expert_token=1e-4, call=1e-3)
POLICIES = ("lru", "lfu", "echo", "belady", "static")


def batched(trace: RoutingTrace, sizes: list[int]) -> RoutingTrace:
    """The same rows in calls of these sizes, again and again; calls of one row decode."""
    lengths = np.resize(np.array(sizes), len(trace))
    calls = np.repeat(np.arange(len(trace)), lengths)[: len(trace)].astype(np.int32)
    alone = np.bincount(calls)[calls] == 1
    columns = trace.columns() | {"step_ids": calls, "phase": alone.astype(np.uint8)}
    return RoutingTrace(**columns, **trace.description())


def fresh(name: str, trace: RoutingTrace) -> EvictionPolicy:
    if name == "belady":
        return Belady(trace.grid, trace.accesses())
    counts = np.random.default_rng(3).random(trace.grid.size)
    return make_policy(name, trace.grid, **({"counts": counts} if name == "static" else {}))


def timed(trace: RoutingTrace, policy: str = "lru", share: float = 0.3, **how: Any) -> TimedResult:
    how = {"link": SLOW, "compute": COMPUTE, **how}
    pools = slots_of(trace.grid, share, BYTES)
    return simulate_timed(trace, fresh(policy, trace), pools, expert_bytes=BYTES, **how)


def forecasting(trace: RoutingTrace, recall: float = 1.0, **rules: Any) -> Forecasting:
    predictor = OraclePredictor(trace) if recall == 1 else PreGatePredictor(trace, recall, seed=5)
    return Forecasting(predictor=predictor, rules=PlannerRules(**rules))


def assert_accounted(found: TimedResult, trace: RoutingTrace) -> None:
    """Every use has one outcome, every load ahead one fate, every byte one purpose."""
    assert found.uses == sum(len(access.experts) for access in trace.iter_accesses())
    fates = found.in_time + found.late + found.unused + found.withdrawn + found.pending
    np.testing.assert_array_equal(found.ahead, fates)
    counts = (found.resident, found.in_time, found.late, found.missed, found.unused)
    assert all((count >= 0).all() for count in counts)
    assert found.bytes_needed == SIZE * int((found.late + found.missed).sum())
    assert found.bytes_ahead == SIZE * int((found.in_time + found.unused).sum())
    assert found.bytes_wasted == SIZE * int(found.unused.sum())


traces = st.builds(
    lambda seed, tokens, sizes: batched(planted_trace(seed=seed, tokens=tokens), sizes),
    st.integers(0, 50),
    st.integers(3, 25),
    st.sampled_from([[1], [1], [5, 1, 1, 1], [3], [12]]),
)
links = st.builds(
    lambda rate, latency, parallel: LinkModel(
        bytes_per_second=rate, latency=latency, parallel=parallel
    ),
    st.sampled_from([2e5, 1e6, 1e7]),
    st.sampled_from([0.0, 5e-4]),
    st.integers(1, 3),
)


@settings(max_examples=25, deadline=None)
@given(trace=traces, link=links, policy=st.sampled_from(POLICIES), share=st.floats(0.05, 1.0))
def test_on_demand_it_counts_as_the_plain_simulator(
    trace: RoutingTrace, link: LinkModel, policy: str, share: float
) -> None:
    _, (slots,) = slots_of(trace.grid, share, BYTES)
    plain = simulate(fresh(policy, trace), trace.grid, trace.accesses(), slots, expert_bytes=BYTES)
    found = timed(trace, policy, share, link=link)
    assert_accounted(found, trace)
    assert tuple(found.resident) == plain.hits_by_position
    assert tuple(found.missed) == plain.misses_by_position
    assert found.evictions == plain.evictions
    assert found.bytes_read == found.bytes_needed == plain.bytes_read


@settings(max_examples=30, deadline=None)
@given(
    trace=traces,
    link=links,
    policy=st.sampled_from(POLICIES),
    share=st.floats(0.1, 0.9),
    recall=st.sampled_from([0.5, 0.8, 1.0]),
    lookahead=st.integers(1, 3),
    trial=st.booleans(),
)
def test_whatever_is_forecast_all_is_accounted_for_and_the_log_replays(
    trace: RoutingTrace,
    link: LinkModel,
    policy: str,
    share: float,
    recall: float,
    lookahead: int,
    trial: bool,
) -> None:
    log: list[tuple[Any, ...]] = []
    ahead = forecasting(trace, recall, lookahead=lookahead)
    ahead = Forecasting(predictor=ahead.predictor, rules=ahead.rules, trial=trial)
    found = timed(trace, policy, share, link=link, forecasting=ahead, log=log)
    assert_accounted(found, trace)
    assert found.seconds == pytest.approx(found.call_seconds.sum())
    assert (found.call_seconds > 0).all()
    assert 0 <= found.stall_seconds.sum() <= found.seconds
    assert found.link_seconds <= found.seconds + 1.0 / link.bytes_per_second * SIZE * EXPERTS

    group_of, slots = slots_of(trace.grid, share, BYTES)
    cache = ExpertCache(trace.grid, group_of, slots, fresh(policy, trace))
    assert replay_log(cache, log, lambda position, _: BYTES[position]) == found.bytes_read
    cache.check_integrity()
    counters = cache.counters
    np.testing.assert_array_equal(counters.hits, found.resident + found.in_time)
    np.testing.assert_array_equal(counters.late, found.late)
    np.testing.assert_array_equal(counters.misses, found.missed + found.late)
    np.testing.assert_array_equal(counters.ahead, found.ahead)
    assert counters.evictions == found.evictions


def test_who_knows_the_run_and_has_a_fast_link_waits_for_nothing_but_a_calls_first_layer() -> None:
    trace = batched(planted_trace(tokens=60), [1])
    plain = timed(trace, link=FAST)
    found = timed(trace, link=FAST, forecasting=forecasting(trace, lookahead=1))
    # The first calls tell what there is to spare; from then on each layer is there before its turn.
    assert plain.missed[1:].sum() > 10 * LAYERS
    assert found.missed[1:].sum() + found.late[1:].sum() <= 3 * LAYERS
    assert found.stall_seconds.sum() < 1e-9
    assert found.unused.sum() == found.withdrawn.sum() == 0


def test_with_nothing_to_spare_nothing_is_loaded_ahead() -> None:
    trace = batched(planted_trace(tokens=40), [1])
    idle = ComputeModel()  # computing takes no time, so the link is never free before a layer
    for policy in POLICIES:
        plain = timed(trace, policy, compute=idle)
        ahead = Forecasting(
            predictor=PreGatePredictor(trace, 0.5), rules=PlannerRules(lookahead=1, hold=1.0)
        )
        found = timed(trace, policy, compute=idle, forecasting=ahead)
        assert not found.ahead.any()
        np.testing.assert_array_equal(found.resident, plain.resident)
        assert found.bytes_read == plain.bytes_read
        assert found.evictions == plain.evictions
        assert found.seconds == pytest.approx(plain.seconds)


def test_time_is_what_the_models_say() -> None:
    trace = batched(planted_trace(tokens=1), [1])
    compute = ComputeModel(layer=1.0, layer_token=0.5, expert=0.25, expert_token=0.125, call=2.0)
    link = LinkModel(bytes_per_second=SIZE / 4, latency=1.0)  # five seconds a transfer
    found = timed(trace, compute=compute, link=link, share=1.0)
    experts = found.uses
    # Each layer: its dense part, then for each of its experts a transfer beside which the experts
    # before it are computed, and at the end the last expert's own time.
    assert found.seconds == pytest.approx(LAYERS * (1.5 + 0.375) + 5 * experts + 2)
    each = experts // LAYERS
    assert found.stall_seconds.sum() == pytest.approx(5 * experts - 0.375 * LAYERS * (each - 1))


def test_a_forecast_costs_what_the_model_says() -> None:
    trace = batched(planted_trace(tokens=20), [1])
    keep = forecasting(trace, lookahead=1, prefetch=False)
    free = timed(trace, share=1.0, link=FAST, forecasting=keep)
    costly = ComputeModel(layer=2e-3, expert=1e-3, expert_token=1e-4, call=1e-3, forecast=0.01)
    found = timed(trace, share=1.0, link=FAST, compute=costly, forecasting=keep)
    assert found.predictor_seconds == pytest.approx(0.01 * LAYERS * 20)
    assert found.seconds == pytest.approx(free.seconds + found.predictor_seconds)
    # Where the link is busy anyway, forecasting goes on beside it.
    slow = timed(trace, share=1.0, compute=costly, forecasting=keep)
    assert slow.seconds < timed(trace, share=1.0).seconds + slow.predictor_seconds


@pytest.mark.parametrize(
    ("forecast", "least", "most"),
    # What takes far longer than a step is told what happens twice, and then not tried at all.
    [(5e-4, 0.9, 0.98), (2e-3, 1.0, 1.02), (5e-3, 1.0, 1.02), (0.05, 1.0, 1.1)],
)
def test_the_trial_keeps_what_pays_and_gives_up_what_only_costs(
    forecast: float, least: float, most: float
) -> None:
    trace = batched(planted_trace(tokens=400), [1])
    costly = ComputeModel(layer=2e-3, expert=1e-3, forecast=forecast)
    one = forecasting(trace, lookahead=1)
    plain, always = timed(trace, compute=costly), timed(trace, compute=costly, forecasting=one)
    tried = timed(
        trace, compute=costly,
        forecasting=Forecasting(predictor=one.predictor, rules=one.rules, trial=True),
    )  # fmt: skip
    assert tried.state == ("predicting" if always.seconds < plain.seconds else "plain")
    assert least <= tried.seconds / plain.seconds <= most


def test_pools() -> None:
    grid = ExpertGrid(layers=(0, 1, 2), experts=(4, 8, 8))
    assert slots_of(grid, 0.5, (9, 9, 9)) == ((0, 0, 0), (10,))
    assert slots_of(grid, 0.5, (9, 9, 9), per_layer=True) == ((0, 1, 2), (4, 3, 3))
    assert slots_of(grid, 1.0, (9, 9, 9), per_layer=True) == ((0, 1, 2), (4, 8, 8))
    assert slots_of(grid, 0.5, (9, 7, 9)) == ((1, 0, 1), (4, 6))
    with pytest.raises(BudgetError, match="larger budget"):
        slots_of(grid, 0.01, (9, 9, 9))
    with pytest.raises(ConfigError, match="3 layers"):
        slots_of(grid, 0.5, (9,))


def test_the_log_refuses_another_cache() -> None:
    trace = batched(planted_trace(tokens=30), [1])
    log: list[tuple[Any, ...]] = []
    timed(trace, log=log)
    group_of, (slots,) = slots_of(trace.grid, 0.3, BYTES)
    other = ExpertCache(trace.grid, group_of, [slots + 5], fresh("lru", trace))
    with pytest.raises(ConfigError, match="the run had"):
        replay_log(other, log)
    with pytest.raises(ConfigError, match=r"entry 0 .* 'elsewhere'"):
        replay_log(other, [("elsewhere", 1)])


@pytest.mark.parametrize("model", [{"latency": -1}, {"parallel": 0}, {"bytes_per_second": 0.0}])
def test_links_that_cannot_be(model: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"link|latency|parallel"):
        LinkModel(**{"bytes_per_second": 1e9, **model})
    with pytest.raises(ConfigError, match="compute model"):
        ComputeModel(layer=-1.0)
