"""Synthetic routing with known homes, for tests of planning."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_runtime.trace import RoutingTrace

LAYERS, EXPERTS, DEVICES, TOP_K = 4, 16, 4, 2


def planted_homes(
    layers: int = LAYERS, experts: int = EXPERTS, devices: int = DEVICES, seed: int = 17
) -> np.ndarray:
    """int64 `[L, E]`: the home of each expert, equally many for each device."""
    rng = np.random.default_rng(seed)
    even = np.arange(experts) * devices // experts
    return np.stack([rng.permutation(even) for _ in range(layers)])


def planted_trace(
    *,
    tokens: int = 600,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    devices: int = DEVICES,
    top_k: int = TOP_K,
    stay: float = 0.8,
    sequences: int = 10,
    seed: int = 0,
    first_layer: int = 1,
    **description: Any,
) -> RoutingTrace:
    """Tokens that keep to the experts of one home with probability `stay`, in every layer anew.

    Layers have the absolute indices `first_layer`, `first_layer + 1`, ...
    """
    homes = planted_homes(layers, experts, devices)
    rng = np.random.default_rng(seed + 1)
    home = rng.integers(devices, size=tokens)
    ids = np.zeros((tokens, layers, top_k), dtype=np.uint16)
    for row in range(tokens):
        for layer in range(layers):
            here = home[row] if rng.random() < stay else rng.integers(devices)
            own = np.flatnonzero(homes[layer] == here)
            ids[row, layer] = rng.choice(own, top_k, replace=False)
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=np.full(ids.shape, 1 / top_k, dtype=np.float16),
        token_ids=rng.integers(1000, size=tokens).astype(np.int32),
        sequence_ids=np.sort(rng.integers(sequences, size=tokens)).astype(np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        phase=(np.arange(tokens) % 3 == 0).astype(np.uint8),
        step_ids=np.arange(tokens, dtype=np.int32),
        layer_ids=tuple(range(first_layer, first_layer + layers)),
        experts=(experts,) * layers,
        **{"model_id": "planted", "fingerprint": "f00d", **description},
    )
