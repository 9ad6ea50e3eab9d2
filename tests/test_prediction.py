"""Predictions move bytes earlier and nothing else: outputs are the same with any predictor, right,
wrong or broken, and every load ahead of need has one fate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_runtime.predictors.base import Predictor, Probabilities
from transformers import PreTrainedModel

import later_device
import moe_runtime
from forecasters import Breaks, Guess, Oracle
from moe_runtime import prefetch_planner
from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError, ExpertReadError, PredictorError
from moe_runtime.eviction import LeastRecentlyUsed
from moe_runtime.loader import ExpertLoader
from running import FailAt, assert_usable, generate, load
from test_device import assert_close
from test_device import logits as several_logits
from tiny import EXPERTS, LAYERS, TinyCheckpoints, tiny_model

GRID = ExpertGrid(layers=tuple(range(LAYERS)), experts=(EXPERTS,) * LAYERS)
ACT = {"trial": False, "bar": 0.2}  # act on every forecast, and easily


@pytest.fixture(autouse=True)
def no_bandwidth_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load ahead whatever the tiny experts' transfers have been measured to leave room for."""
    choose = prefetch_planner.PrefetchPlanner.choose

    def at_will(self: Any, position: int, room: float) -> list[tuple[int, int]]:
        return choose(self, position, 1e12)

    monkeypatch.setattr(prefetch_planner.PrefetchPlanner, "choose", at_will)


def prediction_of(model: PreTrainedModel) -> dict[str, Any]:
    record = moe_runtime.runtime_of(model).run_record(simulate=False)["prediction"]
    assert isinstance(record, dict)
    return record


def assert_accounted(model: PreTrainedModel) -> None:
    """Every load ahead has one fate, every use is a hit or a miss, and bytes add up."""
    runtime = moe_runtime.runtime_of(model)
    runtime.check_integrity()
    record = runtime.run_record(simulate=False)
    found, counters = record["prediction"], record["counters"]
    fates = ("in_time", "late", "unused", "withdrawn", "pending")
    assert found["loads"]["ahead"] == sum(found["loads"][fate] for fate in fates)
    assert found["loads"]["pending"] >= 0
    layers = found["layers"]
    assert sum(layer["resident"] + layer["in_time"] for layer in layers) == counters["hits"]
    assert sum(layer["missed"] + layer["late"] for layer in layers) == counters["misses"]
    assert found["bytes"]["ahead"] <= counters["bytes_read"]


@pytest.mark.parametrize("policy", ["lru", "lfu", "echo"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_guess_leaves_the_output_as_it_is(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    policy: str,
    exact: bool,
    seed: int,
) -> None:
    model = load(
        tiny_checkpoints.per_expert,
        policy=policy,
        exact=exact,
        predictor=Guess(GRID, seed),
        prediction_options=ACT,
    )
    assert torch.equal(generate(model, prompt), eager_tokens)
    assert_accounted(model)
    loads = prediction_of(model)["loads"]
    assert loads["ahead"] > 0
    assert loads["unused"] + loads["withdrawn"] > 0


def test_what_is_about_to_be_computed_keeps_its_slot(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take, seen = ExpertLoader.take_hits, []

    def watched(self: ExpertLoader, access: Access, experts: list[int]) -> list[int] | None:
        slots = take(self, access, experts)
        if slots is not None:
            seen.append(slots)
            assert self.cache.slots_of(access.position, experts) == slots
        return slots

    monkeypatch.setattr(ExpertLoader, "take_hits", watched)
    # The most recently used leaves first: no rank protects what has just been asked for.
    rank = LeastRecentlyUsed.rank
    monkeypatch.setattr(LeastRecentlyUsed, "rank", lambda self, some: -rank(self, some))
    model = load(
        tiny_checkpoints.per_expert,
        expert_budget="60%",
        predictor=Guess(GRID, 6),
        prediction_options=ACT,
    )
    for _ in range(2):
        assert torch.equal(generate(model, prompt), eager_tokens)
    assert seen
    assert_accounted(model)


def oracle_for(path: Path, prompt: torch.Tensor, **options: Any) -> Oracle:
    model = load(path, **options)
    with moe_runtime.record(model) as recorder:
        generate(model, prompt)
    return Oracle(recorder.trace)


@pytest.mark.parametrize("exact", [False, True])
def test_whoever_knows_the_run_loads_ahead_only_what_is_used(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    exact: bool,
) -> None:
    path = tiny_checkpoints.per_expert
    plain = load(path, expert_budget="40%", exact=exact)
    generate(plain, prompt)
    oracle = oracle_for(path, prompt, expert_budget="40%")
    model = load(path, expert_budget="40%", exact=exact, predictor=oracle, prediction_options=ACT)
    assert torch.equal(generate(model, prompt), eager_tokens)
    assert_accounted(model)
    found = prediction_of(model)
    assert found["loads"]["ahead"] > 0
    assert found["loads"]["unused"] == found["loads"]["withdrawn"] == 0
    recall = [share for layer in found["layers"] for share in layer["recall"] if share is not None]
    assert recall
    assert min(recall) == 1.0
    # How many arrive in time is the machine's matter; what is late was on its way at least.
    counters = moe_runtime.report(model).counters
    started = counters.hits + found["loads"]["late"]
    assert started > moe_runtime.report(plain).counters.hits


def test_batches_padding_and_several_prompts(
    tiny_checkpoints: TinyCheckpoints, expected_logits: list[torch.Tensor]
) -> None:
    model = load(tiny_checkpoints.fused, predictor=Guess(GRID, 3), prediction_options=ACT)
    assert_close(several_logits(model), expected_logits)
    plain = several_logits(load(tiny_checkpoints.fused))
    again = several_logits(model)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert_accounted(model)


@pytest.fixture(scope="module")
def expected_logits() -> list[torch.Tensor]:
    return several_logits(tiny_model())


@pytest.mark.parametrize(
    ("host_budget", "kernel", "host_execution"),
    [
        ("20%", "auto", "never"),
        ("100%", "auto", "never"),
        ("100%", "plain", "never"),
        ("60%", "plain", "always"),
    ],
)
def test_on_a_device_whose_copies_are_late(
    tiny_checkpoints: TinyCheckpoints,
    monkeypatch: pytest.MonkeyPatch,
    expected_logits: list[torch.Tensor],
    host_budget: str,
    kernel: str,
    host_execution: str,
) -> None:
    device = later_device.install(monkeypatch)
    model = moe_runtime.from_pretrained(
        tiny_checkpoints.per_expert,
        device="cuda",
        expert_budget="30%",
        host_budget=host_budget,
        predictor=Guess(GRID, 4),
        prediction_options=ACT,
        host_execution=host_execution,
    )
    moe_runtime.runtime_of(model).executor.slots.kernel = kernel
    assert_close(several_logits(model), expected_logits)
    assert device.faults == []
    assert prediction_of(model)["loads"]["ahead"] > 0
    assert_accounted(model)


def raises() -> Probabilities:
    raise RuntimeError("no idea")


def not_a_number() -> Probabilities:
    return np.full((1, EXPERTS), np.nan, np.float32)


def too_likely() -> Probabilities:
    return np.full((1, EXPERTS), 1.5, np.float32)


@pytest.mark.parametrize("act", [raises, not_a_number, too_likely])
@pytest.mark.parametrize("at", [1, 30])
def test_a_predictor_that_breaks_costs_the_forecast_only(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    caplog: pytest.LogCaptureFixture,
    act: Callable[[], Probabilities],
    at: int,
) -> None:
    model = load(
        tiny_checkpoints.per_expert, predictor=Breaks(GRID, at, act), prediction_options=ACT
    )
    assert torch.equal(generate(model, prompt), eager_tokens)
    found = prediction_of(model)
    assert found["state"] == "plain"
    assert found["failure"]
    assert found["failure"] in caplog.text
    before = found["loads"]["ahead"]
    assert_usable(model, prompt, eager_tokens)
    assert prediction_of(model)["loads"]["ahead"] == before
    assert_accounted(model)


def test_a_failed_read_ahead_of_need_is_tried_again_when_it_is_needed(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
) -> None:
    def io_error() -> int:
        raise OSError(5, "Input/output error")

    # Which read is one ahead of need is a matter of timing; about half of them are, few on a
    # busy machine.
    for number in (start + step for start in range(5, 13) for step in range(0, 200, 8)):
        model = load(
            tiny_checkpoints.per_expert, predictor=Guess(GRID, number), prediction_options=ACT
        )
        fail_at(number, io_error)
        try:
            found = generate(model, prompt)
        except ExpertReadError:
            assert_usable(model, prompt, eager_tokens)
            continue
        assert torch.equal(found, eager_tokens)
        assert_usable(model, prompt, eager_tokens)
        assert_accounted(model)
        return
    pytest.fail("no failed read was one ahead of need")


@pytest.mark.parametrize(
    ("grid", "hint"),
    [
        (ExpertGrid(layers=(0, 1, 2), experts=(16,) * 3), "3 layers"),
        (ExpertGrid(layers=(0, 1, 2, 3), experts=(16, 16, 16, 8)), r"\[8, 16\] experts"),
    ],
)
def test_a_predictor_for_other_layers_is_refused(
    tiny_checkpoints: TinyCheckpoints, grid: ExpertGrid, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        load(tiny_checkpoints.fused, predictor=Guess(grid))


def test_what_is_no_predictor_file_is_refused(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    path = tmp_path / "x.predictor.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(PredictorError, match=r"x\.predictor"):
        load(tiny_checkpoints.fused, predictor=path)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"lookahead": 0}, "lookahead"),
        ({"bar": 1.5}, "bar"),
        ({"horizon": 2}, "known"),
    ],
)
def test_options_are_checked(
    tiny_checkpoints: TinyCheckpoints, options: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        load(tiny_checkpoints.fused, predictor=Guess(GRID), prediction_options=options)
    with pytest.raises(ConfigError, match="need a predictor"):
        load(tiny_checkpoints.fused, prediction_options=options)


def test_the_plain_policy_does_not_pay_for_a_predictor_that_is_given_up(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor
) -> None:
    class Slow(Guess):
        asked = 0

        def predict(self, position: int) -> Probabilities:
            type(self).asked += 1
            return super().predict(position)

    predictor: Predictor = Slow(GRID)
    model = load(tiny_checkpoints.per_expert, predictor=predictor)
    loader = moe_runtime.runtime_of(model).executor.loader
    assert loader.prediction is not None
    payoff = loader.prediction.payoff
    for _ in range(400):
        payoff.end_step(1.5 if payoff.acts(decode=True) else 1.0, 0.0)
        if payoff.state != "trial":
            break
    assert payoff.state == "plain"
    asked = Slow.asked
    generate(model, prompt)
    assert Slow.asked == asked
    assert not loader.cache.loading_ahead(0)
