"""`drawn_trace`: routing drawn at random from how often experts are used, where no trace is known.

Knows counts alone: experts of different layers and of one token are independent of each other.
"""

from __future__ import annotations

import numpy as np

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import DECODE, UNUSED, RoutingTrace

__all__ = ["drawn_trace"]


def drawn_trace(
    counts: RoutingCounts, tokens: int, *, top_k: int = 0, seed: int = 0
) -> RoutingTrace:
    """Tokens whose experts are drawn in every layer by their uses, one after another without
    replacement; the first drawn is the heaviest.

    A plan that makes use of affinity looks no better on them than one that does not. With
    several experts a token the popular ones come out somewhat less often than they were counted
    (a token takes each once at most).

    Args:
        tokens: rows to draw.
        top_k: experts a token where the counts do not say.

    Raises:
        PlanError: experts a token unknown, or more of them than experts in use.
    """
    rng = np.random.default_rng(seed)
    widths = [k or top_k for k in counts.top_k]
    ids = np.full((tokens, len(widths), max(widths)), UNUSED, dtype=np.uint16)
    for position, (layer, used, k) in enumerate(
        zip(counts.layer_ids, counts.counts, widths, strict=True)
    ):
        found = int((used > 0).sum())
        if not 1 <= k <= found:
            raise PlanError(
                f"layer {layer}: cannot draw {k or 'an unknown number of'} experts a token from "
                f"{found} experts in use; record a trace, or name the model"
            )
        # The largest log(u) / weight are such a sample, in order (Efraimidis, Spirakis 2006).
        with np.errstate(divide="ignore"):
            keys = np.log(rng.random((tokens, len(used)))) / used
        ids[:, position, :k] = np.argsort(-keys, axis=1)[:, :k]
    weights = np.where(ids == UNUSED, 0.0, 1.0 / (1.0 + np.arange(ids.shape[2])))
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=weights.astype(np.float16),
        token_ids=np.full(tokens, -1, dtype=np.int32),
        sequence_ids=np.arange(tokens, dtype=np.int32),
        positions=np.zeros(tokens, dtype=np.int32),
        phase=np.full(tokens, DECODE, dtype=np.uint8),
        step_ids=np.arange(tokens, dtype=np.int32),
        layer_ids=counts.layer_ids,
        experts=counts.experts,
        top_k=tuple(widths),
        model_id=counts.model_id,
        fingerprint=counts.fingerprint,
    )
