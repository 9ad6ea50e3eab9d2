"""The positive control: in a model whose one known expert carries the answer, identification finds
that expert, steering it moves accuracy as the weights say, and steering any other one does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_runtime
from moe_runtime.core import ExpertGrid
from moe_runtime.steering.identify import identify
from moe_runtime.steering.shift import RoutingShift, routing_shift
from moe_runtime.steering.values import Steering
from moe_runtime.trace import RoutingTrace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))


from planted_steering import (
    ANSWERS,
    EXPERTS,
    LAYERS,
    PLANTED,
    VOCABULARY,
    accuracy_at,
    answer_of,
    planted_model,
    planted_tokenizer,
    prompt_of,
    reference_of,
)

MARKERS = {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}
BETAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0, 512.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return moe_runtime.attach(planted_model())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return planted_tokenizer()


def read(model: Any, tokenizer: Any) -> RoutingTrace:
    """The routing of solved problems, teacher-forced."""
    texts = [reference_of(n, words) for words in (1, 2, 3) for n in range(ANSWERS)]
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        model(**tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
    return recorder.trace


def right_share(model: Any, tokenizer: Any) -> float:
    """Mean probability of the right answer behind a thought."""
    texts = [reference_of(n).rsplit(" ", 1)[0] for n in range(ANSWERS)]
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt")).logits[:, -1]
    shares = logits.softmax(-1)
    right = [VOCABULARY.index(answer_of(n)) for n in range(ANSWERS)]
    return float(shares[range(ANSWERS), right].mean())


def steered_share(model: Any, tokenizer: Any, steering: Any, thinking: Any = None) -> float:
    with moe_runtime.steer(model, steering, thinking=thinking, tokenizer=tokenizer):
        return right_share(model, tokenizer)


def others() -> list[tuple[int, int]]:
    grid = ExpertGrid(layers=tuple(range(LAYERS)), experts=(EXPERTS,) * LAYERS)
    names = [grid.expert_id(n) for n in range(grid.size)]
    return [(one.layer, one.expert) for one in names if one != PLANTED]


def test_identification_finds_the_planted_expert(model: Any, tokenizer: Any) -> None:
    found = identify(read(model, tokenizer), MARKERS, tokenizer=tokenizer, bootstrap=50)
    best, second = found.ranked[:2]
    assert (best.layer, best.expert) == PLANTED
    assert best.score > second.score + 0.1  # alone
    assert best.tied == 1
    assert best.stability == 1.0
    assert best.npmi[0] == pytest.approx(1.0)  # chosen wherever <think> is read, nowhere else
    assert best.npmi[1] == -1.0


@pytest.mark.parametrize("beta", BETAS)
def test_accuracy_moves_as_constructed(model: Any, tokenizer: Any, beta: float) -> None:
    found = steered_share(model, tokenizer, {PLANTED: beta})
    assert found == pytest.approx(accuracy_at(beta), abs=2e-3)


def test_one_half_is_right_unsteered_and_beta_below_1_harms(model: Any, tokenizer: Any) -> None:
    shares = [steered_share(model, tokenizer, {PLANTED: beta}) for beta in BETAS]
    assert right_share(model, tokenizer) == pytest.approx(0.5, abs=1e-4)
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[-1] > 0.999


def test_no_other_expert_moves_accuracy(model: Any, tokenizer: Any) -> None:
    plain = right_share(model, tokenizer)
    assert len(others()) == LAYERS * EXPERTS - 1
    for expert in others():
        for beta in (0.0, 64.0):
            found = steered_share(model, tokenizer, {expert: beta})
            assert found == pytest.approx(plain, abs=1e-3), (expert, beta)


def test_only_while_thinking_is_enough(model: Any, tokenizer: Any) -> None:
    found = steered_share(model, tokenizer, {PLANTED: 4.0}, ("<think>", "</think>"))
    assert found == pytest.approx(accuracy_at(4.0), abs=2e-3)
    # The other way round there is nothing to steer: the expert works at <think> alone.
    found = steered_share(model, tokenizer, {PLANTED: 4.0}, ("</think>", "<think>"))
    assert found == pytest.approx(0.5, abs=1e-4)


def shift_of(model: Any, tokenizer: Any, steering: Steering) -> RoutingShift:
    plain = read(model, tokenizer)
    with moe_runtime.steer(model, steering):
        return routing_shift(plain, read(model, tokenizer))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_layers_up_to_the_steered_one_do_not_shift(model: Any, tokenizer: Any, layer: int) -> None:
    """Multiplying weights changes what layers after it see, and nothing before or beside it."""
    trace = read(model, tokenizer)
    busiest = int(
        torch.bincount(torch.from_numpy(trace.topk_ids[:, layer].astype("int64")).ravel()).argmax()
    )
    found = shift_of(model, tokenizer, Steering(betas={(layer, busiest): 64.0}))
    for one in found.layers[: layer + 1]:
        assert (one.changed, one.jaccard, one.total_variation) == (0.0, 1.0, 0.0)
    after = found.after([layer])
    assert [one.layer for one in after] == list(range(layer + 1, LAYERS))
    assert not after or any(one.changed > 0 for one in after)
    assert found.first_changed is None or found.first_changed > layer


def test_a_forced_expert_shifts_its_own_layer(model: Any, tokenizer: Any) -> None:
    found = shift_of(model, tokenizer, Steering(betas={PLANTED: 1.0}, method="force"))
    assert found.first_changed == PLANTED[0]
    assert found.layers[PLANTED[0]].changed > 0.4  # one of two choices, wherever it was not chosen


def test_sampled_answers_agree_with_the_probabilities(model: Any, tokenizer: Any) -> None:
    prompts = [prompt_of(n % ANSWERS) for n in range(40 * ANSWERS)]
    torch.manual_seed(5)
    with moe_runtime.steer(model, {PLANTED: 2.0}):
        out = model.generate(
            **tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=40,
        )
    texts = [
        text.split("<eos>")[0].rpartition("</think>")[2].strip()
        for text in tokenizer.batch_decode(out)
    ]
    right = sum(text == answer_of(n % ANSWERS) for n, text in enumerate(texts))
    expected = accuracy_at(2.0)
    error = (expected * (1 - expected) / len(prompts)) ** 0.5
    assert abs(right / len(prompts) - expected) < 4 * error
