"""Owns which routing the GPU measurement replays: a real model's, mapped to the measured shape.

Does not know models, devices or the runtime.

No trace at hand has 48 layers of 128 experts with eight choices. The nearest, Qwen3.6-35B-A3B, has
40 layers of 256 with eight: experts are folded (`id mod 128`; of two choices that meet, the later
moves on to the next expert that the token has not chosen), and the model's further layers replay
the trace's first ones anew with their experts renumbered (seeded), so that no layer repeats what
the one before it chose. What that does to the reuse of experts is measured (`figures`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.eviction import make_policy
from moe_runtime.simulate import simulate
from moe_runtime.trace import DECODE, PREFILL, RoutingTrace
from shared_traces import load_shared_traces

__all__ = ["DEFAULT_TRACE", "drawn_trace", "figures", "load_mapped", "mapped"]

DEFAULT_TRACE = "qwen3.6-35b-a3b"
SEED = 6


def mapped(trace: RoutingTrace, layers: int, experts: int) -> RoutingTrace:
    """The trace on `layers` layers of `experts` experts each; tokens, weights and K stay."""
    rows, known, choices = trace.topk_ids.shape
    if choices > experts:
        raise ValueError(f"{choices} choices a token do not fit {experts} experts")
    draw = np.random.default_rng(SEED)
    ids = np.empty((rows, layers, choices), np.uint16)
    weights = np.empty((rows, layers, choices), np.float16)
    for layer in range(layers):
        source = layer % known
        chosen = folded(trace.topk_ids[:, source].astype(np.int64), experts)
        if layer >= known:
            chosen = draw.permutation(experts)[chosen]
        ids[:, layer] = chosen
        weights[:, layer] = trace.topk_weights[:, source]
    return replace(
        trace,
        topk_ids=ids,
        topk_weights=weights,
        layer_ids=tuple(range(layers)),
        experts=(experts,) * layers,
        top_k=(choices,) * layers,
    )


def folded(ids: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """Distinct experts below `experts` for each row of `ids [N, K]`."""
    found = ids % experts
    for row in found:
        taken: set[int] = set()
        for place, expert in enumerate(row.tolist()):
            free = next(
                other
                for step in range(experts)
                if (other := (expert + step) % experts) not in taken
            )
            taken.add(free)
            row[place] = free
    return found


def load_mapped(folder: Path, name: str, layers: int, experts: int) -> tuple[RoutingTrace, Any]:
    """(the mapped trace, figures of it beside the recorded one's).

    Raises:
        TraceError: the folder is not the one of the shared traces.
    """
    recorded = load_shared_traces(folder)[name][0]
    trace = mapped(recorded, layers, experts)
    return trace, {
        "trace": name,
        "mapping": f"{len(recorded.layer_ids)} layers of {recorded.experts[0]} experts, "
        f"{recorded.topk_ids.shape[2]} choices, to {layers} of {experts}: experts modulo "
        f"{experts}, collisions to the next free one; layers after the "
        f"{len(recorded.layer_ids)}th repeat the first with experts renumbered, seed {SEED}",
        "recorded": figures(recorded),
        "replayed": figures(trace),
    }


def drawn_trace(layers: int, experts: int, choices: int, *, prompt: int, decode: int) -> Any:
    """A trace of drawn routing in which half of a token's experts were the last token's.

    For dry runs without recordings; nothing is to be concluded from it.
    """
    draw = np.random.default_rng(SEED)
    rows = prompt + decode
    ids = np.empty((rows, layers, choices), np.uint16)
    for layer in range(layers):
        before = draw.permutation(experts)[:choices]
        for row in range(rows):
            rest = np.setdiff1d(draw.permutation(experts), before[: choices // 2])
            fresh = draw.permutation(rest)[: choices - choices // 2]
            before = np.concatenate([before[: choices // 2], fresh])
            ids[row, layer] = before = draw.permutation(before)
    steps = np.concatenate([np.zeros(prompt), 1 + np.arange(decode)])
    phase = np.concatenate([np.full(prompt, PREFILL), np.full(decode, DECODE)])
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=np.full(ids.shape, 1 / choices, np.float16),
        token_ids=draw.integers(0, 64, rows).astype(np.int32),
        sequence_ids=np.zeros(rows, np.int32),
        positions=np.arange(rows, dtype=np.int32),
        phase=phase.astype(np.uint8),
        step_ids=steps.astype(np.int32),
        layer_ids=tuple(range(layers)),
        experts=(experts,) * layers,
    )


def figures(trace: RoutingTrace) -> dict[str, Any]:
    """How a trace's decoding reuses experts: overlap of neighbours, LRU's hit rate by budget."""
    decode = trace.decode()
    ids = decode.topk_ids
    shared = (ids[1:, :, :, None] == ids[:-1, :, None, :]).any(-1).mean()
    accesses = decode.accesses()
    rates = {}
    for share in (0.125, 0.25, 0.5):
        slots = int(share * trace.grid.size)
        done = simulate(make_policy("lru", trace.grid), trace.grid, accesses, slots)
        rates[f"{share:.1%}"] = round(done.hits / (done.hits + done.misses), 4)
    return {
        "decoded_tokens": len(decode),
        "overlap_of_consecutive_tokens": round(float(shared), 4),
        "lru_hit_rate_from_cold_by_budget": rates,
    }
