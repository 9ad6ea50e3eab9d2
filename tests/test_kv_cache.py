"""Room for keys and values: against the caches that transformers makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
)

from moe_runtime.kv_cache import kv_bytes

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "eos_token_id": None,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def held(cache: Any) -> int:
    """Bytes of all keys and values in a cache."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("config", "model", "most"),
    [
        (Qwen3MoeConfig(**COMMON, num_key_value_heads=2, head_dim=24), Qwen3MoeForCausalLM, 1.0),
        (DeepseekV3Config(**COMMON, **LATENT), DeepseekV3ForCausalLM, 1.0),
        # A window of 8 keeps 7 tokens between steps.
        (
            GptOssConfig(
                **COMMON,
                num_key_value_heads=2,
                head_dim=16,
                sliding_window=8,
                num_local_experts=4,
            ),
            GptOssForCausalLM,
            1.05,
        ),
    ],
    ids=["full", "latent", "window"],
)
def test_as_much_as_transformers_keeps(config: PreTrainedConfig, model: Any, most: float) -> None:
    batch, length = 2, 30
    config.dtype = torch.float32
    with torch.no_grad():
        out = model(config).eval()(torch.ones(batch, length, dtype=torch.long), use_cache=True)
    told = kv_bytes(config, batch=batch, length=length)
    assert held(out.past_key_values) <= told <= most * held(out.past_key_values)


def test_an_encoder_decoder_keeps_both() -> None:
    config = SwitchTransformersConfig(d_model=64, d_kv=16, num_heads=4, num_decoder_layers=3)
    config.dtype = torch.bfloat16
    layers = config.get_text_config(decoder=True).num_hidden_layers
    assert kv_bytes(config, batch=1, length=10) == 2 * 10 * layers * 2 * 4 * 16 * 2
