"""Only thinking is steered: spans as a naive reading of the whole text finds them, and a model that
generates with them as one whose weights are changed at these positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import moe_runtime
from moe_runtime.errors import AttachError, ConfigError
from moe_runtime.steering.spans import ThinkingSpans, Variants
from test_steering_hook import close, logits
from tiny import VOCAB, TinyCheckpoints, tiny_model

BEGIN, END, WAIT = 100, 101, 102


class Words:
    """A tokenizer of three words, as much of one as is asked for."""

    unk_token_id = 99
    words: ClassVar[dict[str, list[int]]] = {
        "<think>": [BEGIN],
        "</think>": [END],
        "wait then": [WAIT, BEGIN],
        "": [],
    }

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.words.get(text.strip(), [self.unk_token_id])

    def decode(self, ids: list[int]) -> str:
        return next((word for word, found in self.words.items() if found == ids), "?")

    def get_vocab(self) -> dict[str, int]:
        return {"<think>": BEGIN, "</think>": END}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A plain tiny model."""
    return tiny_model()


# -- spans ----------------------------------------------------------


def naive(tokens: list[int], start: Variants, end: Variants) -> list[bool]:
    """Of a whole sequence without padding."""
    found, inside = [], False
    for place in range(len(tokens)):
        behind = tokens[: place + 1]
        if any(behind[-len(ids) :] == list(ids) for ids in end):
            inside = False
        elif any(behind[-len(ids) :] == list(ids) for ids in start):
            inside = True
        found.append(inside)
    return found


MARKERS = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=2
).map(tuple)


@hypothesis.settings(max_examples=120)
@hypothesis.given(data=st.data(), start=MARKERS, end=MARKERS, rows=st.integers(1, 3))
def test_spans_are_those_of_a_naive_reading(
    data: st.DataObject, start: Variants, end: Variants, rows: int
) -> None:
    spans = ThinkingSpans(start, end)
    for _ in range(2):  # another text afterwards
        texts: list[list[int]] = [[] for _ in range(rows)]
        inside: list[list[bool]] = [[] for _ in range(rows)]
        past = 0
        for length in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):
            ids = torch.tensor(
                [
                    data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
                    for _ in range(rows)
                ]
            )
            real = torch.ones_like(ids, dtype=torch.bool)
            if data.draw(st.booleans()):
                real = torch.tensor(
                    [
                        data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
                        for _ in range(rows)
                    ]
                )
            every = bool(real.all())
            found = spans.advance(ids, past=past, real=None if every else real)
            table = found if isinstance(found, torch.Tensor) else torch.full_like(real, found)
            assert not bool((table & ~real).any())
            for row in range(rows):
                texts[row] += ids[row][real[row]].tolist()
                inside[row] += table[row][real[row]].tolist()
            past += length
        expected = [naive(text, start, end) for text in texts]
        assert inside == expected
        assert spans.counts == tuple(sum(one) for one in expected)


def test_sequences_that_are_named_may_change_rows() -> None:
    spans = ThinkingSpans(((1,),), ((2,),))
    spans.advance(torch.tensor([[1, 5], [5, 5]]), past=0, names=(7, 8))
    spans.advance(torch.tensor([[5, 5]]), past=0, names=(9,))
    found = spans.advance(torch.tensor([[5], [5], [1]]), past=2, names=(8, 7, 9))
    assert isinstance(found, torch.Tensor)
    assert found[:, 0].tolist() == [False, True, True]
    assert spans.counts == (0, 3, 1)


def test_what_was_not_seen_is_refused() -> None:
    spans = ThinkingSpans(((1,),), ((2,),))
    with pytest.raises(AttachError, match="beginning was not seen"):
        spans.advance(torch.tensor([[1]]), past=3)
    spans.advance(torch.tensor([[1, 5, 5]] * 2), past=0)
    with pytest.raises(AttachError, match="2 rows began, 3 go on"):
        spans.advance(torch.tensor([[1]] * 3), past=3)
    with pytest.raises(AttachError, match="takes tokens back"):
        spans.advance(torch.tensor([[1]] * 2), past=2)


# -- in a model


class _Say(LogitsProcessor):
    """Makes `generate` say this, whatever the model thinks; a column for each step."""

    def __init__(self, text: list[list[int]], prompt: int) -> None:
        self.text, self.prompt = text, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self.prompt
        forced = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self.text):
            forced[row, text[at]] = 0.0
        return forced


BETAS = {(0, expert): 3.0 for expert in range(16)} | {(2, 5): 0.5}
PROMPT = torch.tensor([[0, 0, 5, 9], [7, BEGIN, 8, 6], [0, 4, BEGIN, END]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
TEXT = [[3, BEGIN, 8, 8, END, 4], [9, 9, END, 5, BEGIN, 2], [6, 6, 6, 6, 6, 6]]


def generated(model: Any, options: dict[str, Any]) -> torch.Tensor:
    with moe_runtime.steer(model, BETAS, **options) as handle:
        result = model.generate(
            PROMPT,
            attention_mask=MASK,
            max_new_tokens=len(TEXT[0]),
            do_sample=False,
            logits_processor=LogitsProcessorList([_Say(TEXT, PROMPT.shape[1])]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert handle.steered_positions == tuple(map(sum, marks()))
    return torch.stack(result.logits, 1)


def marks() -> list[list[bool]]:
    """Inside or not, of every token that is fed in generation."""
    texts = [PROMPT[row][MASK[row] == 1].tolist() + TEXT[row][:-1] for row in range(len(PROMPT))]
    return [naive(text, ((BEGIN,),), ((END,),)) for text in texts]


def by_position(model: Any) -> torch.Tensor:
    """Each row alone and whole, its weights changed at the marked positions by hand."""
    found = []
    for row, inside in enumerate(marks()):
        flags = torch.tensor(inside)

        def change(layer: int, flags: torch.Tensor = flags) -> Any:
            def before(module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                hidden, index, weights = given
                betas = torch.tensor([BETAS.get((layer, expert), 1.0) for expert in range(16)])
                return hidden, index, weights * torch.where(flags[:, None], betas[index], 1.0)

            return before

        handles = [
            model.get_submodule(f"model.layers.{layer}.mlp.experts").register_forward_pre_hook(
                change(layer)
            )
            for layer in (0, 2)
        ]
        text = PROMPT[row][MASK[row] == 1].tolist() + TEXT[row][:-1]
        found.append(logits(model, torch.tensor([text]))[0, -len(TEXT[row]) :])
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def test_generation_is_steered_where_it_thinks(model: PreTrainedModel) -> None:
    options = {"thinking": ("<think>", "</think>"), "tokenizer": Words()}
    expected = by_position(model)
    assert close(generated(model, options), expected)
    with moe_runtime.steer(model, BETAS):
        steered = logits(model, PROMPT, attention_mask=MASK)
    assert not close(steered[:, -1], expected[:, 0])


def test_inside_a_budget_too(model: PreTrainedModel, tiny_checkpoints: TinyCheckpoints) -> None:
    options = {"thinking": ("<think>", "</think>"), "tokenizer": Words()}
    loaded = moe_runtime.from_pretrained(tiny_checkpoints.fused, expert_budget="25%", device="cpu")
    assert close(generated(loaded, options), by_position(model))


def test_one_sequence_after_another(model: PreTrainedModel) -> None:
    with moe_runtime.steer(
        model, {(0, 3): 2.0}, thinking=("<think>", "</think>"), tokenizer=Words()
    ) as handle:
        assert handle.steered_positions == ()
        for text, count in (([5, BEGIN, 6], 2), ([5, 6], 0), ([BEGIN, 5, END, 5], 2)):
            logits(model, torch.tensor([text]))
            assert handle.steered_positions == (count,)
        model.generate(torch.tensor([[5, BEGIN, 6]]), max_new_tokens=4, do_sample=False)
        assert handle.steered_positions[0] >= 2


def test_outside_everything_keeps_its_bits(model: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, END, 7]])
    plain = logits(model, ids)
    with moe_runtime.steer(
        model, BETAS, thinking=("<think>", "</think>"), tokenizer=Words()
    ) as handle:
        assert torch.equal(logits(model, ids), plain)
        assert sum(handle.uses.values()) == 0


@pytest.mark.parametrize("method", ["multiply", "force", "logit_bias"])
def test_every_method_keeps_to_the_spans(model: PreTrainedModel, method: Any) -> None:
    ids = torch.tensor([[5, 6, 7, BEGIN, 8, 9]])
    plain = logits(model, ids)
    with moe_runtime.steer(
        model, {(0, 3): 9.0}, method=method, thinking=("wait then", "</think>"), tokenizer=Words()
    ):
        assert torch.equal(logits(model, ids), plain)  # that marker has two tokens
        ids[0, 2] = WAIT
        found = logits(model, ids)
    expected = logits(model, ids)
    assert close(found[:, :3], expected[:, :3])
    assert not close(found[:, 3:], expected[:, 3:])


def test_embeddings_have_no_markers(model: PreTrainedModel) -> None:
    options = {"thinking": ("<think>", "</think>"), "tokenizer": Words()}
    embeddings = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with moe_runtime.steer(model, BETAS, **options), pytest.raises(AttachError, match="token ids"):
        logits(model, inputs_embeds=embeddings)


def test_an_unknown_marker_is_refused(model: PreTrainedModel) -> None:
    with (
        pytest.raises(ConfigError, match="not in the tokenizer's vocabulary"),
        moe_runtime.steer(model, BETAS, thinking=("<thing>", "</think>"), tokenizer=Words()),
    ):
        pass


def test_batches_of_many_prompts_are_followed_by_name(tiny_checkpoints: TinyCheckpoints) -> None:
    """The scheduler moves sequences between batches; each keeps its own spans."""
    loaded = moe_runtime.from_pretrained(tiny_checkpoints.fused, expert_budget="50%", device="cpu")
    prompts = [[5, 6, 7], [BEGIN, 4, 3], [9, END, 8], [2, BEGIN, 1]]
    options = {"thinking": ("<think>", "</think>"), "tokenizer": Words()}
    assert max(map(max, prompts)) < VOCAB
    with moe_runtime.steer(loaded, {(0, 3): 4.0, (1, 2): 3.0}, **options):
        alone = [
            loaded.generate(torch.tensor([one]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
            for one in prompts
        ]
        together = moe_runtime.generate_batches(
            loaded, prompts, batch_size=2, window=2, max_new_tokens=6
        )
    assert [list(one) for one in together.outputs] == alone
