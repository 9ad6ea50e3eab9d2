"""Counting a trace, against counting token by token; what a trace's affinity is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moe_runtime.placement import affinity as module
from moe_runtime.placement.affinity import (
    Affinity,
    affinity_of,
    repeated_tokens,
    shuffled,
    support_of,
)

from moe_runtime.errors import PlanError, TraceError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace
from planted import planted_trace, random_traces, trace_of


def uses_of(trace: RoutingTrace, row: int, layer: int, weighted: bool) -> list[tuple[int, float]]:
    """(expert, what the use counts) of one token in one layer."""
    return [
        (int(expert), float(weight) if weighted else 1.0)
        for expert, weight in zip(
            trace.topk_ids[row, layer], trace.topk_weights[row, layer], strict=True
        )
        if expert != UNUSED
    ]


def counted_by_token(
    trace: RoutingTrace, first: int, second: int, weighted: bool, rows: np.ndarray
) -> np.ndarray:
    counts = np.zeros((trace.experts[first], trace.experts[second]))
    for row in range(len(trace)):
        for e, mine in uses_of(trace, row, first, weighted):
            for f, theirs in uses_of(trace, row, second, weighted):
                counts[e, f] += rows[row] * mine * theirs
    return counts


def same(one: Affinity, other: Affinity) -> None:
    for mine, theirs in zip(one.load, other.load, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-9)
    for mine, theirs in zip(one.together, other.together, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-9)
    for mine_of_lag, theirs_of_lag in zip(one.hops, other.hops, strict=True):
        for mine, theirs in zip(mine_of_lag, theirs_of_lag, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    trace=random_traces(),
    weighted=st.booleans(),
    by_row=st.booleans(),
    lags=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_counts_are_those_of_every_token(
    trace: RoutingTrace, weighted: bool, by_row: bool, lags: int, seed: int
) -> None:
    assume(trace.topk_weights.any() or not weighted)
    rows = np.random.default_rng(seed).random(len(trace)) if by_row else np.ones(len(trace))
    counts = affinity_of(
        trace, weighted=weighted, lags=lags, token_weights=rows if by_row else None
    )
    layers = len(trace.layer_ids)
    assert counts.layer_ids == trace.layer_ids
    assert counts.experts == trace.experts
    assert counts.tokens == len(trace)
    assert counts.weighted == weighted
    for layer in range(layers):
        load = np.zeros(trace.experts[layer])
        for row in range(len(trace)):
            for expert, weight in uses_of(trace, row, layer, weighted):
                load[expert] += rows[row] * weight
        np.testing.assert_allclose(counts.load[layer], load, atol=1e-9)
        together = counted_by_token(trace, layer, layer, weighted, rows)
        np.fill_diagonal(together, 0.0)
        np.testing.assert_allclose(counts.together[layer], together, atol=1e-9)
    assert len(counts.hops) == min(lags, layers - 1)
    for lag, hops in enumerate(counts.hops, 1):
        assert len(hops) == layers - lag
        for layer, hop in enumerate(hops):
            naive = counted_by_token(trace, layer, layer + lag, weighted, rows)
            np.testing.assert_allclose(hop, naive, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(trace=random_traces(least_layers=2), weighted=st.booleans(), cells=st.integers(1, 40))
def test_parts_and_order_of_a_trace_do_not_matter(
    trace: RoutingTrace, weighted: bool, cells: int
) -> None:
    rows = np.linspace(0.5, 2.0, len(trace))
    whole = affinity_of(trace, weighted=weighted, lags=2, token_weights=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_CELLS", cells)
        same(affinity_of(trace, weighted=weighted, lags=2, token_weights=rows), whole)
    order = np.random.default_rng(cells).permutation(len(trace))
    mixed = replace(trace, topk_ids=trace.topk_ids[order], topk_weights=trace.topk_weights[order])
    same(affinity_of(mixed, weighted=weighted, lags=2, token_weights=rows[order]), whole)


def test_a_row_that_counts_two_is_a_row_twice() -> None:
    trace, _ = planted_trace(3, 8, 2, tokens=60)
    twice = RoutingTrace.concat([trace, trace])
    same(affinity_of(trace, token_weights=np.full(60, 2.0)), affinity_of(twice))
    same(
        affinity_of(trace, weighted=True, token_weights=np.full(60, 2.0)),
        affinity_of(twice, weighted=True),
    )


def test_a_shuffled_trace_keeps_popularity_and_has_no_affinity() -> None:
    trace, _ = planted_trace(4, 16, 4, tokens=3000, stay=0.9, heavy=0.8)
    control = shuffled(trace, seed=3)
    before, after = affinity_of(trace, weighted=True), affinity_of(control, weighted=True)
    for mine, theirs in zip(before.load, after.load, strict=True):
        np.testing.assert_allclose(mine, theirs)
    for mine, theirs in zip(before.together, after.together, strict=True):
        np.testing.assert_allclose(mine, theirs)  # what one layer chose stays one row
    support = support_of(trace)
    assert support.excess > 0.5
    assert support.excess_shuffled < 0.1
    assert np.array_equal(control.topk_ids, shuffled(trace, seed=3).topk_ids)
    assert not np.array_equal(control.topk_ids, shuffled(trace, seed=4).topk_ids)


@pytest.mark.parametrize("sequences", [3, 20])
def test_support_of_a_trace(sequences: int) -> None:
    """3 sequences: blocks of rows are drawn; 20: sequences."""
    trace, _ = planted_trace(3, 16, 4, tokens=1600, stay=0.6, sequences=sequences)
    support = support_of(trace)
    assert support.tokens == 1600
    assert support.sequences == sequences
    assert support.pairs_a_cell == pytest.approx(1600 * 2 * 2 / (16 * 16))
    low, high = support.interval
    assert 0 <= low <= support.excess <= high <= 1
    assert 0 < high - low < 0.1
    assert low > support.excess_shuffled
    assert support == support_of(trace)


def test_the_interval_is_wider_where_there_are_fewer_tokens() -> None:
    widths = []
    for tokens in (200, 3200):
        trace, _ = planted_trace(3, 8, 2, tokens=tokens, stay=0.6)
        low, high = support_of(trace).interval
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


@settings(max_examples=30, deadline=None)
@given(trace=random_traces())
def test_repeated_tokens_count_by_the_root(trace: RoutingTrace) -> None:
    weights = repeated_tokens(trace)
    tokens = trace.token_ids.tolist()
    for row, token in enumerate(tokens):
        expected = 1.0 if token < 0 else tokens.count(token) ** -0.5
        assert weights[row] == pytest.approx(expected)


def test_counts_without_tokens_know_the_load_only() -> None:
    trace, _ = planted_trace(3, 8, 2, tokens=100)
    known, full = affinity_of(RoutingCounts.from_trace(trace)), affinity_of(trace)
    for mine, theirs in zip(known.load, full.load, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert known.hops == ()
    assert known.together == ()
    with pytest.raises(PlanError, match=r"counts without tokens.*--objective load"):
        known.transitions  # noqa: B018


def test_pairs_need_two_layers() -> None:
    trace, _ = planted_trace(1, 8, 2, tokens=50)
    with pytest.raises(PlanError, match="this is one layer"):
        affinity_of(trace).transitions  # noqa: B018
    two, _ = planted_trace(2, 8, 2, tokens=50)
    assert affinity_of(two).pairs == 50 * 4


def test_what_cannot_be_counted() -> None:
    trace, _ = planted_trace(2, 4, 2, tokens=6)
    with pytest.raises(TraceError, match="no tokens"):
        affinity_of(trace[:0])
    with pytest.raises(PlanError, match=r"each of 6 rows, found shape \(5,\)"):
        affinity_of(trace, token_weights=np.ones(5))
    weights = np.full(trace.topk_ids.shape, 0.5)
    for bad in (np.nan, np.inf, -1.0):
        weights[4, 1, 0] = bad
        wrong = trace_of(trace.topk_ids, trace.experts, weights=weights, first_layer=7)
        with pytest.raises(TraceError, match=f"row 4, layer 8 is {bad}"):
            affinity_of(wrong, weighted=True)
        same(affinity_of(wrong), affinity_of(trace))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_loads_are_checked(bad: float) -> None:
    with pytest.raises(PlanError, match=f"layer 5 expert 2: .*found {bad}"):
        Affinity(layer_ids=(5,), experts=(4,), load=(np.array([1.0, 0.0, bad, 2.0]),))
    with pytest.raises(PlanError, match=r"layer 5: load has shape \(3,\) for 4 experts"):
        Affinity(layer_ids=(5,), experts=(4,), load=(np.ones(3),))


def test_weights_that_were_not_recorded_are_not_counted_by() -> None:
    trace, _ = planted_trace(3, 8, 2)
    blank = replace(trace, topk_weights=np.zeros_like(trace.topk_weights))
    assert affinity_of(blank).pairs > 0
    with pytest.raises(TraceError, match="no routing weights"):
        affinity_of(blank, weighted=True)


def test_pairs_inside_layers_are_left_out_on_request() -> None:
    counts = affinity_of(planted_trace(3, 8, 2)[0], within=False)
    assert not counts.together
    assert counts.pairs > 0
