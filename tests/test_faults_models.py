"""Options that cannot work and models that cannot be run: refused, saying what was found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import moe_runtime
from moe_runtime.errors import (
    BudgetError,
    ConfigError,
    UnsupportedModelError,
)
from running import assert_usable, load
from tiny import (
    HIDDEN,
    VOCAB,
    WIDTH,
    TinyCheckpoints,
)


@pytest.mark.parametrize("budget", [0, 1, "1%", "10KB"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_budget_below_one_layers_top_k_says_the_least_that_works(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    budget: int | str,
    threads: int,
) -> None:
    path = tiny_checkpoints.per_expert
    with pytest.raises(BudgetError, match=r"least that works is \d+ bytes") as caught:
        load(path, expert_budget=budget, reader_threads=threads)
    found = re.search(r"least that works is (\d+) bytes", str(caught.value))
    assert found is not None
    least = int(found[1])
    model = load(path, expert_budget=least, reader_threads=threads)
    assert_usable(model, prompt, eager_tokens)
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        load(path, expert_budget=least - 1, reader_threads=threads)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"expert_budget": "lots"}, "lots"),
        ({"expert_budget": -5}, "-5"),
        ({"host_budget": "8 XB"}, "8 XB"),
        ({"policy": "fifo"}, "fifo.*lru"),
        ({"reader_threads": 0}, "reader_threads"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_a_wrong_option_is_named(
    tiny_checkpoints: TinyCheckpoints, option: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        load(tiny_checkpoints.per_expert, **option)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "mxfp4"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "something_new"},
    ],
    ids=lambda fields: fields["quant_method"],
)
def test_a_quantised_checkpoint_is_refused_by_its_method(
    writable_checkpoints: TinyCheckpoints, quantisation: dict[str, Any]
) -> None:
    path = writable_checkpoints.per_expert / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "quantization_config": quantisation}))
    with pytest.raises(UnsupportedModelError, match=quantisation["quant_method"]):
        load(path.parent)


def dense_model() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def model_outside_the_interface() -> PreTrainedModel:
    return Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            intermediate_size_mlp=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@pytest.mark.parametrize(
    ("make", "hint"),
    [(dense_model, "no MoE layer"), (model_outside_the_interface, "Llama4TextExperts")],
)
def test_a_model_without_pageable_experts_is_refused(
    tmp_path: Path, make: Callable[[], PreTrainedModel], hint: str
) -> None:
    plain = make()
    implementation = plain.config._experts_implementation
    with pytest.raises(UnsupportedModelError, match=hint):
        moe_runtime.attach(plain)
    assert plain.config._experts_implementation == implementation
    plain.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=hint):
        load(tmp_path)
