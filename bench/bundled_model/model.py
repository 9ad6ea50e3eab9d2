"""Owns the shape of the bundled model, its loss, and its export in Hugging Face format.

Does not know data or the schedule of training.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bundled_model.data import IGNORED
from bundled_model.tokenizer import BEGIN, END, PAD, as_transformers, id_of

CONTEXT = 512  # positions the finished model is meant for


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3-MoE model; every layer is an MoE layer."""

    layers: int = 6
    experts: int = 32
    top_k: int = 4
    hidden: int = 128
    expert_width: int = 64
    heads: int = 4
    key_value_heads: int = 2
    head_width: int = 32


def build(shape: Shape, tokenizer: Tokenizer, seed: int) -> Qwen3MoeForCausalLM:
    """A model with random weights in float32, the same for the same seed."""
    config = Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.hidden,
        intermediate_size=shape.expert_width * shape.top_k,
        moe_intermediate_size=shape.expert_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=id_of(tokenizer, BEGIN),
        eos_token_id=id_of(tokenizer, END),
        pad_token_id=id_of(tokenizer, PAD),
    )
    config.head_dim = shape.head_width
    torch.manual_seed(seed)
    model: Qwen3MoeForCausalLM = Qwen3MoeForCausalLM._from_config(
        config, experts_implementation="grouped_mm"
    )
    return model


def losses(model: Qwen3MoeForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token in nats, and the mean over layers of the balance loss.

    The balance loss is E/k times the sum over experts of (share of tokens routed there) times
    (mean router probability): 1 when even. It is taken layer by layer; transformers' own joins
    all layers first, so that two lopsided layers can cancel out.
    """
    out = model.model(ids, use_cache=False, output_router_logits=True)
    wanted = labels[:, 1:].flatten()
    learned = (wanted != IGNORED).nonzero().squeeze(1)  # the head is a third of the work
    hidden = out.last_hidden_state[:, :-1].flatten(0, 1)[learned]
    entropy = cross_entropy(model.lm_head(hidden), wanted[learned])
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    balance = []
    for logits in out.router_logits:
        chosen = logits.topk(top_k, dim=-1).indices.flatten()
        load = torch.bincount(chosen, minlength=experts) / len(logits)
        balance.append((load * logits.softmax(dim=-1).mean(dim=0)).sum() * experts / top_k)
    return entropy, torch.stack(balance).mean()


def export(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, folder: Path) -> int:
    """Writes bf16 weights, configuration, generation settings and tokenizer; bytes written.

    The folder is made beside its final place and renamed; files of an earlier export go.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(temporary)
    as_transformers(tokenizer, CONTEXT).save_pretrained(temporary)
    for path in temporary.iterdir():  # safetensors writes files that others cannot read
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return sum(path.stat().st_size for path in folder.iterdir())
