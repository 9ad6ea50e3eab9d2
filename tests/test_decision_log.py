"""What the real runtime did, done again without a model: on demand by the simulators from a trace,
with predictions from the loader's log. Counts and bytes agree exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from moe_runtime.predictors.base import Predictor
from moe_runtime.predictors.oracle import OraclePredictor, PreGatePredictor
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime import prefetch_planner
from moe_runtime.cache import CacheCounters, ExpertCache
from moe_runtime.core import ExpertGrid
from moe_runtime.decision_log import replay_log
from moe_runtime.errors import ExpertReadError
from moe_runtime.eviction import make_policy
from moe_runtime.store import Bounce
from moe_runtime.timed_simulation import ComputeModel, simulate_timed
from moe_runtime.trace import RoutingTrace
from moe_runtime.virtual_link import LinkModel
from running import FailAt, generate, load
from test_recording import batch
from tiny import EXPERT_BYTES, EXPERTS, LAYERS, TinyCheckpoints

GRID = ExpertGrid(layers=tuple(range(LAYERS)), experts=(EXPERTS,) * LAYERS)
BYTES = (EXPERT_BYTES,) * LAYERS
ACT = {"trial": False, "lookahead": 2}
COUNTS = ("hits", "misses", "late", "ahead", "in_time", "unused", "withdrawn")


@pytest.fixture
def at_will(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load ahead whatever the tiny experts' transfers have been measured to leave room for."""
    choose = prefetch_planner.PrefetchPlanner.choose

    def freely(self: Any, position: int, room: float) -> list[tuple[int, int]]:
        return choose(self, position, 1e12)

    monkeypatch.setattr(prefetch_planner.PrefetchPlanner, "choose", freely)


@pytest.fixture(scope="module")
def trace(tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor) -> RoutingTrace:
    model = load(tiny_checkpoints.per_expert)
    with moe_runtime.record(model) as recorder:
        generate(model, prompt)
    return recorder.trace


def fresh_cache(model: PreTrainedModel, policy: str) -> ExpertCache:
    slots = moe_runtime.runtime_of(model).budget.slots
    return ExpertCache(GRID, (0,) * LAYERS, slots, make_policy(policy, GRID))


def nbytes_of(model: PreTrainedModel) -> Callable[[int, int], int]:
    """Bytes that reading an expert takes: whole blocks around what is stored."""
    runtime = moe_runtime.runtime_of(model)
    store = runtime.executor.fetcher._store
    sizes = {}
    for position, layer in enumerate(runtime.spec.layers):
        target = tuple(torch.empty(param.shape, dtype=param.dtype) for param in layer.params)
        for expert in range(EXPERTS):
            sizes[position, expert] = sum(
                store.read(position, expert, piece, target, Bounce(1 << 20))
                for piece in store.pieces(position, expert)
            )
    return lambda position, expert: sizes[position, expert]


def assert_same(model: PreTrainedModel, replayed: ExpertCache, nbytes: int) -> CacheCounters:
    """All counters of the run's cache and of the replay's, residents and bytes."""
    runtime = moe_runtime.runtime_of(model)
    ran, found = runtime.executor.cache.counters, replayed.counters
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name), getattr(ran, name), err_msg=name)
    assert found.evictions == ran.evictions
    assert found.ahead_evictions == ran.ahead_evictions
    assert found.rereads == ran.rereads
    np.testing.assert_array_equal(replayed.residents(), runtime.executor.cache.residents())
    assert nbytes == runtime.profiler.bytes_read.sum() + runtime.profiler.host_bytes.sum()
    replayed.check_integrity()
    return ran


@pytest.mark.parametrize("policy", ["lru", "lfu", "echo"])
def test_on_demand_the_timed_simulator_counts_as_the_run_did(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor, policy: str
) -> None:
    model = load(tiny_checkpoints.per_expert, policy=policy, preload=False)
    runtime = moe_runtime.runtime_of(model)
    runtime.executor.loader.log = log = []
    with moe_runtime.record(model) as recorder:
        generate(model, prompt)
        model.generate(**batch(), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    found = simulate_timed(
        recorder.trace,
        make_policy(policy, GRID),
        ((0,) * LAYERS, runtime.budget.slots),
        expert_bytes=BYTES,
        link=LinkModel(bytes_per_second=1e9, latency=1e-4, parallel=2),
        compute=ComputeModel(layer=1e-4, expert=1e-5),
    )
    ran = runtime.executor.cache.counters
    np.testing.assert_array_equal(found.resident, ran.hits)
    np.testing.assert_array_equal(found.missed, ran.misses)
    assert found.evictions == ran.evictions
    assert found.bytes_read == EXPERT_BYTES * ran.misses.sum()
    replayed = fresh_cache(model, policy)
    assert_same(model, replayed, replay_log(replayed, log, nbytes_of(model)))


@pytest.mark.parametrize("policy", ["lru", "echo"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("recall", [1.0, 0.5])
@pytest.mark.usefixtures("at_will")
def test_a_run_with_predictions_replays_from_its_log(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    trace: RoutingTrace,
    policy: str,
    exact: bool,
    recall: float,
) -> None:
    predictor: Predictor = OraclePredictor(trace)
    if recall < 1:
        predictor = PreGatePredictor(trace, recall, seed=1)
    model = load(
        tiny_checkpoints.per_expert,
        policy=policy,
        exact=exact,
        expert_budget="40%",
        preload=False,
        predictor=predictor,
        prediction_options=ACT,
    )
    log: list[tuple[Any, ...]] = []
    moe_runtime.runtime_of(model).executor.loader.log = log
    generate(model, prompt)
    replayed = fresh_cache(model, policy)
    ran = assert_same(model, replayed, replay_log(replayed, log, nbytes_of(model)))
    assert ran.ahead.sum() > 0
    assert ran.in_time.sum() > 0
    if recall < 1:
        assert ran.unused.sum() + ran.withdrawn.sum() > 0


@pytest.mark.usefixtures("at_will")
def test_a_failed_step_is_in_the_log(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor, trace: RoutingTrace, fail_at: FailAt
) -> None:
    model = load(
        tiny_checkpoints.per_expert,
        preload=False,
        predictor=OraclePredictor(trace),
        prediction_options=ACT,
    )
    log: list[tuple[Any, ...]] = []
    runtime = moe_runtime.runtime_of(model)
    runtime.executor.loader.log = log
    fail_at(40, lambda: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(ExpertReadError):
        generate(model, prompt)
    generate(model, prompt)
    assert ("abandon",) in log
    replayed = fresh_cache(model, "lru")
    replay_log(replayed, log)
    for name in COUNTS:
        ran = getattr(runtime.executor.cache.counters, name)
        np.testing.assert_array_equal(getattr(replayed.counters, name), ran, err_msg=name)
