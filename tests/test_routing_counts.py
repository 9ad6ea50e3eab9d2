"""Counts without tokens: what is saved comes back, sums add up, damage is named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moe_runtime import RoutingCounts, RoutingTrace, TraceError


def counts(seed: int = 0, **changes: Any) -> RoutingCounts:
    """Two layers, 3 and 5, of 4 and 6 experts."""
    random = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "counts": tuple(random.integers(0, 50, size).astype(np.float64) for size in (4, 6)),
        "layer_ids": (3, 5),
        "top_k": (2, 0),
        "tokens": 40,
        "model_id": "some/model",
        "fingerprint": "abc",
        "source": "a recorder",
    }
    return RoutingCounts(**values | changes)


def assert_equal(found: RoutingCounts, expected: RoutingCounts) -> None:
    assert found.description() == expected.description()
    assert (found.tokens, found.source) == (expected.tokens, expected.source)
    for mine, theirs in zip(found.counts, expected.counts, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**32), st.text())
def test_what_is_saved_comes_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int, name: str
) -> None:
    random = np.random.default_rng(seed)
    expected = RoutingCounts(
        counts=tuple(random.random(size) * 1e9 for size in sizes),
        layer_ids=tuple(random.permutation(100)[: len(sizes)].tolist()),
        model_id=name,
        tokens=int(random.integers(0, 10**12)),
    )
    path = tmp_path_factory.mktemp("counts") / "x.counts.safetensors"
    assert_equal(RoutingCounts.load(expected.save(path)), expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_of_a_trace_they_are_its_uses() -> None:
    ids = np.array([[[0, 2], [1, 65535]], [[2, 1], [1, 65535]]], np.uint16)
    trace = RoutingTrace(
        topk_ids=ids,
        topk_weights=np.zeros(ids.shape, np.float16),
        token_ids=np.zeros(2, np.int32),
        sequence_ids=np.zeros(2, np.int32),
        positions=np.arange(2, dtype=np.int32),
        phase=np.zeros(2, np.uint8),
        step_ids=np.zeros(2, np.int32),
        layer_ids=(4, 9),
        experts=(3, 2),
        top_k=(2, 1),
        model_id="m",
    )
    found = RoutingCounts.from_trace(trace)
    assert [layer.tolist() for layer in found.counts] == [[1, 1, 2], [0, 2]]
    assert (found.layer_ids, found.experts, found.top_k) == ((4, 9), (3, 2), (2, 1))
    assert (found.tokens, found.uses, found.model_id) == (2, 6, "m")
    assert found.shares(0).tolist() == [0.25, 0.25, 0.5]


def test_a_layer_without_uses_has_no_shares() -> None:
    assert counts(counts=(np.zeros(4), np.ones(6))).shares(0).tolist() == [0, 0, 0, 0]


def test_the_total_adds_and_knows_its_tokens_only_if_all_parts_do() -> None:
    parts = [counts(seed) for seed in range(3)]
    found = RoutingCounts.total(parts)
    for position in range(2):
        np.testing.assert_array_equal(
            found.counts[position], sum(part.counts[position] for part in parts)
        )
    assert found.tokens == 120
    assert RoutingCounts.total([counts(), counts(tokens=0)]).tokens == 0
    assert RoutingCounts.total([counts(), counts(source="b")]).source == "a recorder, b"
    with pytest.raises(TraceError, match="counts 1 have another model_id"):
        RoutingCounts.total([counts(), counts(model_id="other")])
    with pytest.raises(TraceError, match="nothing to sum"):
        RoutingCounts.total([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_ids": (3, 3)}, "distinct"),
        ({"layer_ids": (3,)}, "counts names 2 layers, but layer_ids has 1"),
        ({"layer_ids": (), "counts": (), "top_k": ()}, "one MoE layer at least"),
        ({"experts": (4, 7)}, r"layer 5 must have shape \[E\] with E = 7"),
        ({"top_k": (2, 7)}, "top_k of layer 5 must be 0 to 6"),
        ({"tokens": -1}, "tokens must be 0"),
        ({"counts": (np.ones(4), np.array([1.0, np.nan] + [0] * 4))}, "layer 5 expert 1.*nan"),
        ({"counts": (np.ones(4), np.array([1.0, -2] + [0] * 4))}, r"layer 5 expert 1.*-2\.0"),
        ({"counts": (np.ones(4), np.ones(6, np.int64))}, "layer 5 must be.*float64, found int64"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        counts(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(format="other"), "'format' is 'other'"),
        (lambda t, h: h.update(version="2"), "'version' is '2'"),
        (lambda t, h: h.pop("tokens"), "'tokens' is missing"),
        (lambda t, h: h.update(tokens="true"), "'tokens' is missing or damaged"),
        (lambda t, h: h.update(experts="[4, 5]"), "2 layers of 9 experts"),
        (lambda t, h: h.update(experts="[4, 6.0]"), "'experts' is missing or damaged"),
        (lambda t, h: h.pop("source"), "'source' is missing"),
        (lambda t, h: t.update(counts=t["counts"].astype(np.float32)), "must be float64"),
        (lambda t, h: t.update(other=t.pop("counts")), "'counts' is missing"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], None], message: str
) -> None:
    path = counts().save(tmp_path / "x.counts.safetensors")
    with safe_open(path, framework="numpy") as file:
        header = dict(file.metadata())
    tensors: dict[str, Any] = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    with pytest.raises(TraceError, match=message) as caught:
        RoutingCounts.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_trace_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        RoutingCounts.load(tmp_path / "none")
    with pytest.raises(TraceError, match="not a complete safetensors file"):
        RoutingCounts.load(tmp_path)


@given(st.data())
def test_damaged_bytes_are_named_or_give_valid_counts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = counts().save(tmp_path_factory.mktemp("counts") / "x.counts.safetensors")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(TraceError):  # nothing else may come out
        assert replace(RoutingCounts.load(path), tokens=1).tokens == 1
