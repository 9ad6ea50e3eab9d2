"""Predictors: the protocol, learning on, reset, files, and that each finds what it is made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_runtime.predictors import StepRows, load_predictor, save_predictor
from moe_runtime.predictors.baselines import AsLayerBefore, AsTokenBefore
from moe_runtime.predictors.calibration import monotone
from moe_runtime.predictors.files import predictor_class
from moe_runtime.predictors.history import RunHistory, multi_hot
from moe_runtime.predictors.logistic import fit_logistic
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.rates import Rates, shrunk
from moe_runtime.predictors.replay import as_decode, put_together, replay

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

KINDS = ("popularity", "previous-token", "token-table", "pair-counts", "transition")
LAYERS, EXPERTS, TOP_K, VOCABULARY = 3, 12, 2, 20


def made_trace(
    tokens: int = 160, *, seed: int = 0, sequences: int = 4, **how: float
) -> RoutingTrace:
    """Routing with known causes: by token id, by the token before, by the layer before.

    `how` gives each cause's probability; what is left is even chance.
    """
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(99)  # the same for all seeds: the model
    by_token = world.integers(EXPERTS, size=(VOCABULARY, LAYERS, TOP_K))
    by_layer = np.stack([world.permutation(EXPERTS) for _ in range(LAYERS)])
    ids = np.zeros((tokens, LAYERS, TOP_K), np.int64)
    token_ids = rng.integers(VOCABULARY, size=tokens)
    sequence = np.sort(np.arange(tokens) % sequences)
    for row in range(tokens):
        for layer in range(LAYERS):
            cause = rng.random()
            for slot in range(TOP_K):
                chosen = int(rng.integers(EXPERTS))
                if cause < how.get("token", 0):
                    chosen = int(by_token[token_ids[row], layer, slot])
                elif cause < how.get("token", 0) + how.get("before", 0) and row:
                    chosen = int(ids[row - 1, layer, slot])
                elif cause > 1 - how.get("layer", 0) and layer:
                    chosen = int(by_layer[layer][ids[row, layer - 1, slot]])
                while slot and chosen == ids[row, layer, 0]:
                    chosen = (chosen + 1) % EXPERTS
                ids[row, layer, slot] = chosen
    return as_decode(
        RoutingTrace(
            topk_ids=ids.astype(np.uint16),
            topk_weights=np.full(ids.shape, 0.5, np.float16),
            token_ids=token_ids.astype(np.int32),
            sequence_ids=sequence.astype(np.int32),
            positions=np.arange(tokens, dtype=np.int32),
            phase=np.ones(tokens, np.uint8),
            step_ids=np.arange(tokens, dtype=np.int32),
            layer_ids=(1, 2, 5),
            experts=(EXPERTS,) * LAYERS,
            model_id="made",
            fingerprint="f00d",
        )
    )


def fitted(kind: str, trace: RoutingTrace) -> Any:
    made: Any = predictor_class(kind)
    return made.fit([trace])


def unfitted(kind: str, trace: RoutingTrace) -> Any:
    made: Any = predictor_class(kind)
    return made.unfitted(Origin.empty(trace))


def recall(predictor: Any, trace: RoutingTrace, *, first: int = 0) -> float:
    """At k, next layer, layers from position `first` on."""
    hits = []
    for one in replay(predictor, trace):
        if one.position >= first:
            top = np.argsort(-one.probabilities, axis=1, kind="stable")[:, :TOP_K]
            hits.append((top[:, :, None] == one.topk_ids[:, None, :]).any(axis=2).mean())
    return float(np.mean(hits))


MIXED = made_trace(200, token=0.4, before=0.2, layer=0.3)
OTHER = made_trace(80, seed=1, token=0.4, before=0.2, layer=0.3)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def mixed() -> dict[str, Any]:
    return {kind: fitted(kind, MIXED) for kind in KINDS}


def forecasts(predictor: Any, trace: RoutingTrace) -> list[np.ndarray]:
    return [one.probabilities.copy() for one in replay(predictor, trace, 2)]


def test_forecasts_are_calibrated_probabilities(kind: str, mixed: dict[str, Any]) -> None:
    held = made_trace(200, seed=2, token=0.4, before=0.2, layer=0.3)
    said, came = [], []
    for one in replay(mixed[kind], held):
        assert one.probabilities.dtype == np.float32
        assert ((one.probabilities >= 0) & (one.probabilities <= 1)).all()
        said.append(one.probabilities.ravel())
        came.append(multi_hot(one.topk_ids, EXPERTS).ravel())
    p, y = np.concatenate(said), np.concatenate(came)
    assert p.mean() == pytest.approx(TOP_K / EXPERTS, abs=0.02)
    high = p > np.quantile(p, 0.9)
    assert p[high].mean() == pytest.approx(y[high].mean(), abs=0.1)


def test_the_same_calls_give_the_same_bits(
    kind: str, mixed: dict[str, Any], tmp_path: Path
) -> None:
    first = forecasts(mixed[kind], OTHER)
    again = forecasts(mixed[kind], OTHER)  # replay resets: the run before must have left nothing
    loaded = load_predictor(save_predictor(mixed[kind], tmp_path / "p.safetensors"))
    assert loaded.kind == kind
    for a, b, c in zip(first, again, forecasts(loaded, OTHER), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-5)  # shares are stored in single precision


def test_predicting_changes_nothing(kind: str, mixed: dict[str, Any]) -> None:
    once = [p for one, p in zip(replay(mixed[kind], OTHER, 2), forecasts(mixed[kind], OTHER),
            strict=False) if one.distance == 1]  # fmt: skip
    sparse = [one.probabilities for one in replay(mixed[kind], OTHER, 1)]
    assert len(sparse) >= len(once) > 0
    full = [one.probabilities.copy() for one in replay(mixed[kind], OTHER, 2) if one.distance == 1]
    for a, b in zip(sparse, full, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_learns_from_its_run(kind: str) -> None:
    causes = {"popularity": {}, "previous-token": {"before": 0.8}, "token-table": {"token": 0.8}}
    how = causes.get(kind, {"layer": 0.9})
    trace = made_trace(300, seed=3, sequences=1, **how)
    if kind == "popularity":  # a router that has favourites
        ids = trace.topk_ids % 2 + np.array([8, 10], np.uint16)
        trace = RoutingTrace(**{**trace.columns(), "topk_ids": ids}, **trace.description())
    first = 1 if how == {"layer": 0.9} else 0
    early = recall(unfitted(kind, trace), trace[:2], first=first)
    late = recall(unfitted(kind, trace), trace, first=first)
    assert late > early + 0.02
    assert late > TOP_K / EXPERTS + 0.1


@pytest.mark.parametrize(
    ("kind", "how", "least"),
    [
        ("previous-token", {"before": 0.9}, 0.75),
        ("token-table", {"token": 0.9}, 0.75),
        ("pair-counts", {"layer": 0.95}, 0.6),
        ("transition", {"layer": 0.95}, 0.7),
        ("transition", {"token": 0.9}, 0.7),
    ],
)
def test_it_finds_its_cause(kind: str, how: dict[str, float], least: float) -> None:
    found = recall(fitted(kind, made_trace(300, **how)), made_trace(60, seed=4, **how), first=1)
    assert found > least


def test_the_chosen_set_says_more_than_its_members() -> None:
    """The next expert is the exclusive or of two: no single one says anything about it."""
    rng = np.random.default_rng(5)

    def trace(tokens: int) -> RoutingTrace:
        bits = rng.integers(2, size=(tokens, 2))
        first = np.stack([bits[:, 0], 2 + bits[:, 1]], axis=1)
        second = np.stack([bits[:, 0] ^ bits[:, 1], np.full(tokens, 2)], axis=1)
        base = made_trace(tokens)
        ids = np.stack([first, second, second], axis=1).astype(np.uint16)
        columns = {**base.columns(), "topk_ids": ids, "token_ids": np.full(tokens, -1, np.int32)}
        return RoutingTrace(**columns, **base.description())

    known, held = trace(200), trace(60)

    def share(kind: str) -> float:
        right = [
            (one.probabilities[0, :2].argmax() == one.topk_ids[0, 0])
            for one in replay(fitted(kind, known), held)
            if one.position == 1
        ]
        return float(np.mean(right))

    assert share("transition") > 0.95
    assert share("pair-counts") < 0.9  # the best linear rule is right in three of four cases


def test_batches_give_each_row_its_own_past(kind: str, mixed: dict[str, Any]) -> None:
    together = put_together(OTHER, 4)
    predictor = mixed[kind]
    for one in replay(predictor, together):
        assert one.probabilities.shape == (len(one.rows), EXPERTS)
    sizes = np.unique(together.step_ids, return_counts=True)[1]
    assert set(sizes.tolist()) == {4}
    assert len(together) == len(OTHER)
    # Every sequence keeps its rows in order.
    for sequence in np.unique(OTHER.sequence_ids).tolist():
        np.testing.assert_array_equal(
            OTHER.select(sequences=[sequence]).topk_ids,
            together.select(sequences=[sequence]).topk_ids,
        )


def test_no_token_ids(tmp_path: Path) -> None:
    columns = {**MIXED.columns(), "token_ids": np.full(len(MIXED), -1, np.int32)}
    blind = RoutingTrace(**columns, **MIXED.description())
    with pytest.raises(PredictorError, match="200 of 200 rows have no token id"):
        fitted("token-table", blind)
    with pytest.raises(PredictorError, match="the trace knows none"):
        forecasts(unfitted("token-table", blind), blind)
    for kind in set(KINDS) - {"token-table"}:
        assert forecasts(unfitted(kind, blind), blind[:10])


def test_what_does_not_fit_is_refused(kind: str, mixed: dict[str, Any]) -> None:
    predictor = mixed[kind]
    rows = StepRows(
        token_ids=np.array([1, 2]),
        sequence_ids=np.array([0, 1]),
        positions=np.array([0, 0]),
        decode=False,
    )
    predictor.begin_step(rows)
    with pytest.raises(PredictorError, match="in a step of 2 rows"):
        predictor.observe(0, np.zeros((3, TOP_K), np.int64))
    with pytest.raises(PredictorError, match="expert 99 observed, it has 12"):
        predictor.observe(0, np.full((2, TOP_K), 99))
    predictor.reset()


def test_baselines_repeat() -> None:
    columns = MIXED.columns()
    before = AsTokenBefore(MIXED.grid)
    for one in replay(before, MIXED):
        row = int(one.rows[0])
        if row and columns["sequence_ids"][row] == columns["sequence_ids"][row - 1]:
            expected = set(MIXED.topk_ids[row - 1, one.position].tolist())
            assert set(np.flatnonzero(one.probabilities[0] == 1).tolist()) == expected
    for one in replay(AsLayerBefore(MIXED.grid), MIXED):
        if one.position:
            expected = set(MIXED.topk_ids[int(one.rows[0]), one.position - 1].tolist())
            assert set(np.flatnonzero(one.probabilities[0] == 1).tolist()) == expected


def test_history_inside_a_prompt() -> None:
    history = RunHistory(ExpertGrid(layers=(0,), experts=(9,)))
    rows = StepRows(
        token_ids=np.arange(3),
        sequence_ids=np.array([4, 4, 6]),
        positions=np.array([0, 1, 0]),
        decode=False,
    )
    history.begin_step(rows)
    assert (history.previous(0) == -1).all()  # the layer has not run: nobody knows
    history.observe(0, np.array([[1, 2], [3, 4], [5, 6]]))
    np.testing.assert_array_equal(history.previous(0), [[-1, -1], [1, 2], [-1, -1]])
    one = StepRows(
        token_ids=np.arange(2),
        sequence_ids=np.array([6, 4]),
        positions=np.array([1, 2]),
        decode=True,
    )
    history.begin_step(one)
    np.testing.assert_array_equal(history.previous(0), [[5, 6], [3, 4]])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 5)), min_size=1, max_size=30))
def test_monotone_is_a_projection(points: list[tuple[float, float]]) -> None:
    values, weights = (np.array(column) for column in zip(*points, strict=True))
    found = monotone(values, weights)
    assert (np.diff(found) >= -1e-12).all()
    assert (found * weights).sum() == pytest.approx((values * weights).sum())
    np.testing.assert_allclose(monotone(found, weights), found, atol=1e-12)
    if (np.diff(values) >= 0).all():
        np.testing.assert_allclose(found, values, atol=1e-12)


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0.01, 0.99), st.floats(0.1, 100))
def test_shares_lie_between_prior_and_counts(hits: int, more: int, prior: float, s: float) -> None:
    trials = hits + more
    found = float(shrunk(np.array(float(hits)), float(trials), np.array(prior), s))
    if trials:
        assert min(prior, hits / trials) - 1e-9 <= found <= max(prior, hits / trials) + 1e-9
    else:
        assert found == pytest.approx(prior)
    rates = Rates([np.array([prior])], [s])
    rates.count(0, np.array([hits]), trials)
    assert rates.of(0)[0] == pytest.approx(found)
    rates.reset()
    assert rates.of(0)[0] == pytest.approx(prior)


def test_logistic_regression_finds_the_weights() -> None:
    rng = np.random.default_rng(0)
    x = np.c_[np.ones(20000), rng.normal(size=(20000, 2))]
    true = np.array([-1.0, 2.0, -0.5])
    y = (rng.random(20000) < 1 / (1 + np.exp(-x @ true))).astype(float)
    found = fit_logistic(x, y, np.ones(20000), np.zeros(3), 1e-6)
    np.testing.assert_allclose(found, true, atol=0.1)
    held_back = fit_logistic(x, y, np.ones(20000), np.zeros(3), 1e9)
    np.testing.assert_allclose(held_back, 0, atol=1e-3)


def test_a_damaged_file_is_refused_or_read(
    kind: str, mixed: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever byte is wrong: another error than ours would reach the user as a fault of ours."""
    path = save_predictor(mixed[kind], tmp_path / "p.safetensors")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for at in [*rng.integers(len(whole), size=20), *rng.integers(2500, size=40)]:
        damaged = bytearray(whole)
        damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_predictor(path)
        except PredictorError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(str(path) in text for text in refused)
