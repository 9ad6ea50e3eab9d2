"""Owns the figures that say whether a checkpoint routes realistically, and plain cache bounds.

Does not know how the checkpoint was made; it runs it with plain transformers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Routed = list[list[frozenset[int]]]  # [layer][token] -> experts


@dataclass(frozen=True, kw_only=True)
class RoutingFigures:
    """Per layer unless said otherwise. `overlap` is |S_t & S_t+1| / k over consecutive tokens."""

    tokens: int
    experts: int
    top_k: int
    overlap: tuple[float, ...]
    experts_used: tuple[int, ...]
    load_max_over_mean: tuple[float, ...]
    entropy_bits: tuple[float, ...]
    hits: dict[str, dict[str, float]]  # capacity share -> {"lru", "belady"}, per-layer slots

    @property
    def chance(self) -> float:
        return self.top_k / self.experts

    @property
    def mean_overlap(self) -> float:
        return sum(self.overlap) / len(self.overlap)

    def as_json(self) -> dict[str, Any]:
        rounded = {
            name: [round(v, 3) for v in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return {**rounded, "mean_overlap": round(self.mean_overlap, 4)}


def record(folder: Path, ids: Sequence[int]) -> tuple[Routed, int, int]:
    """Experts of each layer and token for one pass over `ids`; number of experts; top-k."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()
    routed: Routed = []

    def keep(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        routed.append([frozenset(row) for row in args[1].tolist()])

    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            module.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model.model(torch.tensor([list(ids)]), use_cache=False)
    return routed, model.config.num_experts, model.config.num_experts_per_tok


def lru_hits(tokens: Sequence[frozenset[int]], slots: int) -> float:
    order: dict[int, None] = {}
    hits = accesses = 0
    for needed in tokens:
        for expert in sorted(needed):
            accesses += 1
            if expert in order:
                hits += 1
                del order[expert]
            order[expert] = None
        for expert in list(order)[: max(0, len(order) - slots)]:
            del order[expert]
    return hits / accesses


def belady_hits(tokens: Sequence[frozenset[int]], slots: int) -> float:
    uses: dict[int, list[int]] = {}
    for t, needed in enumerate(tokens):
        for expert in needed:
            uses.setdefault(expert, []).append(t)
    for later in uses.values():
        later.reverse()
    held: set[int] = set()
    hits = accesses = 0
    for needed in tokens:
        accesses += len(needed)
        hits += len(needed & held)
        for expert in needed:
            uses[expert].pop()
        held |= needed
        surplus = len(held) - slots
        if surplus > 0:
            far = sorted(held, key=lambda e: uses[e][-1] if uses[e] else 1 << 40, reverse=True)
            held -= set(far[:surplus])
    return hits / accesses


def measure_routing(folder: Path, ids_file: str, *, tokens: int) -> RoutingFigures:
    ids = json.loads((folder / ids_file).read_text())["ids"][:tokens]
    routed, experts, top_k = record(folder, ids)
    overlap, used, load, entropy = [], [], [], []
    for layer in routed:
        shared = [len(a & b) / top_k for a, b in itertools.pairwise(layer)]
        overlap.append(sum(shared) / len(shared))
        counts = torch.zeros(experts)
        for needed in layer:
            counts[sorted(needed)] += 1
        used.append(int((counts > 0).sum()))
        load.append(float(counts.max() / counts.mean()))
        share = counts[counts > 0] / counts.sum()
        entropy.append(float(-(share * share.log2()).sum()))
    hits: dict[str, dict[str, float]] = {}
    for capacity in (0.125, 0.25, 0.375, 0.5):
        slots = int(experts * capacity)
        hits[f"{capacity:.3f}"] = {
            "lru": round(sum(lru_hits(t, slots) for t in routed) / len(routed), 3),
            "belady": round(sum(belady_hits(t, slots) for t in routed) / len(routed), 3),
        }
    return RoutingFigures(
        tokens=len(ids), experts=experts, top_k=top_k, overlap=tuple(overlap),
        experts_used=tuple(used), load_max_over_mean=tuple(load),
        entropy_bits=tuple(entropy), hits=hits,
    )  # fmt: skip
