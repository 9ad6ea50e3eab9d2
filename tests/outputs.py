"""What a tiny model gives for some prompts, to compare bit by bit or by distance; and a second tiny
model, of another architecture and of awkward sizes.

Does not know what is compared with what.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

import moe_runtime
from moe_runtime.errors import BudgetError
from tiny import EXPERTS, HIDDEN, TOP_K, VOCAB

NEW = 4  # tokens added to each prompt

Outputs: TypeAlias = list[torch.Tensor]
Checkpoint: TypeAlias = tuple[Path, dict[str, Any]]  # a folder, and options to load it with


def prompts() -> list[dict[str, torch.Tensor]]:
    """A prompt of twenty tokens, a single one, and a batch padded on the left."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(1, VOCAB, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :15] = 0
    return [
        {"input_ids": ids[:1], "attention_mask": mask[:1]},
        {"input_ids": ids[:1, :1], "attention_mask": mask[:1, :1]},
        {"input_ids": ids * mask, "attention_mask": mask},
    ]


def outputs(model: PreTrainedModel) -> Outputs:
    """Logits of the prompts' real tokens and of each new token, and the tokens."""
    found: Outputs = []
    for inputs in prompts():
        if inputs["input_ids"].shape[1] > 1:
            with torch.no_grad():
                prefill = model(**inputs).logits
            found.append(prefill[inputs["attention_mask"].bool()])
        if inputs["input_ids"].numel() == 20:
            continue
        result = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found += [*result.logits, result.sequences]
    return found


def same_bits(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def deviation(found: Outputs, expected: Outputs) -> float:
    """Largest difference of logits, in standard deviations of what is expected."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True) if a.dim() == 2]
    return max(float((a - b).abs().max() / b.std()) for a, b in pairs)


def least(path: Path, **options: Any) -> int:
    """The smallest budget in bytes that works."""
    with pytest.raises(BudgetError) as caught:
        moe_runtime.from_pretrained(path, expert_budget=0, device="cpu", **options)
    found = re.search(r"least that works is (\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


def load(path: Path, budget: int | str = "25%", **options: Any) -> PreTrainedModel:
    model = moe_runtime.from_pretrained(path, expert_budget=budget, device="cpu", **options)
    assert isinstance(model, PreTrainedModel)
    return model


def odd_model() -> PreTrainedModel:
    """Weights `[in, out]`, biases, and widths that are no multiple of any vector."""
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GptOssForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def load_plain(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Plain transformers with eager experts in memory of their own: bits depend on alignment."""
    auto = GptOssForCausalLM if path.name.startswith("odd") else Qwen3MoeForCausalLM
    model: PreTrainedModel = auto.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    return model.eval()
