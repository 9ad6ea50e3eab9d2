"""The routing-path network and the predictor at work: T5's arithmetic, sequences that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.predictors import Origin, StepRows, load_predictor, save_predictor
from moe_runtime.predictors import routing_path as routing_path_module
from moe_runtime.predictors.path_cache import PathCache
from moe_runtime.predictors.path_config import PathConfig, preset
from moe_runtime.predictors.path_correction import corrected, fit_correction
from moe_runtime.predictors.path_measure import sequence_logits
from moe_runtime.predictors.path_network import PathNetwork
from moe_runtime.predictors.path_sequences import PathSequence, Vocabulary, sequences_of
from moe_runtime.predictors.replay import replay
from moe_runtime.predictors.routing_path import RoutingPathPredictor
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoTokenizer

import moe_runtime
from moe_runtime.errors import ConfigError, PredictorError
from routing_texts import EXPERTS, LAYERS, text_trace

READS = PathConfig(d_model=16, d_ff=24, d_kv=8, heads=2, decoder_layers=2, window=9)
ENCODES = PathConfig(
    d_model=16, d_ff=24, d_kv=8, heads=2, encoder_layers=2, decoder_layers=2, window=300,
    prior=False,
)  # fmt: skip
TRACE = text_trace(sequences=6, length=40, prompt=13)
IDS = np.unique(TRACE.token_ids).astype(np.int64)
SIZE = LAYERS * EXPERTS


def made(config: PathConfig, *, correction: bool = False) -> RoutingPathPredictor:
    """A predictor with random weights."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    maps = rng.normal(size=(SIZE, SIZE)).astype(np.float32) if correction else None
    return RoutingPathPredictor(
        origin=Origin.of([TRACE]),
        network=PathNetwork(config, vocabulary=len(IDS), outputs=SIZE),
        vocabulary=Vocabulary(ids=IDS),
        popularity=rng.uniform(0.1, 0.4, SIZE).astype(np.float32),
        correction=maps,
    )


def step(sequences: dict[int, tuple[PathSequence, slice]], *, decode: bool) -> StepRows:
    """The rows of these parts of sequences, one sequence after another."""
    parts = [
        (name, one.token_ids[part], np.arange(len(one))[part])
        for name, (one, part) in sequences.items()
    ]
    return StepRows(
        token_ids=np.concatenate([ids for _, ids, _ in parts]),
        sequence_ids=np.concatenate([np.full(len(ids), name) for name, ids, _ in parts]),
        positions=np.concatenate([places for _, _, places in parts]),
        decode=decode,
    )


def forecast(predictor: RoutingPathPredictor) -> np.ndarray:
    """All layers' probabilities `[T, G]`."""
    return np.concatenate([predictor.predict(at) for at in range(LAYERS)], axis=1)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


# -- the network -----------------------------------------------------------------------------------


def as_transformers(network: PathNetwork) -> Any:
    """transformers' T5 with the weights of a network, and its head in the place of the lm_head."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = network.config
    model: Any = T5ForConditionalGeneration(
        T5Config(
            vocab_size=network.vocabulary + 1, d_model=sizes.d_model, d_ff=sizes.d_ff,
            d_kv=sizes.d_kv, num_heads=sizes.heads, num_layers=sizes.encoder_layers,
            num_decoder_layers=sizes.decoder_layers, feed_forward_proj="relu",
            tie_word_embeddings=False, relative_attention_num_buckets=sizes.buckets,
            relative_attention_max_distance=sizes.max_distance,
        )
    ).eval()  # fmt: skip
    model.lm_head = torch.nn.Linear(sizes.d_model, SIZE, bias=False)
    mine = dict(network.named_parameters())
    moved = {"lm_head.weight": mine["head.weight"]}
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        moved[f"{name}.weight"] = mine["embedding.weight"]
    for side, feed in (("encoder", 1), ("decoder", 2)):
        block = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        moved[block] = mine[f"{side}_bias.weight"]
        moved[f"{side}.final_layer_norm.weight"] = mine[f"{side}_norm.weight"]
        for at in range(len(getattr(network, side))):
            here, there = f"{side}.{at}", f"{side}.block.{at}.layer"
            kinds = [("attention", "0.SelfAttention")]
            norms = {"attention_norm": 0, "feed_norm": feed}
            if side == "decoder":
                kinds.append(("cross", "1.EncDecAttention"))
                norms["cross_norm"] = 1
            for kind, theirs in kinds:
                for part in "qkvo":
                    moved[f"{there}.{theirs}.{part}.weight"] = mine[f"{here}.{kind}.{part}.weight"]
            for norm, layer in norms.items():
                moved[f"{there}.{layer}.layer_norm.weight"] = mine[f"{here}.{norm}.weight"]
            for part in ("wi", "wo"):
                theirs = f"{there}.{feed}.DenseReluDense.{part}.weight"
                moved[theirs] = mine[f"{here}.feed.{part}.weight"]
    model.load_state_dict(moved)
    return model


def test_the_arithmetic_is_t5s() -> None:
    torch.manual_seed(1)
    network = PathNetwork(ENCODES, vocabulary=30, outputs=SIZE).eval()
    for name, weight in network.named_parameters():
        if "norm" in name:  # ones would hide a norm left out
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    lengths = torch.tensor([170, 90, 4])
    prompt, ids = torch.randint(30, (3, 170)), torch.randint(30, (3, 150))
    with torch.no_grad():
        ours = network(ids, network.encode(prompt, lengths))
        theirs = as_transformers(network)(
            input_ids=prompt,
            attention_mask=(torch.arange(170) < lengths[:, None]).long(),
            decoder_input_ids=ids,
        ).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=6), st.sampled_from([3, 9, 200]))
def test_a_sequence_in_parts_is_the_sequence_as_a_whole(parts: list[int], window: int) -> None:
    torch.manual_seed(sum(parts))
    config = PathConfig(d_model=8, d_ff=8, d_kv=4, heads=2, decoder_layers=2, window=window)
    network = PathNetwork(config, vocabulary=20, outputs=SIZE).eval()
    ids = torch.randint(20, (2, sum(parts)))
    cache, slots = PathCache(config, 3), torch.tensor([2, 0])
    with torch.no_grad():
        found, start = [], 0
        for length in parts:
            places = torch.arange(start, start + length).expand(2, -1)
            found.append(network.extend(ids[:, places[0]], places, slots, cache))
            start += length
        torch.testing.assert_close(torch.cat(found, 1), network(ids), rtol=1e-4, atol=1e-5)


def test_a_window_forgets_what_is_far() -> None:
    network = made(READS).network
    ids = torch.randint(len(IDS), (1, 60))
    other = ids.clone()
    other[0, :20] = (ids[0, :20] + 1) % len(IDS)
    with torch.no_grad():
        first, second = network(ids), network(other)
    reach = (READS.window - 1) * READS.decoder_layers
    torch.testing.assert_close(first[:, 20 + reach :], second[:, 20 + reach :])
    assert not torch.allclose(first[:, 20], second[:, 20])


def test_presets_are_named_and_the_papers_has_its_sizes() -> None:
    paper = preset("expertflow")
    assert (paper.d_model, paper.d_ff, paper.d_kv, paper.heads) == (32, 2048, 64, 8)
    assert (paper.encoder_layers, paper.decoder_layers) == (6, 6)
    with torch.device("meta"):
        whole = PathNetwork(paper, vocabulary=32127, outputs=1)
    # The paper gives 7.21 MB for the T5 vocabulary at two bytes a weight, without the head.
    assert (whole.size_bytes() - 2 * 32) / 2**20 == pytest.approx(7.21, abs=0.005)
    with pytest.raises(ConfigError, match=r"unknown preset 'small'; known: compact, expertflow"):
        preset("small")


@pytest.mark.parametrize(
    "wrong", [{"d_model": 0}, {"heads": 1 << 30}, {"decoder_layers": 0}, {"dropout": 1.0},
              {"window": 2.5}, {"buckets": 2}, {"max_distance": 16}],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PathConfig(**wrong)


# -- the predictor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [READS, ENCODES], ids=["reads", "encodes"])
def test_a_batch_forecasts_what_whole_sequences_do(config: PathConfig) -> None:
    predictor = made(config)
    some = dict(enumerate(sequences_of([text_trace(sequences=3, length=40, prompt=13)])))
    wanted = {
        name: sigmoid(sequence_logits(predictor.network, predictor.vocabulary, one))
        for name, one in some.items()
    }
    # Two prompts together, one of them in two parts; the third comes later.
    predictor.begin_step(
        step({0: (some[0], slice(0, 13)), 1: (some[1], slice(0, 5))}, decode=False)
    )
    predictor.begin_step(step({1: (some[1], slice(5, 13))}, decode=False))
    predictor.begin_step(step({2: (some[2], slice(0, 13))}, decode=False))
    places = {0: 13, 1: 13, 2: 13}
    rng = np.random.default_rng(0)
    while places:
        names = [name for name in places if rng.random() < 0.7] or [next(iter(places))]
        rng.shuffle(names)
        rows = step({n: (some[n], slice(places[n], places[n] + 1)) for n in names}, decode=True)
        predictor.begin_step(rows)
        found = forecast(predictor)
        for row, name in enumerate(names):
            np.testing.assert_allclose(found[row], wanted[name][places[name] - 13], atol=1e-5)
            places[name] += 1
        places = {name: place for name, place in places.items() if place < 40}


def test_a_prompt_is_forecast_too_where_the_decoder_reads_it() -> None:
    predictor, one = made(READS), sequences_of([TRACE])[0]
    predictor.begin_step(step({0: (one, slice(0, 40))}, decode=False))
    with torch.no_grad():
        rows = torch.from_numpy(predictor.vocabulary.rows(one.token_ids))[None]
        wanted = sigmoid(predictor.network(rows)[0].numpy())
    np.testing.assert_allclose(forecast(predictor), wanted, atol=1e-5)


def test_where_nothing_is_known_popularity_is_the_forecast() -> None:
    encodes, reads = made(ENCODES), made(READS)
    one = sequences_of([TRACE])[0]
    encodes.begin_step(step({0: (one, slice(0, 9))}, decode=False))
    np.testing.assert_allclose(forecast(encodes), np.tile(encodes.popularity, (9, 1)), rtol=1e-5)
    reads.begin_step(
        StepRows(token_ids=np.array([-1, IDS[0]]), sequence_ids=np.array([0, 1]),
                 positions=np.array([4, 4]), decode=True)
    )  # fmt: skip
    found = forecast(reads)
    np.testing.assert_allclose(found[0], reads.popularity, rtol=1e-5)
    assert not np.allclose(found[1], reads.popularity, rtol=1e-2)


def test_tokens_taken_back_leave_nothing_behind() -> None:
    predictor = made(READS)
    one, other = sequences_of([TRACE])[:2]
    predictor.begin_step(step({7: (one, slice(0, 20))}, decode=False))
    predictor.begin_step(step({7: (other, slice(20, 26))}, decode=False))  # not accepted
    predictor.begin_step(step({7: (one, slice(20, 26))}, decode=False))
    again = forecast(predictor)
    predictor.reset()
    predictor.begin_step(step({7: (one, slice(0, 26))}, decode=False))
    np.testing.assert_allclose(again, forecast(predictor)[20:], atol=1e-6)
    # And a number that is used again from position 0 on is a new sequence.
    predictor.begin_step(step({7: (other, slice(0, 26))}, decode=False))
    found = forecast(predictor)
    predictor.reset()
    predictor.begin_step(step({7: (other, slice(0, 26))}, decode=False))
    np.testing.assert_allclose(found, forecast(predictor), atol=1e-6)


def test_only_the_last_sequences_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_path_module, "KEPT_SEQUENCES", 4)
    predictor, one = made(READS), sequences_of([TRACE])[0]
    for name in range(30):
        predictor.begin_step(step({name: (one, slice(0, 5))}, decode=False))
    assert len(predictor._cache) <= 4
    # More at once than are remembered are all served.
    predictor.begin_step(step({n: (one, slice(0, 5)) for n in range(100, 110)}, decode=False))
    found = forecast(predictor).reshape(10, 5, -1)
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-6)
    predictor.begin_step(step({n: (one, slice(5, 6)) for n in range(100, 110)}, decode=True))
    assert np.isfinite(forecast(predictor)).all()


def test_what_was_chosen_shifts_only_layers_to_come() -> None:
    predictor, one = made(READS, correction=True), sequences_of([TRACE])[0]
    predictor.begin_step(step({0: (one, slice(0, 12))}, decode=False))
    plain = forecast(predictor)
    chosen = one.topk_ids[:12].astype(np.int64)
    chosen[3, 0] = -1  # a row that this layer did not route shifts nothing
    for at in range(LAYERS - 1):
        predictor.observe(at, chosen[:, at])
        later = forecast(predictor)
        same = EXPERTS * (at + 1)
        if at == 0:
            np.testing.assert_array_equal(later[:, :same], plain[:, :same])
            np.testing.assert_array_equal(later[3], plain[3])
            assert not np.allclose(later[:3, same:], plain[:3, same:])
    assert predictor.correction is not None
    wanted = corrected(
        np.log(plain / (1 - plain)), one.topk_ids[:12], np.triu(predictor.correction), TRACE.grid
    )
    rows = np.arange(12) != 3
    np.testing.assert_allclose(
        predictor.predict(LAYERS - 1)[rows], sigmoid(wanted)[rows, -EXPERTS:], rtol=2e-3, atol=1e-5
    )


def test_the_correction_finds_what_one_layer_says_of_the_next() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(EXPERTS, size=4000)
    ids = np.stack([first, (first + 3) % EXPERTS, rng.integers(EXPERTS, size=4000)], 1)[..., None]
    ids = ids.astype(np.uint16)
    even = np.full((4000, SIZE), np.log(1 / (EXPERTS - 1)), np.float32)
    fitted = fit_correction(even[:3000], ids[:3000], TRACE.grid, steps=150, rate=0.1)
    layer = np.arange(SIZE) // EXPERTS
    assert not fitted[layer[:, None] >= layer].any()
    found = corrected(even[3000:], ids[3000:], fitted, TRACE.grid)
    hit = found[:, EXPERTS : 2 * EXPERTS].argmax(1) == ids[3000:, 1, 0]
    assert hit.mean() > 0.99
    np.testing.assert_array_equal(found[:, :EXPERTS], even[3000:, :EXPERTS])


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_predictor_forecasts_the_same(tmp_path: Path) -> None:
    for config in (READS, ENCODES):
        first = made(config, correction=True)
        path = save_predictor(first, tmp_path / f"{config.encoder_layers}.predictor.safetensors")
        second = load_predictor(path, fingerprint="beef", grid=TRACE.grid)
        assert isinstance(second, RoutingPathPredictor)
        assert second.network.config == config
        one = sequences_of([TRACE])[0]
        for predictor in (first, second):
            predictor.begin_step(step({0: (one, slice(0, 13))}, decode=False))
            predictor.begin_step(step({0: (one, slice(13, 14))}, decode=True))
            predictor.observe(0, one.topk_ids[13:14, 0].astype(np.int64))
        np.testing.assert_allclose(forecast(second), forecast(first), atol=0.01)


@pytest.mark.parametrize(
    ("constants", "arrays", "found"),
    [
        ('{"network": 3}', {}, "no JSON object: 3"),
        ("{}", {}, "'network' is missing"),
        ('{"network": {"d_model": 99999999}}', {}, "d_model must be an integer 1 to"),
        ('{"network": {"decoder_layers": 60}}', {}, r"array 'network\..*"),
        ('{"network": {"colour": 1}}', {}, "colour"),
        (None, {"vocabulary": np.array([3, 3, 5], np.int32)}, "ascending token ids"),
        (None, {"vocabulary": np.zeros(0, np.int32)}, "ascending token ids"),
        (None, {"popularity": np.zeros(3, np.float32)}, "'popularity' must be float32 24"),
        (None, {"network.head.weight": None}, "'network.head.weight' is missing"),
        (None, {"correction": np.zeros((2, 2), np.float16)}, "'correction' must be float16 24x24"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, constants: str | None, arrays: dict[str, Any], found: str
) -> None:
    path = save_predictor(made(READS, correction=True), tmp_path / "p.predictor.safetensors")
    with safe_open(path, framework="numpy") as file:
        held = {name: file.get_tensor(name) for name in file.keys()} | arrays  # noqa: SIM118
        header = dict(file.metadata())
    if constants is not None:
        header["constants"] = constants
    save_file({n: a for n, a in held.items() if a is not None}, path, metadata=header)
    with pytest.raises(PredictorError, match=found) as caught:
        load_predictor(path)
    assert str(path) in str(caught.value)


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    good = made(READS)
    parts: dict[str, Any] = {
        "origin": good.origin, "network": good.network, "vocabulary": good.vocabulary,
        "popularity": good.popularity,
    }  # fmt: skip
    small = PathNetwork(READS, vocabulary=len(IDS), outputs=5)
    for wrong in (
        {"network": small},
        {"vocabulary": Vocabulary(ids=IDS[:-1])},
        {"popularity": good.popularity[:-1]},
        {"correction": np.zeros((3, 3), np.float32)},
    ):
        with pytest.raises(PredictorError):
            RoutingPathPredictor(**{**parts, **wrong})


def test_the_bundled_predictor_knows_the_bundled_model() -> None:
    """A live run: what the model's routers choose is among what was forecast from token ids."""
    path = Path(moe_runtime.bundled_predictor())
    assert path.stat().st_size < 2_000_000
    model = moe_runtime.from_pretrained(
        moe_runtime.bundled_model(), expert_budget="100%", device="cpu"
    )
    tokenizer = AutoTokenizer.from_pretrained(moe_runtime.bundled_model())
    text = tokenizer("def add(first, second):\n    return first + second\n", return_tensors="pt")
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        model.generate(text["input_ids"], max_new_tokens=24, do_sample=False)
    trace = recorder.trace
    predictor = load_predictor(path, fingerprint=trace.fingerprint, grid=trace.grid)
    assert isinstance(predictor, RoutingPathPredictor)
    assert "/" not in predictor.origin.model_id
    recall: dict[int, list[float]] = {1: [], 2: []}
    for one in replay(predictor, trace.decode(), lookahead=2):
        first = np.argsort(-one.probabilities[0], kind="stable")[: 2 * 4]
        recall[one.distance].append(np.isin(one.topk_ids[0], first).mean())
        # A row sums to about the layer's top-k.
        assert one.probabilities.sum() == pytest.approx(4, abs=1.5)
    assert np.mean(recall[1]) > 0.9
    assert np.mean(recall[2]) > 0.85
