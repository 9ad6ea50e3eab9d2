"""The bundled model loads with plain transformers and solves puzzles; its scripts keep promises.

Promises: puzzles are deterministic and held-out ones never trained on; resuming a training run
gives the weights of an uninterrupted one; the routing figures are what they say.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))  # the training scripts are no part of the package
# ruff: noqa: E402

from bundled_model.data import IGNORED, Corpus, Documents, Mixture
from bundled_model.evaluate import grade, solve, wilson
from bundled_model.model import Shape, build, export
from bundled_model.puzzles import (
    END_THINK,
    FAMILIES,
    HARD,
    STANDARD,
    THINK,
    Level,
    Puzzle,
    held_out,
    split_of,
    stream,
)
from bundled_model.record import record_rows
from bundled_model.routing import measure
from bundled_model.tokenizer import BEGIN, END, PAD, train_tokenizer
from bundled_model.train import LOG, STATE, Every, Settings, train
from moe_runtime.trace import RoutingTrace

BUNDLED = ROOT / "moe_runtime" / "data" / "bundled"
LARGEST_BYTES = 16_000_000
SOLVED_AT_LEAST = 0.50  # of 48 puzzles; 0.734 of 1,000 was measured


# -- the finished model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


def test_it_is_a_small_balanced_mixture_of_experts_in_bf16(model: Any) -> None:
    config = model.config
    assert config.model_type == "qwen3_moe"
    assert config.num_hidden_layers >= 6
    assert config.num_experts >= 16
    assert config.num_experts_per_tok >= 2
    assert config.tie_word_embeddings
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_its_folder_is_within_the_size_limit() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= LARGEST_BYTES


def test_think_tokens_are_single_and_survive_decoding(tokenizer: Any) -> None:
    for token in (THINK, END_THINK):
        assert tokenizer.encode(token, add_special_tokens=False) == [
            tokenizer.convert_tokens_to_ids(token)
        ]
    ids = tokenizer.encode(f"{THINK}1+2=3{END_THINK}3{END}")
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{THINK}1+2=3{END_THINK}3"


@pytest.mark.parametrize(
    "text",
    ["Fellow citizens, 1862!", "def f(x):\n    return {x: 'ä'}\n", "Sort 17,2,29.", "漢字 \t\n  x"],
)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_model_and_tokenizer_agree_on_the_named_tokens(model: Any, tokenizer: Any) -> None:
    named = {"bos": BEGIN, "eos": END, "pad": PAD}
    for name, token in named.items():
        number = getattr(tokenizer, f"{name}_token_id")
        assert tokenizer.convert_ids_to_tokens(number) == token
        assert getattr(model.config, f"{name}_token_id") == number
        assert getattr(model.generation_config, f"{name}_token_id") == number
    assert len(tokenizer) == model.config.vocab_size


def test_it_solves_held_out_puzzles(model: Any, tokenizer: Any) -> None:
    asked = held_out(48, seed=0)
    accuracy = grade(asked, solve(model, tokenizer.backend_tokenizer, asked))
    assert SOLVED_AT_LEAST <= accuracy.share < 1.0


def test_every_expert_of_every_layer_is_used(model: Any, tokenizer: Any) -> None:
    prompts = json.loads((BUNDLED / "prompts.json").read_text())
    text = " ".join(p["prompt"] for domain in prompts.values() for p in domain) * 8
    ids = torch.tensor([tokenizer.encode(text)[:1000]])
    experts, _ = record_rows(model, ids)
    for layer in range(experts.shape[2]):
        assert len(experts[:, :, layer].unique()) > 0.8 * model.config.num_experts


def test_demo_prompts_cover_the_domains_and_are_held_out() -> None:
    prompts = json.loads((BUNDLED / "prompts.json").read_text())
    assert set(prompts) == {"english", "python", "reasoning"}
    assert all(len(some) >= 4 for some in prompts.values())
    assert all(split_of(p["prompt"]) == "held_out" for p in prompts["reasoning"])
    assert all(p["answer"] for p in prompts["reasoning"])


# -- puzzles -------------------------------------------------------------------------------------


def test_puzzles_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    first = list(islice(stream("train", 3), 50))
    assert first == list(islice(stream("train", 3), 50))
    assert first != list(islice(stream("train", 4), 50))
    assert held_out(20, seed=1) == held_out(20, seed=1)


def test_training_and_held_out_puzzles_are_disjoint() -> None:
    trained = {p.prompt for p in islice(stream("train", 0), 4000)}
    asked = {p.prompt for p in held_out(400, seed=0)}
    assert len(asked) == 400
    assert not trained & asked
    assert {split_of(p) for p in trained} == {"train"}
    assert {split_of(p) for p in asked} == {"held_out"}


def _by_hand(puzzle: Puzzle) -> str:
    """The answer, found from the prompt alone in another way than the generator's."""
    question = puzzle.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    words = question.rstrip("?.").split()
    listed = [[int(n) for n in w.split(",")] for w in words if w[0].isdigit() and "," in w]
    match puzzle.family:
        case "sum" | "chain" | "product":
            return str(eval(words[-1]))
        case "story":
            has, gets, gives = map(int, re.findall(r"\d+", question))
            return str(has + gets - gives)
        case "largest":
            return str((max if "largest" in words else min)(listed[0]))
        case "sort":
            return ",".join(str(n) for n in sorted(listed[0]))
        case "count":
            return str(sum(n > int(words[-1]) for n in listed[0]))
        case "evens":
            return str(sum(n for n in listed[0] if not n & 1))
    raise AssertionError(puzzle.family)


@pytest.mark.parametrize("level", [STANDARD, HARD])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right_and_checked(family: str, level: Level) -> None:
    some = [p for p in islice(stream("train", 5, level), 800) if p.family == family]
    assert len(some) > 40
    for puzzle in some:
        assert puzzle.answer == _by_hand(puzzle), puzzle
        assert puzzle.check(puzzle.solution)
        assert puzzle.check(f"{THINK}{END_THINK} {puzzle.answer}\n")
        assert not puzzle.check(puzzle.answer)  # no end of thinking
        assert not puzzle.check(f"{THINK}{puzzle.steps}{END_THINK}{puzzle.answer}1")
        assert not puzzle.check("")


def test_wilson_interval_of_known_values() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


# -- training ------------------------------------------------------------------------------------

TINY = Shape(
    layers=2, experts=4, top_k=2, hidden=16, expert_width=8, heads=2, key_value_heads=1,
    head_width=8,
)  # fmt: skip
SETTINGS = Settings(
    seed=1, steps=8, warm_up=2, shape=TINY, mixture=Mixture(rows=("reasoning", "text"), context=48)
)
EVERY = Every(log=1, evaluate=100, save=3, puzzles=2)


@pytest.fixture(scope="module")
def corpus() -> tuple[Corpus, Any]:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    texts: dict[str, Documents] = {"text": {"train": [text, text.upper()], "held_out": [text]}}
    examples = [p.prompt + p.solution for p in islice(stream("train", 1), 50)]
    tokenizer = train_tokenizer([text, *examples], vocabulary=300)
    return Corpus.from_texts(tokenizer, texts), tokenizer


def test_resumed_training_equals_an_uninterrupted_run(
    corpus: tuple[Corpus, Any], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    wanted = train(SETTINGS, *corpus, whole, every=EVERY)
    early = train(SETTINGS, *corpus, parts, every=EVERY, stop_at=5)
    found = train(SETTINGS, *corpus, parts, every=EVERY)
    changed = 0
    for (name, a), b, c in zip(
        wanted.named_parameters(), found.parameters(), early.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        changed += not torch.equal(b, c)
    assert changed > 10  # the second start trained on
    logged = [
        [json.loads(line)["loss"] for line in (out / LOG).read_text().splitlines()]
        for out in (whole, parts)
    ]
    assert logged[0] == logged[1]
    assert len(logged[0]) == SETTINGS.steps


def test_a_state_of_other_texts_or_another_shape_is_refused(
    corpus: tuple[Corpus, Any], tmp_path: Path
) -> None:
    train(SETTINGS, *corpus, tmp_path, every=EVERY, stop_at=1)
    known, tokenizer = corpus
    other = Corpus(tokenizer, {name: ids[:-1] for name, ids in known.tokens.items()})
    with pytest.raises(ValueError, match="other texts"):
        train(SETTINGS, other, tokenizer, tmp_path, every=EVERY)
    wide = Settings(steps=8, shape=Shape(**{**TINY.__dict__, "expert_width": 16}))
    with pytest.raises(ValueError, match="the model has"):
        train(wide, *corpus, tmp_path, every=EVERY)
    assert (tmp_path / STATE).exists()


def test_prompts_are_read_and_not_learned(corpus: tuple[Corpus, Any]) -> None:
    known, tokenizer = corpus
    puzzle = next(stream("train", 9))
    ids, labels = known.puzzle_ids(puzzle)
    learned = [i for i in labels if i != IGNORED]
    assert tokenizer.decode(learned, skip_special_tokens=True) == puzzle.solution
    assert learned[-1] == tokenizer.token_to_id(END)
    assert ids[0] == tokenizer.token_to_id(BEGIN)
    batch = known.batch(SETTINGS.mixture, seed=0, step=3)
    again = known.batch(SETTINGS.mixture, seed=0, step=3)
    assert np.array_equal(batch.ids, again.ids)
    assert not np.array_equal(batch.ids, known.batch(SETTINGS.mixture, seed=0, step=4).ids)


def test_export_loads_with_plain_transformers(corpus: tuple[Corpus, Any], tmp_path: Path) -> None:
    model = build(TINY, corpus[1], seed=0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    size = export(model, corpus[1], tmp_path / "model")
    assert size == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name].to(torch.bfloat16)), name


# -- routing figures -----------------------------------------------------------------------------


def _trace(ids: np.ndarray[Any, Any], experts: int) -> RoutingTrace:
    tokens = len(ids)
    return RoutingTrace(
        topk_ids=ids.astype(np.uint16),
        topk_weights=np.full(ids.shape, 1 / ids.shape[2], np.float16),
        token_ids=np.zeros(tokens, np.int32),
        sequence_ids=(np.arange(tokens) // 50).astype(np.int32),
        positions=(np.arange(tokens) % 50).astype(np.int32),
        phase=np.zeros(tokens, np.uint8),
        step_ids=np.zeros(tokens, np.int32),
        layer_ids=tuple(range(ids.shape[1])),
        experts=(experts,) * ids.shape[1],
    )


def test_figures_of_a_second_layer_that_follows_the_first() -> None:
    rng = np.random.default_rng(0)
    first = np.stack([rng.permutation(8)[:2] for _ in range(1000)])
    figures = measure(_trace(np.stack([first, (first + 3) % 8], axis=1), 8))
    assert figures.affinity_recall[0] > 0.99
    assert figures.popularity_recall[0] < 0.4
    assert figures.shuffled_recall[0] < 0.4
    assert figures.information[0] > 10 * figures.shuffled_information[0]
    assert figures.overlap[0] == pytest.approx(figures.chance, abs=0.03)
    assert figures.gate_entropy == pytest.approx((1.0, 1.0))
    assert figures.load_entropy[0] > 0.99


def test_figures_of_routing_that_never_changes() -> None:
    figures = measure(_trace(np.tile(np.array([[[0, 1]]]), (200, 2, 1)), 8))
    assert figures.overlap == (1.0, 1.0)
    assert figures.load_max_over_mean == (4.0, 4.0)
    assert figures.load_entropy == pytest.approx((1 / 3, 1 / 3))
    assert figures.information == pytest.approx((0.0,))
