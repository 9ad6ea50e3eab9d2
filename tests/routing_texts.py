"""Traces in which the routing of a token follows from its id and the id before it."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_runtime.trace import DECODE, RoutingTrace

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 40


def text_trace(
    *, sequences: int = 24, length: int = 30, prompt: int | None = None,
    tokens: int = TOKENS, seed: int = 0,
    **description: Any,
) -> RoutingTrace:  # fmt: skip
    """Random token ids 5, 8, 11, ...; experts of layer l: by the token, by the token before.

    Args:
        tokens: different ids.
        prompt: tokens of each sequence that are prefill; all if not given.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(tokens, size=(sequences, length))
    before = np.roll(drawn, 1, axis=1)
    before[:, 0] = 0
    layer = np.arange(LAYERS)
    own = (drawn[..., None] + layer) % EXPERTS
    other = (before[..., None] * 3 + layer) % EXPERTS
    other = np.where(other == own, (own + 1) % EXPERTS, other)
    ids = np.stack([own, other], axis=-1).reshape(-1, LAYERS, TOP_K).astype(np.uint16)
    positions = np.tile(np.arange(length), sequences)
    generated = positions >= (length if prompt is None else prompt)
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=np.full(ids.shape, 1 / TOP_K, np.float16),
        token_ids=(5 + 3 * drawn).reshape(-1).astype(np.int32),
        sequence_ids=np.repeat(np.arange(sequences), length).astype(np.int32),
        positions=positions.astype(np.int32),
        phase=np.where(generated, DECODE, 0).astype(np.uint8),
        step_ids=np.arange(sequences * length, dtype=np.int32),
        layer_ids=tuple(range(1, 1 + LAYERS)),
        experts=(EXPERTS,) * LAYERS,
        **{"model_id": "texts", "fingerprint": "beef", **description},
    )
