"""Predictor files: what is saved comes back, and what does not fit is refused with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_runtime.predictors import load_predictor, save_predictor
from moe_runtime.predictors.files import KINDS
from moe_runtime.predictors.frequency import PopularityPredictor
from moe_runtime.predictors.origin import Origin, require_held_out, row_hashes
from safetensors import safe_open
from safetensors.numpy import save_file

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import PredictorError, TraceError
from routing_traces import planted_trace

TRACE = planted_trace(tokens=240)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_predictor(PopularityPredictor.fit([TRACE]), tmp_path / "p.predictor.safetensors")


def rewrite(path: Path, *, header: dict[str, Any] | None = None, **arrays: Any) -> None:
    """The same file with other header fields or arrays; None takes one away."""
    with safe_open(path, framework="numpy") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fields = {**file.metadata(), **(header or {})}
    held = {n: a for n, a in {**held, **arrays}.items() if a is not None}
    save_file(held, path, metadata={n: v for n, v in fields.items() if v is not None})


def test_what_is_saved_comes_back(path: Path) -> None:
    fitted = PopularityPredictor.fit([TRACE])
    loaded = load_predictor(path, fingerprint="f00d", grid=TRACE.grid)
    assert isinstance(loaded, PopularityPredictor)
    assert loaded.origin.model_id == "planted"
    assert loaded.origin.layer_ids == TRACE.layer_ids
    np.testing.assert_array_equal(loaded.origin.fitted_on, fitted.origin.fitted_on)
    first, second = fitted.to_arrays(), loaded.to_arrays()
    assert first[1] == second[1]
    np.testing.assert_array_equal(first[0]["popularity"], second[0]["popularity"])
    assert not list(path.parent.glob("*.tmp*"))


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"format": "moe-runtime.trace"}, "'format' is 'moe-runtime.trace'.*no predictor"),
        ({"version": "2"}, "'version' is '2', this release reads 1"),
        ({"kind": "oracle"}, "kind 'oracle', this release knows popularity"),
        ({"layer_ids": None}, "'layer_ids' is missing"),
        ({"layer_ids": '["a"]'}, "no list of integers"),
        ({"layer_ids": "[1, 2]"}, "2 layer_ids, 4 experts"),
        ({"top_k": "[2, 2, 2, 99]"}, "16 experts and top_k 99"),
        ({"constants": "[]"}, "'constants' is no JSON object"),
        ({"constants": "{}"}, "'popularity_strength' is missing"),
        ({"constants": "{"}, "p.predictor.safetensors: "),
        ({"constants": '{"popularity_strength": -1}'}, "strength above 0"),
        ({"figures": None}, "'figures' is missing"),
    ],
)
def test_a_damaged_header_is_named(path: Path, header: dict[str, Any], found: str) -> None:
    rewrite(path, header=header)
    with pytest.raises(PredictorError, match=found) as error:
        load_predictor(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (None, "array 'popularity' is missing"),
        (np.zeros(3, np.float32), "must be float32 64, found float32 3"),
        (np.zeros(64, np.int64), "must be float32 64, found int64 64"),
        (np.full(64, np.nan, np.float32), "'popularity' holds nan at"),
        (np.full(64, 2.0, np.float32), "0 to 1"),
    ],
)
def test_a_damaged_array_is_named(path: Path, array: Any, found: str) -> None:
    rewrite(path, popularity=array)
    with pytest.raises(PredictorError, match=found):
        load_predictor(path)


def test_no_file_and_half_a_file(path: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="no such predictor; check the path"):
        load_predictor(tmp_path / "nothing")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PredictorError, match="not a complete safetensors file"):
        load_predictor(path)
    path.write_text("pickle me")
    with pytest.raises(PredictorError, match="not a complete safetensors file"):
        load_predictor(path)


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(PredictorError, match="fingerprint 'f00d', the model at hand has 'beef'"):
        load_predictor(path, fingerprint="beef")
    other = ExpertGrid(layers=(1, 2, 3, 4), experts=(16, 16, 16, 8))
    with pytest.raises(PredictorError, match="made for layers"):
        load_predictor(path, grid=other)
    origin = load_predictor(path).origin
    with pytest.raises(PredictorError, match="layer_ids"):
        origin.require_trace(planted_trace(tokens=10, first_layer=0))
    with pytest.raises(PredictorError, match="fingerprint"):
        origin.require_trace(planted_trace(tokens=10, fingerprint="beef"))
    origin.require_trace(planted_trace(tokens=10, fingerprint=""))


def test_nothing_to_fit() -> None:
    for traces in ([], [TRACE[:0]]):
        with pytest.raises(PredictorError, match="record some text"):
            Origin.of(traces)
    with pytest.raises(TraceError, match="another fingerprint"):
        Origin.of([TRACE, planted_trace(tokens=9, fingerprint="beef")])


def test_rows_that_were_fitted_to_are_recognised() -> None:
    origin = Origin.of([TRACE])
    require_held_out(origin, planted_trace(tokens=100, seed=5))
    for part in (TRACE, TRACE.decode(), TRACE[100:130]):
        with pytest.raises(PredictorError, match="are among those"):
            require_held_out(origin, part)
    fresh = planted_trace(tokens=100, seed=5)
    shared = fresh.topk_ids.copy()
    shared[:2] = TRACE.topk_ids[:2]  # a beginning that all sequences share is no leak
    mixed = planted_trace(tokens=100, seed=5, sequences=1)
    columns = {**mixed.columns(), "topk_ids": shared}
    columns["token_ids"] = np.r_[TRACE.token_ids[:2], mixed.token_ids[2:]]
    mixed = type(mixed)(**columns, **mixed.description())
    assert np.isin(row_hashes(mixed), origin.fitted_on).sum() == 2
    require_held_out(origin, mixed)


def test_every_kind_is_named_once() -> None:
    assert len({module + name for module, name in KINDS.values()}) == len(KINDS)
    assert json.dumps(list(KINDS))
