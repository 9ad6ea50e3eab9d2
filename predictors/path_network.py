"""The network behind the routing-path predictor: T5's encoder and decoder, and a linear head.

Knows tokens by their row in its vocabulary; knows no trace, no runtime and no file.

Legend of shapes: B sequences, S tokens of each in this call, C columns of the cache, H heads,
D width of the model, G experts of all layers together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from moe_runtime.predictors.path_cache import PathCache
from moe_runtime.predictors.path_config import PathConfig
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PathNetwork"]


class _Norm(nn.Module):
    """T5's layer norm: no mean is taken off, nothing is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)
        return out


class _Attention(nn.Module):
    """Attention without scaling, as in T5; a bias takes the place of positions."""

    def __init__(self, config: PathConfig) -> None:
        super().__init__()
        inner = config.heads * config.d_kv
        self.heads = config.heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        for linear in (self.k, self.v):
            nn.init.normal_(linear.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def split(self, x: Tensor) -> Tensor:
        """`[B, S, H * d]` to `[B, H, S, d]`."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def mix(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The weighted values `[B, S, D]`; `bias` is added to the scores `[B, H, S, C]`."""
        weights = (query @ keys.transpose(2, 3) + bias).softmax(dim=-1)
        out: Tensor = self.o((weights @ values).transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: PathConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        nn.init.normal_(self.wi.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.wo.weight, std=config.d_ff**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(functional.relu(self.wi(x)))
        return out


class _Block(nn.Module):
    """One layer: attention to its own side, in a decoder to the prompt too, feed-forward."""

    def __init__(self, config: PathConfig, *, cross: bool) -> None:
        super().__init__()
        self.attention_norm = _Norm(config.d_model)
        self.attention = _Attention(config)
        if cross:
            self.cross_norm = _Norm(config.d_model)
            self.cross = _Attention(config)
        self.feed_norm = _Norm(config.d_model)
        self.feed = _FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)


class _PositionBias(nn.Module):
    """What a distance adds to the scores, for each head: T5's relative position buckets.

    Half of the buckets are single distances, the others grow geometrically to `max_distance`. An
    encoder, which sees both sides, has half of the buckets for each.
    """

    def __init__(self, config: PathConfig, *, both_sides: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.buckets, config.heads) * config.d_model**-0.5)
        count = config.buckets // 2 if both_sides else config.buckets
        distance = torch.arange(max(config.window, config.max_distance) + 1)
        exact = count // 2
        grown = (distance.float() / exact).clamp_min(1).log()
        grown = grown / math.log(config.max_distance / exact) * (count - exact)
        bucket = (exact + grown.long()).clamp_max(count - 1)
        self._both, self._count = both_sides, count
        self.bucket: Tensor
        self.register_buffer("bucket", torch.where(distance < exact, distance, bucket), False)

    def forward(self, distance: Tensor) -> Tensor:
        """`[..., H]` for int64 distances (query minus key, what is to come is negative)."""
        bucket = self.bucket[distance.abs().clamp_max(len(self.bucket) - 1)]
        if self._both:
            bucket = bucket + (distance < 0) * self._count
        return self.weight[bucket]


class PathNetwork(nn.Module):
    """Logits of every expert of every layer for each token, from the tokens up to it.

    The arithmetic is T5's (pre-norm, RMS norms, unscaled attention, relative positions, no biases)
    with the language head replaced by one linear map to all experts of all layers.

    Args:
        vocabulary: tokens it knows; id `vocabulary` stands for every other one.
        outputs: experts of all layers together, G.
    """

    def __init__(self, config: PathConfig, *, vocabulary: int, outputs: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, config.d_model)
        self.encoder = nn.ModuleList(
            _Block(config, cross=False) for _ in range(config.encoder_layers)
        )
        if config.encoder_layers:
            self.encoder_bias = _PositionBias(config, both_sides=True)
            self.encoder_norm = _Norm(config.d_model)
        self.decoder = nn.ModuleList(
            _Block(config, cross=config.encoder_layers > 0) for _ in range(config.decoder_layers)
        )
        self.decoder_bias = _PositionBias(config, both_sides=False)
        self.decoder_norm = _Norm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model, outputs, bias=False)
        nn.init.normal_(self.head.weight, std=config.d_model**-0.5)
        if config.prior:
            self.prior = nn.Linear(config.d_model, outputs)

    # -- whole sequences -------------------------------------------------------------------------

    def encode(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read prompts.

        Args:
            ids: int64 `[B, P]`, padded on the right.
            lengths: int64 `[B]`, from 1.

        Returns:
            The prompts' states `[B, P, D]`, and `[B, 1, 1, P]`, what to add to scores on them.
        """
        places = torch.arange(ids.shape[1])
        hidden = torch.where(places < lengths[:, None], 0.0, -torch.inf)[:, None, None, :]
        bias = self.encoder_bias(places[:, None] - places).permute(2, 0, 1) + hidden
        x = self.dropout(self.embedding(ids))
        block: Any  # modules of a list have no known type
        for block in self.encoder:
            attention = block.attention
            y = block.attention_norm(x)
            query, keys, values = (
                attention.split(part(y)) for part in (attention.q, attention.k, attention.v)
            )
            x = x + block.dropout(attention.mix(query, keys, values, bias))
            x = x + block.dropout(block.feed(block.feed_norm(x)))
        return self.dropout(self.encoder_norm(x)), hidden

    def forward(self, ids: Tensor, prompt: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits `[B, S, G]` for whole sequences, padded on the right; for training.

        Args:
            ids: int64 `[B, S]`.
            prompt: what `encode` gave, if there is an encoder.
        """
        places = torch.arange(ids.shape[1])
        distance = places[:, None] - places
        bias = self.decoder_bias(distance).permute(2, 0, 1)
        bias = bias + torch.where((distance >= 0) & (distance < self.config.window), 0, -torch.inf)
        embedded = self.embedding(ids)
        x = self.dropout(embedded)
        block: Any
        for block in self.decoder:
            attention = block.attention
            y = block.attention_norm(x)
            query, keys, values = (
                attention.split(part(y)) for part in (attention.q, attention.k, attention.v)
            )
            x = x + block.dropout(attention.mix(query, keys, values, bias))
            if prompt is not None:
                x = x + block.dropout(self._cross(block, x, *self.memory(block, prompt)))
            x = x + block.dropout(block.feed(block.feed_norm(x)))
        return self._logits(x, embedded)

    def memory(self, block: nn.Module, prompt: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """A block's keys and values of prompts, `[B, H, P, d]`, and what to add to the scores."""
        cross: Any = block.cross
        states, hidden = prompt
        return cross.split(cross.k(states)), cross.split(cross.v(states)), hidden

    # -- sequences that go on --------------------------------------------------------------------

    def extend(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: PathCache,
        memory: list[tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        """Logits of the next tokens of sequences, `[B, S, G]`; the cache takes them in.

        Args:
            ids: int64 `[B, S]`, S up to `CHUNK`.
            positions: int64 `[B, S]`, place of each token in its sequence, rising by one.
            slots: int64 `[B]`, distinct.
            cache: mutated.
            memory: for each decoder layer what `memory` gives, if there is an encoder.
        """
        columns = positions % cache.columns
        cache.positions[slots[:, None], columns] = positions
        used = min(cache.columns, int(positions.max()) + 1)
        distance = positions[:, :, None] - cache.positions[slots, None, :used]
        bias = self.decoder_bias(distance).permute(0, 3, 1, 2)
        seen = (distance >= 0) & (distance < self.config.window)
        bias = bias.masked_fill(~seen[:, None], -torch.inf)
        embedded = x = self.embedding(ids)
        block: Any
        for at, block in enumerate(self.decoder):
            attention = block.attention
            y = block.attention_norm(x)
            keys, values = cache.keys[at], cache.values[at]
            # [B, S, H, d]: the advanced indices go first.
            keys[slots[:, None], :, columns] = attention.k(y).unflatten(-1, (attention.heads, -1))
            values[slots[:, None], :, columns] = attention.v(y).unflatten(-1, (attention.heads, -1))
            x = x + attention.mix(
                attention.split(attention.q(y)),
                keys[slots, :, :used],
                values[slots, :, :used],
                bias,
            )
            if memory is not None:
                x = x + self._cross(block, x, *memory[at])
            x = x + block.feed(block.feed_norm(x))
        return self._logits(x, embedded)

    def _cross(self, block: Any, x: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        cross = block.cross
        out: Tensor = cross.mix(cross.split(cross.q(block.cross_norm(x))), keys, values, hidden)
        return out

    def _logits(self, x: Tensor, embedded: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.decoder_norm(x)))
        return logits + self.prior(embedded) if self.config.prior else logits

    def size_bytes(self, item: int = 2) -> int:
        """Bytes of all weights at `item` bytes each."""
        return item * sum(parameter.numel() for parameter in self.parameters())
