"""Training a routing-path predictor: what it learns, splits, going on, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.predictors import Origin, load_predictor
from moe_runtime.predictors import origin as origin_module
from moe_runtime.predictors.origin import require_held_out
from moe_runtime.predictors.path_config import PathConfig
from moe_runtime.predictors.path_loss import path_loss, start_from_table
from moe_runtime.predictors.path_network import PathNetwork
from moe_runtime.predictors.path_recall import RecallSum, table_logits
from moe_runtime.predictors.path_sequences import (
    PathSequence,
    Vocabulary,
    epoch_packs,
    multi_hot,
    padded,
    sequences_of,
    token_counts,
)
from moe_runtime.predictors.path_training import TrainOptions, TrainProgress, train_path
from moe_runtime.predictors.train import split_traces, train_predictor
from typer.testing import CliRunner

from moe_runtime.cli import app
from moe_runtime.errors import ConfigError, PredictorError, TraceError
from moe_runtime.trace import UNUSED, RoutingTrace
from routing_texts import EXPERTS, LAYERS, TOKENS, TOP_K, text_trace

SMALL = PathConfig(d_model=32, d_ff=32, d_kv=8, heads=2, decoder_layers=1, window=8)
QUICK = TrainOptions(
    epochs=3, batch_tokens=256, longest=32, evaluate_every=20, peak_rate=1e-2, forget=0.0
)
TRAIN, HELD = text_trace(sequences=60), text_trace(sequences=8, seed=9)
SHAPE: dict[str, Any] = {"grid": TRAIN.grid, "top_k": TRAIN.top_k}


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in network.named_parameters()}


# -- learning --------------------------------------------------------------------------------------


def test_it_learns_what_no_token_table_can_know() -> None:
    """One of the two experts follows from the token before: a table gets that half by chance."""
    told: list[TrainProgress] = []
    made = train_predictor(
        [TRAIN], [HELD], config=SMALL, options=replace(QUICK, epochs=25, patience=100),
        progress=told.append,
    )  # fmt: skip
    trained = made.trained
    assert trained.stopped == "epochs"
    assert trained.table.recall_2k < 0.85
    assert trained.recall.recall_2k > 0.97
    assert trained.recall.recall_k > trained.table.recall_k + 0.2
    # Before the first step it is the table, so training never ends below it.
    assert told[0].recall_2k == pytest.approx(trained.table.recall_2k, abs=0.02)
    assert told[-1].best_2k == max(one.recall_2k for one in told)
    kept = made.predictor.origin.figures
    assert kept["routing_path"]["recall_2k"] == round(trained.recall.recall_2k, 4)
    assert kept["held_out_rows"] == 8 * 15


def test_an_encoder_learns_from_prompts_and_what_was_generated() -> None:
    config = replace(SMALL, encoder_layers=1, prior=False, window=32)
    train, held = (
        sequences_of([text_trace(sequences=n, prompt=10, tokens=12, seed=n)]) for n in (60, 8)
    )
    options = replace(QUICK, epochs=30, patience=100)
    trained = train_path(train, held, config=config, options=options, **SHAPE)
    assert trained.recall.recall_2k > trained.table.recall_2k + 0.05


def test_the_start_is_the_token_table() -> None:
    sequences = sequences_of([TRAIN])
    vocabulary = Vocabulary.of(sequences)
    counts, rows = token_counts(sequences, vocabulary, TRAIN.grid)
    assert counts.sum() == TRAIN.topk_ids.size
    assert rows.sum() == len(TRAIN) * LAYERS
    table = table_logits(counts, rows, TRAIN.grid)
    network = PathNetwork(replace(SMALL, d_model=64), vocabulary=TOKENS, outputs=LAYERS * EXPERTS)
    start_from_table(network, table, rows)
    with torch.no_grad():
        network.head.weight.zero_()
        found = network(torch.arange(TOKENS + 1)[None])[0]
    np.testing.assert_allclose(found, table, atol=1e-3)


def test_the_loss_is_the_mean_over_rows_that_were_routed() -> None:
    ids = TRAIN.topk_ids[:10].reshape(2, 5, LAYERS, TOP_K).copy()
    ids[1, 3:] = UNUSED
    ids[0, 0, 1] = UNUSED  # a layer that did not run for this row
    logits = torch.randn(2, 5, LAYERS * EXPERTS, generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    for b, s, layer in np.ndindex(2, 5, LAYERS):
        if (ids[b, s, layer] != UNUSED).any():
            p = logits[b, s, layer * EXPERTS : (layer + 1) * EXPERTS].sigmoid().double().numpy()
            hot = np.isin(np.arange(EXPERTS), ids[b, s, layer])
            total -= float(np.log(np.where(hot, p, 1 - p)).sum())
            count += 1
    assert path_loss(logits, ids, TRAIN.grid).item() == pytest.approx(total / count, rel=1e-5)


def test_training_ends_where_recall_rises_no_more() -> None:
    options = replace(QUICK, epochs=1000, evaluate_every=2, patience=3, peak_rate=1e-9)
    trained = train_path(
        sequences_of([TRAIN]), sequences_of([HELD]), config=SMALL, options=options, **SHAPE
    )
    assert trained.stopped == "recall"
    assert trained.steps <= 20


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    sides = (sequences_of([TRAIN]), sequences_of([HELD]))
    config = replace(SMALL, dropout=0.1)
    options = replace(QUICK, epochs=4, evaluate_every=3)
    whole = train_path(*sides, config=config, options=options, **SHAPE)
    state = tmp_path / "state.safetensors"

    def stop(now: TrainProgress) -> None:
        if now.step >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_path(*sides, config=config, options=options, state=state, progress=stop, **SHAPE)
    again = train_path(*sides, config=config, options=options, state=state, resume=True, **SHAPE)
    assert again.steps == whole.steps > 12
    assert again.recall == whole.recall
    for name, weight in weights(whole.network).items():
        assert torch.equal(weight, weights(again.network)[name]), name
    for changed in ({"config": SMALL}, {"options": replace(options, seed=1)}):
        with pytest.raises(ConfigError, match="a training with other"):
            train_path(
                *sides, **{"config": config, "options": options, **SHAPE, **changed},
                state=state, resume=True,
            )  # fmt: skip
    with pytest.raises(ConfigError, match="a training with other data"):
        train_path(*sides[::-1], config=config, options=options, state=state, resume=True, **SHAPE)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ConfigError, match="not a whole training state"):
        train_path(*sides, config=config, options=options, state=state, resume=True, **SHAPE)
    with pytest.raises(ConfigError, match="no training state"):
        train_path(*sides, config=config, options=options, resume=True, **SHAPE)


# -- sequences and batches -------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=12), st.integers(0, 3), st.booleans(),
    st.integers(8, 40),
)  # fmt: skip
def test_batches_hold_every_token_once_or_cut_as_said(
    lengths: list[int], seed: int, encoder: bool, longest: int
) -> None:
    numbers = iter(range(10_000))
    sequences = [
        PathSequence(
            token_ids=np.array([next(numbers) for _ in range(n)]),
            topk_ids=np.zeros((n, LAYERS, TOP_K), np.uint16),
            prompt=n,
        )
        for n in lengths
    ]
    how = {"encoder": encoder, "tokens": 64, "longest": longest, "seed": seed}
    packs = epoch_packs(sequences, epoch=1, **how)
    again = epoch_packs(sequences, epoch=1, **how)
    assert [[p[1].tolist() for p in pack] for pack in packs] == [
        [p[1].tolist() for p in pack] for pack in again
    ]
    for pack in packs:
        assert len(pack) == 1 or len(pack) * max(len(piece[1]) for piece in pack) <= 64
        assert max(len(piece[1]) for piece in pack) <= longest
    tokens = [int(one) for pack in packs for piece in pack for one in piece[1]]
    assert len(set(tokens)) == len(tokens)
    if encoder:
        for prompt, ids, _ in (piece for pack in packs for piece in pack):
            assert len(prompt)
            assert prompt[-1] + 1 == ids[0]
    else:
        assert sorted(tokens) == list(range(sum(lengths)))


def test_a_padded_batch_says_where_nothing_was_routed() -> None:
    sequences = sequences_of([text_trace(sequences=2, length=9)])
    vocabulary = Vocabulary.of(sequences)
    nothing = np.zeros(0, np.int64)
    batch = padded(
        [(nothing, one.token_ids[:n], one.topk_ids[:n])
         for one, n in zip(sequences, (9, 4), strict=True)],
        vocabulary,
    )  # fmt: skip
    assert batch.tokens.shape == (2, 9)
    assert (batch.topk_ids[1, 4:] == UNUSED).all()
    np.testing.assert_array_equal(vocabulary.ids[batch.tokens[1, :4]], sequences[1].token_ids[:4])
    assert vocabulary.rows(np.array([-1, 6, 10**6])).tolist() == [len(vocabulary)] * 3


def test_recall_counts_as_one_would_by_hand() -> None:
    rng = np.random.default_rng(4)
    logits, ids = rng.normal(size=(50, LAYERS * EXPERTS)), TRAIN.topk_ids[:50].copy()
    ids[7, 1] = UNUSED
    total = RecallSum(TRAIN.grid, TRAIN.top_k)
    total.add(logits[:20], ids[:20])
    total.add(logits[20:], ids[20:])
    recall = []
    for layer in range(LAYERS):
        hits = chosen = 0
        for row in range(50):
            if ids[row, layer, 0] == UNUSED:
                continue
            mine = logits[row, layer * EXPERTS : (layer + 1) * EXPERTS]
            hits += len(set(np.argsort(-mine)[: 2 * TOP_K]) & set(ids[row, layer].tolist()))
            chosen += TOP_K
        recall.append(hits / chosen)
    found = total.result()
    assert found.by_layer == pytest.approx(recall, abs=1e-4)
    assert found.recall_2k == pytest.approx(np.mean(recall))
    assert found.precision_2k == pytest.approx(np.mean(recall) / 2)
    assert multi_hot(ids, TRAIN.grid).sum() == 50 * LAYERS * TOP_K - TOP_K


def test_sequences_are_held_out_whole_and_new() -> None:
    doubled = RoutingTrace.concat([TRAIN, replace(TRAIN, sequence_ids=TRAIN.sequence_ids + 100)])
    train, held = split_traces([doubled, HELD], 0.3, seed=2)
    texts = [{one.token_ids.tobytes() for one in sequences_of(traces)} for traces in (train, held)]
    assert texts[0].isdisjoint(texts[1])
    assert len(texts[1]) > 2
    again = split_traces([doubled, HELD], 0.3, seed=2)
    assert [t.token_ids.tolist() for t in held] == [t.token_ids.tolist() for t in again[1]]
    for share in (0.0, 1.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            split_traces([TRAIN], share)
    with pytest.raises(ConfigError, match="1 sequences cannot be split"):
        split_traces([text_trace(sequences=1)], 0.5)


def test_a_sample_of_rows_condemns_only_what_it_speaks_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin_module, "KEPT_ROWS", 60)
    long, short = text_trace(sequences=2, length=400), text_trace(sequences=40, length=5, seed=3)
    origin = Origin.of([long, short])
    assert len(origin.fitted_on) == 60
    with pytest.raises(PredictorError, match="would flatter it"):
        require_held_out(origin, long)
    require_held_out(origin, short)  # too few of each one's rows are in the sample to tell
    require_held_out(origin, text_trace(sequences=2, length=400, seed=8))


def test_traces_that_cannot_be_trained_on_are_refused() -> None:
    unknown = replace(TRAIN, token_ids=np.where(TRAIN.positions == 3, -1, TRAIN.token_ids))
    with pytest.raises(TraceError, match=r"60 of 1,800 rows .*record it again"):
        train_predictor([unknown], [HELD], config=SMALL, options=QUICK)
    with pytest.raises(TraceError, match="another model_id"):
        train_predictor([TRAIN], [text_trace(model_id="x")], config=SMALL, options=QUICK)
    with pytest.raises(PredictorError, match="held-out trace 0"):
        train_predictor([TRAIN], [TRAIN], config=SMALL, options=QUICK)
    with pytest.raises(TraceError, match="no traces"):
        train_predictor([], [HELD], config=SMALL, options=QUICK)


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["train-predictor", *map(str, arguments)])


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    train = text_trace(sequences=20).save(folder / "a.trace.safetensors")
    return train, text_trace(sequences=3, seed=5).save(folder / "b.trace.safetensors")


def test_the_command_leaves_a_predictor(traces: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "p.predictor.safetensors"
    result = run(traces[0], "-o", out, "--epochs", 2, "--held-out", traces[1], "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["stopped"] == "epochs"
    assert facts["held_out_rows"] == 3 * 15
    assert set(facts["routing_path"]) == set(facts["token_table"])
    assert "recall at 2k" in result.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    loaded = load_predictor(out, fingerprint="beef", grid=TRAIN.grid)
    assert loaded.origin.figures["routing_path"] == facts["routing_path"]
    shown = run(traces[0], "-o", out, "--epochs", 1, "--held-out", "20%")
    assert "token-id table" in shown.stdout


def test_the_command_says_what_is_wrong(traces: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "p.predictor.safetensors"
    for arguments, code, words in (
        (["--preset", "huge"], 1, "known: compact, expertflow"),
        (["--held-out", "5%", "--held-out", traces[1]], 1, "or one share like 5%"),
        (["--held-out", tmp_path / "none"], 2, "no such trace"),
        (["--resume"], 1, "no training state to go on from"),
        (["--held-out", traces[0]], 2, "would flatter it"),
    ):
        result = run(traces[0], "-o", out, "--epochs", 1, *arguments)
        assert result.exit_code == code, result.output
        assert words in result.stderr
    assert not out.exists()


def test_an_interrupted_command_says_how_to_go_on(
    traces: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_runtime.predictors import path_training

    out = tmp_path / "p.predictor.safetensors"
    monkeypatch.setattr(TrainOptions, "__post_init__", _measured_often)
    steps = path_training._Run._step

    def interrupted(self: Any, *arguments: Any) -> None:
        steps(self, *arguments)
        if self.facts["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(path_training._Run, "_step", interrupted)
        result = run(traces[0], "-o", out, "--epochs", 4)
    assert result.exit_code == 130
    assert "go on with --resume" in result.stderr
    result = run(traces[0], "-o", out, "--epochs", 4, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["epochs"] == 4
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def _measured_often(self: TrainOptions) -> None:
    object.__setattr__(self, "evaluate_every", 2)
