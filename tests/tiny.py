"""One tiny seeded Qwen3-MoE model, its sizes, and the forms in which it is saved.

Does not know the runtime: this is plain transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, VOCAB = 4, 16, 4, 32, 24, 128
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4  # gate, up and down in float32
ALL_EXPERT_BYTES = LAYERS * EXPERTS * EXPERT_BYTES
SHARD_SIZE = "100KB"  # about nine shards
FORMS = ("per_expert", "fused", "per_expert_sharded", "fused_sharded")


def tiny_config() -> Qwen3MoeConfig:
    """4 MoE layers of 16 experts, top-4, hidden 32; never stops early, weights large enough that
    routing differs between tokens and matters."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        initializer_range=0.5,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def tiny_model() -> PreTrainedModel:
    """The model of `tiny_config` with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        return Qwen3MoeForCausalLM(tiny_config()).eval()


@dataclass(frozen=True, kw_only=True)
class TinyCheckpoints:
    """Folders of one tiny model in each stored form.

    Args:
        per_expert: a tensor for each expert and projection, as checkpoints are published.
        fused: `[experts, ...]` tensors, as transformers holds them.
        per_expert_sharded: the first in many shards with an index.
        fused_sharded: the second in many shards with an index.
    """

    per_expert: Path
    fused: Path
    per_expert_sharded: Path
    fused_sharded: Path

    def form(self, name: str) -> Path:
        """The folder of a form by its name in `FORMS`."""
        path = getattr(self, name)
        assert isinstance(path, Path)
        return path


FORMS = ("per_expert", "fused", "per_expert_sharded", "fused_sharded")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def expert_shard(folder: Path) -> Path:
    """The shard that holds the last expert's down projection of the last layer."""
    for path in shards(folder):
        if any(".experts." in key and "layers.3" in key for key in load_file(path)):
            return path
    raise AssertionError("no shard with experts")
