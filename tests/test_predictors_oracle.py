"""Forecasts for comparison: the oracle knows, the stand-in for a gate errs as often as told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from moe_runtime.predictors.oracle import (
    OraclePredictor,
    PreGatePredictor,
    PreviousLayerPredictor,
)
from moe_runtime.predictors.replay import replay

from moe_runtime.errors import PredictorError
from moe_runtime.trace import UNUSED
from routing_traces import EXPERTS, TOP_K, planted_trace

TRACE = planted_trace(tokens=200, layers=4)


def recalls(predictor: OraclePredictor | PreviousLayerPredictor, lookahead: int) -> list[float]:
    """Share of the chosen experts that are named, a forecast each; as many as chosen are named."""
    found = []
    for one in replay(predictor, TRACE, lookahead):
        named = one.probabilities > 0
        if named.any():
            assert (named.sum(axis=1) == TOP_K).all()
            found.append(float(np.take_along_axis(named, one.topk_ids, axis=1).mean()))
    return found


def test_the_oracle_is_right_at_any_distance() -> None:
    found = recalls(OraclePredictor(TRACE), 3)
    assert len(found) == 200 * (3 + 3 + 2 + 1)
    assert min(found) == 1


@pytest.mark.parametrize("recall", [1.0, 0.9, 0.5])
def test_the_pre_gate_is_right_as_often_as_it_says_one_layer_ahead(recall: float) -> None:
    predictor = PreGatePredictor(TRACE, recall, seed=4)
    found = recalls(predictor, 2)
    assert len(found) == 200 * 3  # nothing of the first layer, nothing farther ahead
    assert np.mean(found) == pytest.approx(recall, abs=0.04)
    assert recalls(PreGatePredictor(TRACE, recall, seed=4), 2) == found
    if recall < 1:
        assert recalls(PreGatePredictor(TRACE, recall, seed=5), 2) != found


def test_where_few_experts_are_left_none_is_named_twice_nor_a_chosen_one() -> None:
    few = planted_trace(tokens=50, experts=4, devices=1, top_k=3)
    for one in replay(PreGatePredictor(few, 0.0), few):
        chosen = np.take_along_axis(one.probabilities > 0, one.topk_ids, axis=1)
        assert not chosen.any()


def test_the_layer_before_again() -> None:
    predictor = PreviousLayerPredictor(TRACE.grid)
    for one in replay(predictor, TRACE):
        expected = np.zeros((1, EXPERTS), np.float32)
        if one.position:
            expected[0, TRACE.topk_ids[one.rows[0], one.position - 1]] = 1
        np.testing.assert_array_equal(one.probabilities, expected)


def test_calls_are_recognised_after_a_pause_and_strange_ones_refused() -> None:
    from moe_runtime.predictors.replay import steps_of

    predictor = OraclePredictor(TRACE)
    calls = [rows for rows, _ in steps_of(TRACE)]
    predictor.begin_step(calls[3])
    predictor.reset()
    predictor.begin_step(calls[120])
    assert set(np.flatnonzero(predictor.predict(2)[0])) == set(TRACE.topk_ids[120, 2].tolist())
    with pytest.raises(PredictorError, match="after its call 120"):
        predictor.begin_step(calls[3])
    with pytest.raises(PredictorError, match="before a call"):
        OraclePredictor(TRACE).predict(0)
    with pytest.raises(PredictorError, match=r"0\.\.1"):
        PreGatePredictor(TRACE, 1.5)


def test_what_was_not_chosen_is_not_named() -> None:
    ids = TRACE.topk_ids.copy()
    ids[:, 1, 1] = UNUSED
    trace = replace(TRACE, topk_ids=ids)
    for one in replay(PreGatePredictor(trace, 0.5), trace):
        assert (one.probabilities > 0).sum() <= (one.topk_ids >= 0).sum()
