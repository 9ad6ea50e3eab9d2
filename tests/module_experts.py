"""Tiny models whose experts are modules of their own, outside transformers' experts interface: the
two encoder-decoder architectures that transformers has, and one as remote code would define it.

Does not know the runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

EXPERTS, HIDDEN, WIDTH, VOCAB, CAPACITY = 8, 32, 48, 96, 4
PAD = 0


def switch_config() -> SwitchTransformersConfig:
    """2 MoE layers in each stack, top-1, so little capacity that prompts overflow it."""
    return SwitchTransformersConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=EXPERTS,
        expert_capacity=CAPACITY,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=None,
    )


def nllb_config() -> NllbMoeConfig:
    """2 MoE layers in each stack, top-2, biases."""
    return NllbMoeConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=4,
        decoder_layers=4,
        encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=EXPERTS,
        expert_capacity=CAPACITY,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        decoder_start_token_id=2,
        eos_token_id=None,
    )


class Expert(nn.Module):
    """One expert."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Linear(HIDDEN, WIDTH)
        self.fall = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fall(torch.nn.functional.silu(self.rise(hidden)))
        return found


class Block(nn.Module):
    """A router and a plain list of experts, which this block itself loops over.

    Args:
        order: `"up"`: used experts in ascending order; `"down"`: descending; `"all"`: every
            expert, those without tokens with none; `"secret"`: as up, but the router's scores are
            not what decides.
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.order = EXPERTS, 2, order
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden.reshape(-1, HIDDEN)
        logits = self.gate(flat)
        scores = logits.roll(1, 1) if self.order == "secret" else logits
        weights, chosen = scores.softmax(-1).topk(self.top_k, dim=-1)
        output = torch.zeros_like(flat)
        numbers = range(EXPERTS)
        for number in reversed(numbers) if self.order == "down" else numbers:
            rows, places = torch.where(chosen == number)
            if len(rows) or self.order == "all":
                found = self.experts[number](flat[rows]) * weights[rows, places, None]
                output.index_add_(0, rows, found)
        return output.view_as(hidden), logits


class RemoteConfig(PreTrainedConfig):
    model_type = "remote_moe"

    def __init__(self, order: str = "up", **options: Any) -> None:
        self.order = order
        self.hidden_size, self.num_hidden_layers, self.vocab_size = HIDDEN, 3, VOCAB
        super().__init__(**options)


class RemoteModel(PreTrainedModel):
    """Layers of blocks only; the first one is dense."""

    config_class = RemoteConfig
    base_model_prefix = "model"

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        blocks = [Block(config.order) for _ in range(config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Expert()})])
        self.layers.extend(nn.ModuleDict({"mlp": block}) for block in blocks)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            found = layer["mlp"](hidden)
            hidden = hidden + (found[0] if isinstance(found, tuple) else found)
        return CausalLMOutput(logits=self.head(hidden))


BUILDERS: dict[str, Any] = {
    "switch": lambda: SwitchTransformersForConditionalGeneration(switch_config()),
    "nllb": lambda: NllbMoeForConditionalGeneration(nllb_config()),
    **{
        order: lambda order=order: RemoteModel(RemoteConfig(order=order))
        for order in ("up", "down", "all", "secret")
    },
}


def build(name: str) -> PreTrainedModel:
    """A model of `BUILDERS` with the same weights every time, large enough to route differently."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model: PreTrainedModel = BUILDERS[name]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    model.tie_weights()
    return model.eval()


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Experts in memory of their own: a checkpoint is mapped at whatever byte a tensor starts, and
    the bits of a matrix product depend on the alignment of its operands."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    return model.eval()


def load_plain(name: str, path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Plain transformers."""
    return aligned(type(build(name)).from_pretrained(path, dtype=dtype))


def batch() -> dict[str, torch.Tensor]:
    """Three prompts, two of them padded on the right as encoders are fed."""
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def outputs(model: Any, **options: Any) -> list[torch.Tensor]:
    """Logits of a whole call, and scores and tokens of `generate`; of a remote model the first."""
    inputs = batch()
    if isinstance(model, RemoteModel):
        with torch.no_grad():
            return [model(**inputs).logits, model(inputs["input_ids"][:1, :1]).logits]
    decoder = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=decoder).logits
    result = model.generate(
        **inputs,
        **{"max_new_tokens": 6, "do_sample": False, **options},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [whole, *result.logits, result.sequences]


AutoConfig.register("remote_moe", RemoteConfig, exist_ok=True)
AutoModelForCausalLM.register(RemoteConfig, RemoteModel, exist_ok=True)
