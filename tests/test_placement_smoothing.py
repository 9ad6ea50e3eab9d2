"""How much a short trace is smoothed, and that the choice follows what is held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.instance import make_instance
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.smoothing import (
    LEVELS,
    Smoothing,
    choose_smoothing,
    folds,
    level_called,
)
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace
from planted import planted_trace


@pytest.mark.parametrize("sequences", [1, 2, 3, 7])
def test_parts_cover_every_row_once_and_do_not_cut_sequences(sequences: int) -> None:
    trace, _ = planted_trace(2, 8, 2, tokens=70, sequences=sequences)
    parts = folds(trace)
    assert sorted(np.concatenate(parts).tolist()) == list(range(70))
    assert len(parts) >= 3
    if sequences >= 3:
        of_part = [set(trace.sequence_ids[rows].tolist()) for rows in parts]
        assert sum(len(each) for each in of_part) == sequences


@pytest.mark.parametrize(
    ("costs", "chosen"),
    [
        ({"none": 0.5, "some": 0.4, "strong": 0.6}, "some"),
        ({"none": 0.3, "some": 0.4, "strong": 0.6}, "none"),
        ({"none": 0.5, "some": 0.5, "strong": 0.5}, "strong"),
    ],
)
def test_the_strongest_of_the_best_levels_is_taken(costs: dict[str, float], chosen: str) -> None:
    trace, _ = planted_trace(2, 8, 2, tokens=80)
    tested: list[int] = []

    def fit(train: RoutingTrace, level: Smoothing):  # type: ignore[no-untyped-def]
        def measure(test: RoutingTrace) -> float:
            assert not set(train.sequence_ids.tolist()) & set(test.sequence_ids.tolist())
            tested.append(len(test))
            return costs[level.name]

        return measure

    level, means = choose_smoothing(trace, fit)
    assert level.name == chosen
    assert means == pytest.approx(costs)
    assert sum(tested) == len(LEVELS) * len(trace)


def test_long_traces_are_not_smoothed() -> None:
    trace, _ = planted_trace(2, 8, 2, tokens=20_001)

    def fit(train: RoutingTrace, level: Smoothing):  # type: ignore[no-untyped-def]
        raise AssertionError("not asked")

    assert choose_smoothing(trace, fit) == (LEVELS["none"], {})


def test_levels_count_as_they_say() -> None:
    trace, _ = planted_trace(5, 8, 2, tokens=60)
    trace = replace(trace, token_ids=(np.arange(60) % 4).astype(np.int32))
    strong = LEVELS["strong"].count(trace)
    assert len(strong.hops) == len(LEVELS["strong"].lag_weights)
    # Each of four tokens occurs 15 times, so that each row counts one over the root of 15.
    plain = affinity_of(trace)
    np.testing.assert_allclose(strong.hops[0][1], plain.hops[0][1] / 15**0.5)
    problem = Problem(layer_ids=trace.layer_ids, experts=trace.experts, topology=Topology.of(2))
    level = LEVELS["strong"]
    instance = make_instance(problem, strong, lag_weights=level.lag_weights, power=level.power)
    assert {b - a for a, b, _ in instance.pairs} == {1, 2, 3}
    assert sum(float(m.sum()) for _, _, m in instance.pairs) == pytest.approx(instance.total)


def test_unknown_levels_are_named() -> None:
    with pytest.raises(PlanError, match="known: auto, none, some, strong"):
        level_called("much")
