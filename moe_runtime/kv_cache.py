"""Bytes that keys and values take, from a model's configuration.

Does not know budgets; holds no cache.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

__all__ = ["kv_bytes"]

# What transformers calls layers that keep no more than a window of keys and values.
_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def kv_bytes(config: PreTrainedConfig, *, batch: int, length: int) -> int:
    """Bytes of the keys and values of `batch` sequences of `length` tokens.

    Layers with a window keep its tokens at most; layers whose state does not grow with length
    (linear attention) are counted as if it did, which is more than they take at usual lengths.
    Of latent attention (DeepSeek) transformers keeps the latent, one for all heads.
    Encoder-decoder models keep the encoder's keys and values too, counted at the same length.
    """
    text = config.get_text_config(decoder=True)
    layers = _whole(text, "num_hidden_layers")
    dtype = getattr(text, "dtype", None)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * layers)
    tokens = sum(min(length, _window(text, kind) or length) for kind in kinds)
    if getattr(config, "is_encoder_decoder", False):
        tokens *= 2
    return batch * tokens * _numbers(text) * size


def _numbers(text: PreTrainedConfig) -> int:
    """Numbers that one token's key and value in one layer are."""
    latent = _whole(text, "kv_lora_rank")
    if latent:
        return latent + _whole(text, "qk_rope_head_dim")
    heads = _whole(text, "num_key_value_heads") or _whole(text, "num_attention_heads")
    width = _whole(text, "head_dim") or _whole(text, "d_kv")
    if not width:
        width = _whole(text, "hidden_size") // (_whole(text, "num_attention_heads") or 1)
    return 2 * heads * width


def _window(text: PreTrainedConfig, kind: str) -> int:
    """Tokens that a layer of this kind keeps at most; 0 for no limit."""
    return _whole(text, _WINDOWED[kind]) if kind in _WINDOWED else 0


def _whole(config: PreTrainedConfig, name: str) -> int:
    return int(getattr(config, name, 0) or 0)
