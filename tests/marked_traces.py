"""Small traces with marker tokens, counted naively, for tests of identification."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_runtime.steering.markers import Marker
from moe_runtime.trace import UNUSED, RoutingTrace

START, END = 1, 2
PAIR = (3, 4)  # a marker of two tokens
MARKERS = {
    Marker(text="start", variants=((START,),)): 1.0,
    Marker(text="end", variants=((END,),)): -1.0,
    Marker(text="pair", variants=(PAIR, (5,))): -0.5,
}


def random_trace(
    seed: int,
    *,
    sequences: int = 6,
    length: int = 30,
    layers: int = 3,
    unused: float = 0.1,
    unknown: float = 0.0,
    **changes: Any,
) -> RoutingTrace:
    """Every sequence has each marker; some entries are unused, some layers did not run."""
    random = np.random.default_rng(seed)
    experts = tuple(int(random.integers(3, 9)) for _ in range(layers))
    tokens = random.integers(6, 12, (sequences, length))
    tokens[:, 1], tokens[:, length // 2] = START, END
    tokens[:, 3:5] = PAIR
    rows = sequences * length
    ids = np.stack(
        [np.stack([random.permutation(count)[:3] for _ in range(rows)]) for count in experts],
        axis=1,
    ).astype(np.uint16)
    ids[random.random(ids.shape) < unused] = UNUSED
    ids[random.random(ids.shape[:2]) < unused] = UNUSED
    flat = tokens.reshape(-1).astype(np.int32)
    flat[random.random(rows) < unknown] = -1
    values: dict[str, Any] = {
        "topk_ids": ids,
        "topk_weights": np.zeros(ids.shape, np.float16),
        "token_ids": flat,
        "sequence_ids": np.repeat(np.arange(sequences), length).astype(np.int32),
        "positions": np.tile(np.arange(length), sequences).astype(np.int32),
        "phase": np.tile(np.arange(length) >= 3, sequences).astype(np.uint8),
        "step_ids": np.zeros(rows, np.int32),
        "layer_ids": tuple(range(1, layers + 1)),
        "experts": experts,
        "model_id": "marked",
        "fingerprint": "beef",
        "tokenizer_id": "some/tokenizer",
    }
    return RoutingTrace(**values | changes)


def rows_in_order(trace: RoutingTrace) -> list[list[int]]:
    """Rows of each sequence by position."""
    found: dict[int, list[int]] = {}
    for row in np.lexsort((trace.positions, trace.sequence_ids)).tolist():
        found.setdefault(int(trace.sequence_ids[row]), []).append(row)
    return list(found.values())


def naive_ends(trace: RoutingTrace, marker: Marker) -> set[int]:
    """Rows at which a marker ends, token by token."""
    found = set()
    for rows in rows_in_order(trace):
        for at in range(len(rows)):
            for ids in marker.variants:
                part = rows[at - len(ids) + 1 : at + 1] if at >= len(ids) - 1 else []
                if [int(trace.token_ids[row]) for row in part] == list(ids):
                    found.add(rows[at])
    return found


def naive_npmi(trace: RoutingTrace, marker: Marker, *, prompt: bool = True) -> list[list[float]]:
    """`[layers][experts]`, by the definition; NaN where the marker has no row in the layer."""
    ends = naive_ends(trace, marker)
    counted = [
        row
        for row in range(len(trace))
        if trace.token_ids[row] >= 0 and (prompt or trace.phase[row] == 1)
    ]
    table = []
    for layer, count in enumerate(trace.experts):
        chosen = {row: set(trace.topk_ids[row, layer].tolist()) - {UNUSED} for row in counted}
        ran = [row for row in counted if chosen[row]]
        line = []
        for expert in range(count):
            x = sum(row in ends for row in ran)
            y = sum(expert in chosen[row] for row in ran)
            both = sum(row in ends and expert in chosen[row] for row in ran)
            if not x:
                line.append(math.nan)
            elif not both:
                line.append(-1.0)
            elif both == len(ran):
                line.append(1.0)
            else:
                share = both / len(ran)
                mutual = math.log2(share / (x / len(ran) * y / len(ran)))
                line.append(mutual / -math.log2(share))
        table.append(line)
    return table
