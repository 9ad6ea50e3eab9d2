"""Routing shift: equal to a naive count, 0 where nothing moved, and strict about the rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import TraceError
from moe_runtime.steering.shift import LayerShift, routing_shift
from moe_runtime.trace import UNUSED, RoutingTrace
from routing_traces import planted_trace

LAYERS, EXPERTS = 3, 6


def trace_of(ids: np.ndarray) -> RoutingTrace:
    """A recording with these choices `[N, L, K]`; tokens and places are the same for the same N."""
    rows = len(ids)
    return RoutingTrace(
        topk_ids=ids.astype(np.uint16),
        topk_weights=np.zeros(ids.shape, np.float16),
        token_ids=np.arange(rows, dtype=np.int32) % 7,
        sequence_ids=np.zeros(rows, np.int32),
        positions=np.arange(rows, dtype=np.int32),
        phase=np.zeros(rows, np.uint8),
        step_ids=np.zeros(rows, np.int32),
        layer_ids=tuple(range(2, 2 + ids.shape[1])),
        experts=(EXPERTS,) * ids.shape[1],
    )


@st.composite
def choices(draw: st.DrawFn, rows: int) -> np.ndarray:
    """Distinct experts for each token and layer, some slots unused."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = np.argsort(rng.random((rows, LAYERS, EXPERTS)), axis=2)[:, :, :3]
    return np.where(rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.2, 1.0])), UNUSED, ids)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rows = draw(st.integers(0, 40))
    first, second = draw(choices(rows)), draw(choices(rows))
    keep = np.random.default_rng(draw(st.integers(0, 99))).random(first.shape[:2]) < 0.5
    return first, np.where(keep[:, :, None], first, second)


def naive(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Changed, Jaccard and total variation of one layer, token by token in sets."""
    kept, most, jaccards = 0, 0, []
    counts = [dict.fromkeys(range(EXPERTS), 0) for _ in range(2)]
    for rows in zip(first, second, strict=True):
        a, b = ({int(e) for e in row} - {UNUSED} for row in rows)
        kept += len(a & b)
        most += max(len(a), len(b))
        jaccards.append(len(a & b) / len(a | b) if a | b else 1.0)
        for chosen, count in zip((a, b), counts, strict=True):
            for expert in chosen:
                count[expert] += 1
    sums = [sum(count.values()) for count in counts]
    if all(sums):
        shares = [[n / total for n in c.values()] for c, total in zip(counts, sums, strict=True)]
        variation = sum(abs(p - q) for p, q in zip(*shares, strict=True)) / 2
    else:
        variation = 1.0 if any(sums) else 0.0
    return (
        1 - kept / most if most else 0.0,
        sum(jaccards) / len(jaccards) if jaccards else 1.0,
        variation,
    )


@given(pairs())
@settings(max_examples=60)
def test_equals_a_naive_count_and_is_symmetric(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = routing_shift(trace_of(pair[0]), trace_of(pair[1]))
    back = routing_shift(trace_of(pair[1]), trace_of(pair[0]))
    assert found.tokens == len(pair[0])
    for at, (one, other) in enumerate(zip(found.layers, back.layers, strict=True)):
        measures = (one.changed, one.jaccard, one.total_variation)
        assert measures == pytest.approx(naive(pair[0][:, at], pair[1][:, at]))
        assert measures == pytest.approx((other.changed, other.jaccard, other.total_variation))
        assert all(0 <= value <= 1 for value in measures)


@given(pairs(), st.integers(0, 99))
@settings(max_examples=30)
def test_the_order_of_slots_does_not_count(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    first, _ = pair
    turned = np.random.default_rng(seed).permuted(first, axis=2)
    found = routing_shift(trace_of(first), trace_of(turned))
    for one in found.layers:  # exactly, not nearly
        assert (one.changed, one.jaccard, one.total_variation) == (0.0, 1.0, 0.0)
    assert found.first_changed is None
    assert found.changed == 0.0


def test_tokens_that_exchange_experts_change_choices_and_no_load() -> None:
    first = np.array([[[0, 1]], [[2, 3]]])
    found = routing_shift(trace_of(first), trace_of(first[::-1].copy())).layers[0]
    assert found == LayerShift(layer=2, changed=1.0, jaccard=0.0, total_variation=0.0)


def test_many_rows_are_compared_in_parts() -> None:
    long = planted_trace(tokens=300)
    first = RoutingTrace.concat([long] * 60)  # 18,000 rows: past one part
    moved = first.topk_ids.copy()
    moved[-1, 2, 0] = next(e for e in range(16) if e not in moved[-1, 2])
    found = routing_shift(first, replace(first, topk_ids=moved))
    assert [one.changed > 0 for one in found.layers] == [False, False, True, False]
    assert found.layers[2].changed == pytest.approx(1 / (18_000 * 2))


def test_layers_after_the_first_steered_one() -> None:
    found = routing_shift(planted_trace(), planted_trace())
    assert [one.layer for one in found.layers] == [1, 2, 3, 4]
    assert [one.layer for one in found.after([3, 2])] == [3, 4]
    assert found.after([4]) == ()
    assert found.after([]) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": 17}, r"token_ids\[17\] is .* unsteered and .* steered \(1 of 600"),
        ({"positions": 3}, r"positions\[3\]"),
        ({"sequence_ids": 0}, r"sequence_ids\[0\]"),
    ],
)
def test_other_rows_are_refused_by_place(change: dict[str, int], words: str) -> None:
    trace = planted_trace()
    (name, row), column = next(iter(change.items())), getattr(trace, next(iter(change))).copy()
    column[row] += 1
    with pytest.raises(TraceError, match=words):
        routing_shift(trace, replace(trace, **{name: column}))


def test_other_lengths_and_models_are_refused() -> None:
    trace = planted_trace()
    with pytest.raises(TraceError, match=r"600 rows unsteered, 599 steered.*read the same"):
        routing_shift(trace, trace[:599])
    with pytest.raises(TraceError, match="different fingerprint, 'f00d' and 'beef'"):
        routing_shift(trace, planted_trace(fingerprint="beef"))
    with pytest.raises(TraceError, match="different layer_ids"):
        routing_shift(trace, planted_trace(first_layer=0))
