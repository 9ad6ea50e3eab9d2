"""From arrays of expert numbers to checked rows of a `RoutingTrace`.

Knows no engine and no file form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import TraceError
from moe_runtime.importers.facts import Facts
from moe_runtime.trace import DECODE, PREFILL, UNUSED, RoutingTrace

__all__ = ["CALL_ROWS", "Layers", "checked_ids", "checked_weights", "sequence_rows"]

CALL_ROWS = 8192  # rows of a prompt that count as one forward call, as in chunked prefill
_LARGEST_HALF = 65504.0  # of float16
_LARGEST_INT = np.iinfo(np.int32).max

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The MoE layers of a recording: absolute index and experts of each, experts a token."""

    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]


def checked_ids(name: str, ids: Array, layers: Layers, *, first_row: int = 0) -> NDArray[np.uint16]:
    """Expert numbers as a trace holds them: uint16 `[N, L, K]`, 65535 for -1 (nothing chosen).

    Args:
        name: the file or what in it, for messages.
        ids: any integer type `[N, L, K]`, -1 where nothing was chosen.
        layers: what the numbers must fit.
        first_row: the token's number that row 0 has in messages.

    Raises:
        TraceError: a number out of range, or one expert twice for a token; names both.
    """
    limits = np.array(layers.experts, np.int64)
    signed = ids.dtype.kind == "i"
    # Extremes by layer are far cheaper than a mask of all entries, and nearly always enough.
    if ids.size and (
        np.any(ids.max(axis=(0, 2)).astype(np.int64) >= limits) or (signed and ids.min() < -1)
    ):
        wrong = (ids >= limits[None, :, None]) | ((ids < -1) if signed else False)
        row, at, slot = (int(i) for i in np.argwhere(wrong)[0])
        raise TraceError(
            f"{name}: token {first_row + row} layer {layers.layer_ids[at]}: expert "
            f"{int(ids[row, at, slot])}, but the layer has {layers.experts[at]} experts"
        )
    result = ids.astype(np.uint16)  # -1 becomes 65535
    ordered = np.sort(result, axis=2)
    same = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != UNUSED)
    if same.any():
        row, at, slot = (int(i) for i in np.argwhere(same)[0])
        raise TraceError(
            f"{name}: token {first_row + row} layer {layers.layer_ids[at]}: expert "
            f"{int(ordered[row, at, slot])} is chosen twice; a router chooses distinct experts"
        )
    return result


def checked_weights(
    name: str, weights: Array, layer_ids: Sequence[int], *, first_row: int = 0
) -> NDArray[np.float16]:
    """Routing weights `[N, L, K]` as float16; TraceError if one is negative or no number."""
    wrong = ~((weights >= 0) & (weights <= _LARGEST_HALF))  # NaN is neither
    if wrong.any():
        row, at, slot = (int(i) for i in np.argwhere(wrong)[0])
        raise TraceError(
            f"{name}: token {first_row + row} layer {layer_ids[at]}: routing weight "
            f"{weights[row, at, slot]}; weights are finite, 0 or more, at most {_LARGEST_HALF:.0f}"
        )
    return weights.astype(np.float16)


def sequence_rows(
    name: str,
    ids: Array,
    layers: Layers,
    facts: Facts,
    *,
    sequence: int,
    first_row: int = 0,
    first_position: int = 0,
    prompt_tokens: int | None = None,
    positions: Array | None = None,
    token_ids: Array | None = None,
    weights: Array | None = None,
    model_id: str = "",
) -> RoutingTrace:
    """Rows of one sequence: its prompt ran as one forward call (or chunks), each later token alone.

    Args:
        name, ids, layers, first_row: see `checked_ids`. `first_row` is counted in the sequence.
        facts: names the model, before `model_id`.
        sequence: its number in the trace.
        first_position: place of the sequence's row 0 in the text.
        prompt_tokens: rows of the sequence that are prompt; None if unknown, then all are.
        positions: int64 `[N]` places instead of counted ones.
        token_ids: int64 `[N]`; unknown if None.
        weights: `[N, L, K]`; 0, which says unknown, if None.
    """
    count = len(ids)
    at = first_row + np.arange(count)
    limit = _LARGEST_INT if prompt_tokens is None else prompt_tokens
    decoding = at >= limit
    prompt_calls = -(-min(limit, first_row + count) // CALL_ROWS)
    steps = np.where(decoding, prompt_calls + at - limit, at // CALL_ROWS)
    places = first_position + at if positions is None else positions
    if count and (int(places.min()) < 0 or int(places.max()) > _LARGEST_INT):
        raise TraceError(f"{name}: positions reach {int(places.max())}; a place is 0 to 2^31 - 1")
    tokens = np.full(count, -1) if token_ids is None else token_ids
    tokens = np.where((tokens < 0) | (tokens > _LARGEST_INT), -1, tokens)
    return RoutingTrace(
        topk_ids=checked_ids(name, ids, layers, first_row=first_row),
        topk_weights=(
            np.zeros(ids.shape, np.float16)
            if weights is None
            else checked_weights(name, weights, layers.layer_ids, first_row=first_row)
        ),
        token_ids=tokens.astype(np.int32),
        sequence_ids=np.full(count, sequence, np.int32),
        positions=places.astype(np.int32),
        phase=np.where(decoding, DECODE, PREFILL).astype(np.uint8),
        step_ids=steps.astype(np.int32),
        layer_ids=layers.layer_ids,
        experts=layers.experts,
        top_k=layers.top_k,
        model_id=facts.model_id or model_id,
        fingerprint=facts.fingerprint,
    )
