"""What a routing trace holds, in a few numbers: tokens, layers, popularity, overlap.

Knows nothing of models or commands; works the numbers out of a `RoutingTrace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.core import FloatArray
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["TraceSummary", "entropy", "summarize"]


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """A trace in numbers.

    Args:
        tokens, prompt_tokens, decoded_tokens, sequences, calls: how many rows, and of which kind.
        layers: the layers' absolute indices.
        experts, top_k: of each layer.
        entropy: for each layer the entropy of its experts' popularity over its maximum, 0 to 1;
            1 is even use.
        overlap: for each layer the share of a token's experts that the token before it in its
            sequence chose too, on average; None where no token follows another.
        weighted: whether routing weights are known.
        model_id, fingerprint, tokenizer_id: as in the trace.
    """

    tokens: int
    prompt_tokens: int
    decoded_tokens: int
    sequences: int
    calls: int
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    entropy: tuple[float, ...]
    overlap: tuple[float | None, ...]
    weighted: bool
    model_id: str
    fingerprint: str
    tokenizer_id: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "decoded_tokens": self.decoded_tokens,
            "sequences": self.sequences,
            "calls": self.calls,
            "model_id": self.model_id,
            "fingerprint": self.fingerprint,
            "tokenizer_id": self.tokenizer_id,
            "weighted": self.weighted,
            "layers": [
                {
                    "layer": layer,
                    "experts": self.experts[at],
                    "top_k": self.top_k[at],
                    "entropy": round(self.entropy[at], 6),
                    "overlap": _rounded(self.overlap[at]),
                }
                for at, layer in enumerate(self.layers)
            ],
        }


def summarize(trace: RoutingTrace) -> TraceSummary:
    """The numbers of a trace."""
    decoded = int(trace.phase.sum())
    counts = RoutingCounts.from_trace(trace).counts
    return TraceSummary(
        tokens=len(trace),
        prompt_tokens=len(trace) - decoded,
        decoded_tokens=decoded,
        sequences=len(np.unique(trace.sequence_ids)),
        calls=len(np.unique(trace.step_ids)),
        layers=trace.layer_ids,
        experts=trace.experts,
        top_k=trace.top_k,
        entropy=tuple(entropy(layer) for layer in counts),
        overlap=_overlaps(trace),
        weighted=bool((trace.topk_weights > 0).any()),
        model_id=trace.model_id,
        fingerprint=trace.fingerprint,
        tokenizer_id=trace.tokenizer_id,
    )


def entropy(counts: FloatArray) -> float:
    """Entropy of counts `[E]` over that of even use: 0 to 1, 1 for one expert, 0 for no use."""
    total = counts.sum()
    if total <= 0:
        return 0.0
    if len(counts) == 1:
        return 1.0
    shares = counts[counts > 0] / total
    return float(min(1.0, max(0.0, -(shares * np.log(shares)).sum() / np.log(len(counts)))))


def _overlaps(trace: RoutingTrace) -> tuple[float | None, ...]:
    """Mean over tokens with a predecessor of the share of their experts that it chose too."""
    order = np.lexsort((trace.positions, trace.sequence_ids))
    sequences, places = trace.sequence_ids[order], trace.positions[order].astype(np.int64)
    follows = (sequences[1:] == sequences[:-1]) & (places[1:] == places[:-1] + 1)
    after, before = order[1:][follows], order[:-1][follows]
    result: list[float | None] = []
    for position in range(len(trace.layer_ids)):
        ids = trace.topk_ids[:, position]
        mine, theirs = ids[after], ids[before]
        both = np.zeros(len(after), np.int64)
        for slot in range(ids.shape[1]):  # a column at a time: K x K comparisons, small memory
            held = (mine[:, slot, None] == theirs).any(axis=1) & (mine[:, slot] != UNUSED)
            both += held
        used = (mine != UNUSED).sum(axis=1)
        known = (used > 0) & (theirs != UNUSED).any(axis=1)
        result.append(float((both[known] / used[known]).mean()) if known.any() else None)
    return tuple(result)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
