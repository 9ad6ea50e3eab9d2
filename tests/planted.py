"""Routing traces at random and with a planted placement, and placements at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from moe_runtime.placement.plan import BoolArray

from moe_runtime.core import IntArray
from moe_runtime.trace import UNUSED, RoutingTrace


def trace_of(
    ids: np.ndarray,
    experts: Sequence[int],
    *,
    weights: np.ndarray | None = None,
    token_ids: np.ndarray | None = None,
    sequence_ids: np.ndarray | None = None,
    first_layer: int = 0,
) -> RoutingTrace:
    """A trace of `ids [N, L, K]`; what is not given is of no interest."""
    rows, layers, _ = ids.shape
    if weights is None:
        weights = np.where(ids == UNUSED, 0.0, 1.0 / ids.shape[2])
    if token_ids is None:
        token_ids = np.arange(rows)
    if sequence_ids is None:
        sequence_ids = np.zeros(rows)
    return RoutingTrace(
        topk_ids=ids.astype(np.uint16),
        topk_weights=weights.astype(np.float16),
        token_ids=token_ids.astype(np.int32),
        sequence_ids=sequence_ids.astype(np.int32),
        positions=np.arange(rows, dtype=np.int32),
        phase=np.zeros(rows, dtype=np.uint8),
        step_ids=np.arange(rows, dtype=np.int32),
        layer_ids=tuple(range(first_layer, first_layer + layers)),
        experts=tuple(experts),
    )


@st.composite
def random_traces(draw: st.DrawFn, *, least_layers: int = 1) -> RoutingTrace:
    """Few tokens, layers of different sizes, entries that name no expert, weights, repeated
    tokens and unknown ones."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, width = draw(st.integers(least_layers, 4)), draw(st.integers(1, 3))
    rows = draw(st.integers(1, 25))
    experts = tuple(int(count) for count in rng.integers(1, 7, layers))
    ids = np.full((rows, layers, width), UNUSED)
    for row in range(rows):
        for layer, count in enumerate(experts):
            chosen = rng.permutation(count)[:width]
            ids[row, layer, : len(chosen)] = chosen
    ids[rng.random(ids.shape) < 0.2] = UNUSED
    return trace_of(
        ids,
        experts,
        weights=np.where(ids == UNUSED, 0.0, rng.random(ids.shape)),
        token_ids=rng.integers(-1, 6, rows),
        sequence_ids=np.sort(rng.integers(0, 4, rows)),
        first_layer=int(rng.integers(0, 3)),
    )


def planted_trace(
    layers: int,
    experts: int,
    devices: int,
    *,
    tokens: int = 1500,
    stay: float = 0.9,
    top_k: int = 2,
    nodes: int = 1,
    stay_in_node: float = 0.0,
    sequences: int = 8,
    heavy: float = 0.0,
    seed: int = 0,
) -> tuple[RoutingTrace, list[IntArray]]:
    """Tokens that walk over devices, and the home of each layer's experts.

    From layer to layer a token stays with its device with probability `stay`, else with its node
    with probability `stay_in_node`, else it goes anywhere; it takes `top_k` experts of its device,
    some more often than others by `heavy`.
    """
    rng = np.random.default_rng(seed)
    even = np.repeat(np.arange(devices), experts // devices)
    homes = [rng.permutation(even) for _ in range(layers)]
    inside = devices // nodes
    at = rng.integers(devices, size=tokens)
    ids = np.zeros((tokens, layers, top_k), dtype=np.int64)
    for layer, home in enumerate(homes):
        if layer:
            moves = rng.random(tokens) >= stay
            near = at // inside * inside + rng.integers(inside, size=tokens)
            far = rng.integers(devices, size=tokens)
            at = np.where(moves, np.where(rng.random(tokens) < stay_in_node, near, far), at)
        popular = heavy * rng.standard_normal(experts)
        keys = rng.gumbel(size=(tokens, experts)) + popular
        keys[home[None, :] != at[:, None]] = -np.inf
        ids[:, layer] = np.argsort(-keys, axis=1)[:, :top_k]
    sequence_ids = np.arange(tokens) * sequences // tokens
    return trace_of(ids, (experts,) * layers, sequence_ids=sequence_ids), homes


def held_by(homes: Sequence[IntArray], devices: int) -> list[BoolArray]:
    """The placement of homes, for each layer bool `[E, G]`."""
    return [home[:, None] == np.arange(devices) for home in homes]


def random_placement_of(
    experts: Sequence[int], devices: int, rng: np.random.Generator, *, replicas: bool
) -> list[BoolArray]:
    """Every expert on some device, with `replicas` on some more."""
    placement = []
    for count in experts:
        held = np.arange(devices) == rng.integers(devices, size=count)[:, None]
        if replicas:
            held |= rng.random(held.shape) < 0.3
        placement.append(held)
    return placement
