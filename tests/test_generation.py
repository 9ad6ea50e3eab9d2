"""Everything that generates with a transformers model generates the same through the runtime.

Does not look inside: a plain model and one in a quarter of its experts' bytes get the same calls.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

import moe_runtime
from tiny import HIDDEN, VOCAB, WIDTH, TinyCheckpoints

NEW = 12


@pytest.fixture(scope="module")
def plain(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    model: PreTrainedModel = Qwen3MoeForCausalLM.from_pretrained(
        tiny_checkpoints.per_expert, experts_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    found = moe_runtime.from_pretrained(
        tiny_checkpoints.per_expert, expert_budget="25%", device="cpu"
    )
    assert isinstance(found, PreTrainedModel)
    return found


@pytest.fixture(autouse=True)
def whole(model: PreTrainedModel) -> Iterator[None]:
    """After each test the cache is whole, and it was used within the budget."""
    before = moe_runtime.report(model, simulate=False).counters.misses
    yield
    runtime = moe_runtime.runtime_of(model)
    runtime.check_integrity()
    assert moe_runtime.report(model, simulate=False).counters.misses >= before
    assert runtime.budget.used <= runtime.budget.total


def dense(seed: int) -> PreTrainedModel:
    """A small dense model with the same vocabulary, to draft for the other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=4,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).eval()


def prompt(batch: int = 1, length: int = 10) -> dict[str, torch.Tensor]:
    """Prompts; of several, the first is padded on the left."""
    ids = torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def repetitive() -> dict[str, torch.Tensor]:
    """A prompt in which looking a continuation up can succeed."""
    ids = torch.tensor([[5, 9, 17, 33, 5, 9, 17, 33, 5, 9, 17]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **how: Any) -> torch.Tensor:
    torch.manual_seed(123)
    tokens = model.generate(**inputs, **{"max_new_tokens": NEW, **how})  # type: ignore[operator]
    assert isinstance(tokens, torch.Tensor)
    return tokens


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "dynamic cache": {"do_sample": False, "cache_implementation": "dynamic"},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("batch", [1, 3])
def test_ways_of_generating(
    plain: PreTrainedModel, model: PreTrainedModel, how: dict[str, Any], batch: int
) -> None:
    inputs = prompt(batch)
    found = generate(model, inputs, **how)
    assert found.shape[1] == inputs["input_ids"].shape[1] + NEW
    assert torch.equal(found, generate(plain, inputs, **how))


def test_prompt_lookup(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    how = {"do_sample": False, "prompt_lookup_num_tokens": 3}
    found = generate(model, repetitive(), **how)
    assert torch.equal(found, generate(plain, repetitive(), **how))
    assert torch.equal(found, generate(plain, repetitive(), do_sample=False))


@pytest.mark.parametrize("sample", [False, True])
def test_a_dense_model_drafts(plain: PreTrainedModel, model: PreTrainedModel, sample: bool) -> None:
    draft = dense(1)
    how = {"do_sample": sample, "assistant_model": draft}
    found = generate(model, prompt(), **how)
    assert torch.equal(found, generate(plain, prompt(), **how))


def test_it_drafts_for_another(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    target = dense(2)
    found = generate(target, prompt(), do_sample=False, assistant_model=model)
    assert torch.equal(found, generate(target, prompt(), do_sample=False, assistant_model=plain))


def test_it_drafts_for_itself(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    found = generate(model, prompt(), do_sample=False, assistant_model=plain)
    assert torch.equal(found, generate(plain, prompt(), do_sample=False))
    found = generate(plain, prompt(), do_sample=False, assistant_model=model)
    assert torch.equal(found, generate(plain, prompt(), do_sample=False))


def test_a_conversation_goes_on_with_its_cache(
    plain: PreTrainedModel, model: PreTrainedModel
) -> None:
    results = []
    for each in (plain, model):
        cache = DynamicCache(config=each.config)
        first = generate(each, prompt(), do_sample=False, past_key_values=cache)
        longer = torch.cat([first, torch.tensor([[7, 8, 9, 10]])], dim=1)
        inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        results.append(generate(each, inputs, do_sample=False, past_key_values=cache))
    assert torch.equal(results[0], results[1])


def test_embeddings_instead_of_tokens(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    found = []
    for each in (plain, model):
        inputs = prompt(3)
        embeds = each.get_input_embeddings()(inputs.pop("input_ids")).detach()
        found.append(generate(each, {**inputs, "inputs_embeds": embeds}, do_sample=False))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "extras",
    [
        {"output_router_logits": True},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"logits_to_keep": 2},
    ],
    ids=lambda extras: next(iter(extras)),
)
def test_other_outputs_and_the_loss(
    plain: PreTrainedModel, model: PreTrainedModel, extras: dict[str, Any]
) -> None:
    inputs = prompt(1)
    if "logits_to_keep" not in extras:
        inputs["labels"] = inputs["input_ids"]
    with torch.no_grad():
        expected, found = plain(**inputs, **extras), model(**inputs, **extras)
    assert list(found.keys()) == list(expected.keys())
    for name, value in expected.items():
        if name == "past_key_values":
            continue
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_with_a_static_cache(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=4,
        sliding_window=4,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = MixtralForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    model = moe_runtime.from_pretrained(tmp_path, expert_budget="50%", device="cpu")
    for batch in (1, 3):
        how = {"do_sample": False, "cache_implementation": "static"}
        found = generate(model, prompt(batch), **how)
        assert torch.equal(found, generate(plain, prompt(batch), **how))
    # Every token of the long prompt was computed, and none of the padding.
    tokens = [step.tokens for step in moe_runtime.runtime_of(model).profiler.steps]
    assert tokens[0] == 10
    assert tokens[NEW] == 3 * 10 - 4


# -- the compiler --------------------------------------------------------------------------------

BACKENDS = [
    "eager",
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model(plain: PreTrainedModel, model: PreTrainedModel, backend: str) -> None:
    compiled: Any = torch.compile(model, backend=backend)
    try:
        for length in (10, 1):
            inputs = prompt(1, length)
            with torch.no_grad():
                torch.testing.assert_close(
                    compiled(**inputs).logits, plain(**inputs).logits, rtol=1e-3, atol=1e-3
                )
        assert torch.equal(
            generate(compiled, prompt(), do_sample=False),
            generate(plain, prompt(), do_sample=False),
        )
    finally:
        torch.compiler.reset()


def test_a_compiled_forward_with_a_static_cache(
    plain: PreTrainedModel, tiny_checkpoints: TinyCheckpoints
) -> None:
    model = moe_runtime.from_pretrained(tiny_checkpoints.fused, expert_budget="25%", device="cpu")
    model.forward = torch.compile(model.forward, backend="eager")
    how = {"do_sample": False, "cache_implementation": "static"}
    try:
        found = generate(model, prompt(), **how)
    finally:
        torch.compiler.reset()
    assert torch.equal(found, generate(plain, prompt(), **how))


# -- pipelines and streams -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each number of the vocabulary."""
    words = {"[PAD]": 0, **{f"w{number}": number for number in range(1, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[PAD]", padding_side="left"
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_text_generation_pipeline(
    plain: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
) -> None:
    texts = ["w5 w9 w17", "w3 w4 w88 w100 w2 w61"]
    found = [
        pipeline("text-generation", model=each, tokenizer=tokenizer)(
            texts, max_new_tokens=NEW, do_sample=False, batch_size=batch_size
        )
        for each in (plain, model)
    ]
    assert found[0] == found[1]
    assert len(found[1]) == len(texts)


def test_text_is_streamed(
    model: PreTrainedModel, plain: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(
        target=model.generate,  # type: ignore[arg-type]
        kwargs={**prompt(), "max_new_tokens": NEW, "do_sample": False, "streamer": streamer},
    )
    thread.start()
    text = "".join(streamer)
    thread.join(timeout=60)
    expected = generate(plain, prompt(), do_sample=False)[0, 10:]
    assert text.split() == tokenizer.decode(expected).split()


# -- sizes and names -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_plain_model(
    tiny_checkpoints: TinyCheckpoints, dtype: torch.dtype
) -> None:
    path = tiny_checkpoints.per_expert
    plain = Qwen3MoeForCausalLM.from_pretrained(path, dtype=dtype)
    model = moe_runtime.from_pretrained(path, expert_budget="25%", device="cpu", dtype=dtype)
    assert type(model) is Qwen3MoeForCausalLM
    assert model.dtype == dtype
    for options in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**options) == plain.num_parameters(**options)
    assert model.get_memory_footprint() == plain.get_memory_footprint()
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_the_saved_configuration_names_the_architecture(
    plain: PreTrainedModel, model: PreTrainedModel, tmp_path: Path
) -> None:
    found = []
    for number, each in enumerate((plain, model)):
        folder = tmp_path / str(number)
        each.save_pretrained(folder)
        found.append(
            {
                name: json.loads((folder / name).read_text())
                for name in ("config.json", "generation_config.json")
            }
        )
    assert found[0]["config.json"]["architectures"] == ["Qwen3MoeForCausalLM"]
    assert found[1] == found[0]
