"""Owns the figures of a routing trace: balance, entropy, overlap, affinity between layers.

Does not know what was recorded; it takes a `RoutingTrace`, of the bundled model or any other.

Shapes: N tokens, L layers, E experts, k chosen; `used` is bool `[N, L, E]`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.trace import UNUSED, RoutingTrace

Used: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]
SMOOTHING = 1.0  # a row of pair counts starts as this many draws from the popularity


def used_experts(trace: RoutingTrace) -> Used:
    """Bool `[N, L, E]`: which experts each token went to; E is that of the widest layer."""
    tokens, layers, _ = trace.topk_ids.shape
    used = np.zeros((tokens, layers, max(trace.experts) + 1), dtype=bool)
    ids = np.where(trace.topk_ids == UNUSED, max(trace.experts), trace.topk_ids).astype(np.int64)
    np.put_along_axis(used, ids, True, axis=2)
    return used[:, :, :-1]


def entropy_bits(shares: Floats) -> Floats:
    """Entropy of shares along the last axis, in bits."""
    safe = np.where(shares > 0, shares, 1.0)
    entropy: Floats = -(shares * np.log2(safe)).sum(axis=-1)
    return entropy


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one trace; tuples have one entry a layer (or a pair of neighbouring layers).

    Attributes:
        load_entropy: entropy of the load over experts, over log2(E): 1 is even.
        gate_entropy: mean entropy of a token's k weights (made to sum to 1), over log2(k).
        load_max_over_mean: the busiest expert's tokens over the mean.
        overlap: share of a token's experts that the next token of the sequence uses again.
        overlap_by_popularity: the same if tokens drew independently by the experts' popularity.
        affinity_recall: share of the next layer's experts among the k that held-out pair counts
            with this layer's experts rank first.
        popularity_recall: the same by the next layer's popularity alone.
        shuffled_recall: the same by pair counts from routing shuffled over tokens.
        information: mutual information of the experts of neighbouring layers, bits, plug-in.
        shuffled_information: the same of shuffled routing: the bias of few tokens.
    """

    tokens: int
    experts: int
    top_k: int
    load_entropy: tuple[float, ...]
    gate_entropy: tuple[float, ...]
    load_max_over_mean: tuple[float, ...]
    overlap: tuple[float, ...]
    overlap_by_popularity: tuple[float, ...]
    affinity_recall: tuple[float, ...]
    popularity_recall: tuple[float, ...]
    shuffled_recall: tuple[float, ...]
    information: tuple[float, ...]
    shuffled_information: tuple[float, ...]

    @property
    def chance(self) -> float:
        """Overlap, and recall, of experts drawn evenly."""
        return self.top_k / self.experts

    def means(self) -> dict[str, float]:
        """The mean over layers of each figure that has layers."""
        fields = asdict(self).items()
        return {n: round(float(np.mean(v)), 4) for n, v in fields if isinstance(v, tuple)}

    def as_json(self) -> dict[str, Any]:
        whole = {
            name: [round(float(x), 4) for x in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return {"chance": round(self.chance, 4), "mean": self.means(), "by_layer": whole}


def halves(sequences: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two masks over rows: every other sequence, or the two halves of a single sequence."""
    names = np.unique(sequences)
    if len(names) > 1:
        first = np.isin(sequences, names[::2])
    else:
        first = np.arange(len(sequences)) < len(sequences) // 2
    return first, ~first


def _overlap(used: Used, follows: NDArray[np.bool_]) -> tuple[float, ...]:
    """Share of a token's experts used again by the next one, a layer; rows with none left out."""
    shares = []
    for layer in range(used.shape[1]):
        before, now = used[:-1, layer], used[1:, layer]
        pairs = follows & before.any(axis=1) & now.any(axis=1)
        shares.append(float((before & now)[pairs].sum() / now[pairs].sum()))
    return tuple(shares)


def _recall(guess: Floats, truth: Used, top_k: int) -> float:
    """Share of the true experts among the k with the highest score; both `[N, E]`."""
    ranked = np.argsort(-guess, axis=1, kind="stable")[:, :top_k]
    return float(np.take_along_axis(truth, ranked, axis=1).sum() / truth.sum())


def _conditional(here: Used, after: Used) -> tuple[Floats, Floats]:
    """P(expert after | expert here) `[E, E]` from pair counts, and the popularity after `[E]`."""
    pairs = here.T.astype(np.float64) @ after.astype(np.float64)
    popularity = after.sum(axis=0) / after.sum()
    rows = pairs.sum(axis=1, keepdims=True)
    return (pairs + SMOOTHING * popularity) / (rows + SMOOTHING), popularity


def _information(here: Used, after: Used) -> float:
    pairs = here.T.astype(np.float64) @ after.astype(np.float64)
    joint = pairs / pairs.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    held = joint > 0
    return float((joint[held] * np.log2(joint[held] / apart[held])).sum())


def measure(trace: RoutingTrace, seed: int = 0) -> Figures:
    """All figures of one trace (several runs of one model: concatenate them first)."""
    used = used_experts(trace)
    experts, top_k = max(trace.experts), max(trace.top_k)
    load = used.sum(axis=0).astype(np.float64)  # [L, E]
    shares = load / load.sum(axis=1, keepdims=True)
    follows = (np.diff(trace.positions) == 1) & (np.diff(trace.sequence_ids) == 0)
    weights = trace.topk_weights.astype(np.float64)
    weights /= np.maximum(weights.sum(axis=2, keepdims=True), 1e-9)
    gated = entropy_bits(weights).sum(axis=0) / (trace.topk_ids != UNUSED).any(axis=2).sum(axis=0)

    rng = np.random.default_rng(seed)
    recalls: dict[str, list[float]] = {"affinity": [], "popularity": [], "shuffled": []}
    information, by_chance = [], []
    for layer in range(used.shape[1] - 1):
        # llama.cpp routes only the last token of a prompt through the last layer
        both = used[:, layer].any(axis=1) & used[:, layer + 1].any(axis=1)
        here, after = used[both, layer], used[both, layer + 1]
        first, second = halves(trace.sequence_ids[both])
        mixed = rng.permutation(len(here))
        information.append(_information(here, after))
        by_chance.append(_information(here, after[mixed]))
        found: dict[str, list[float]] = {name: [] for name in recalls}
        for known, asked in ((first, second), (second, first)):
            table, popularity = _conditional(here[known], after[known])
            shuffled, _ = _conditional(here[known], rng.permutation(after[known]))
            now = here[asked].astype(np.float64)
            found["affinity"].append(_recall(now @ table, after[asked], top_k))
            found["shuffled"].append(_recall(now @ shuffled, after[asked], top_k))
            flat = np.broadcast_to(popularity, after[asked].shape)
            found["popularity"].append(_recall(flat, after[asked], top_k))
        for name, values in found.items():
            recalls[name].append(float(np.mean(values)))

    return Figures(
        tokens=len(trace),
        experts=experts,
        top_k=top_k,
        load_entropy=tuple(entropy_bits(shares) / np.log2(experts)),
        gate_entropy=tuple(gated / np.log2(top_k)),
        load_max_over_mean=tuple(load.max(axis=1) / load.mean(axis=1)),
        overlap=_overlap(used, follows),
        overlap_by_popularity=tuple(top_k * (shares**2).sum(axis=1)),
        affinity_recall=tuple(recalls["affinity"]),
        popularity_recall=tuple(recalls["popularity"]),
        shuffled_recall=tuple(recalls["shuffled"]),
        information=tuple(information),
        shuffled_information=tuple(by_chance),
    )


def domain_information(trace: RoutingTrace, domains: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Mutual information of a token's domain and its expert, bits a layer, and shuffled.

    Args:
        trace: the trace.
        domains: `[N]`, the domain of each token. Shuffling is over sequences, not tokens.
    """
    used = used_experts(trace)
    _, of_row = np.unique(trace.sequence_ids, return_inverse=True)
    of_sequence = np.zeros(of_row.max() + 1, np.int64)
    of_sequence[of_row] = domains
    shuffled = np.random.default_rng(0).permutation(of_sequence)[of_row]

    def told(names: NDArray[np.int64]) -> Floats:
        hot = names[:, None] == np.unique(names)
        return np.array([_information(hot, used[:, layer]) for layer in range(used.shape[1])])

    return told(domains), told(shuffled)
