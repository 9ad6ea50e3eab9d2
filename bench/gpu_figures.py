"""Owns what is made of the end-to-end GPU measurement's rows: agreement, ratios, floors, the table.

Does not know how a row is run.
"""

from __future__ import annotations

import hashlib
from statistics import median
from typing import Any

import torch

from gpu_model import ModelShape
from gpu_rows import REFERENCE

__all__ = ["agreement", "end_to_end_table", "figures"]


def agreement(logits: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, Any]:
    """How a row's logits compare with the reference's over the tokens that both made.

    `margin_where_different` is the most by which the reference's first was ahead of its second at
    a token where the row found another first: random weights make near ties.
    """
    same_bits = same_first = 0
    errors, margins = [], []
    pairs = list(zip(logits, reference, strict=False))
    for found, wanted in pairs:
        same_bits += torch.equal(found, wanted)
        wide, right = found.float(), wanted.float()
        errors.append(float((wide - right).norm() / right.norm()))
        if int(wide.argmax()) == int(right.argmax()):
            same_first += 1
        else:
            best = right.topk(2).values
            margins.append(float(best[0] - best[1]))
    return {
        "tokens": len(pairs),
        "same_bits": same_bits,
        "same_argmax": same_first,
        "largest_relative_error": max(errors, default=0.0),
        "margin_where_different": max(margins, default=None),
        "sha256": hashlib.sha256(
            b"".join(one.view(torch.uint8).numpy().tobytes() for one in logits)
        ).hexdigest()[:16],
    }


def figures(result: dict[str, Any], shape: ModelShape) -> dict[str, dict[str, Any]]:
    """By row: tokens a second over its rounds, against LRU at the same budget, and the floors.

    `over_floor` is time over max(bytes missed / link, active bytes / bandwidth) with the bytes
    that plain LRU misses at this budget; `over_own_floor` with those that the row itself moved,
    loads in vain included. Experts that the host computed are missed and not moved.
    """
    link, bandwidth = result["link"]["bytes_per_second"], result["bandwidth_bytes_per_second"]
    embedding = 2 * shape.vocabulary * shape.hidden
    active = result["host_model"]["dense_bytes"] - embedding
    active += shape.layers * shape.top_k * shape.expert_bytes
    done = {
        name: [one for one in entry["rounds"] if "tokens_per_second" in one]
        for name, entry in result["rows"].items()
    }
    found: dict[str, dict[str, Any]] = {}
    for name, rounds in done.items():
        if not rounds:
            continue
        budget = result["rows"][name]["row"]["budget"]
        seconds = median([1 / one["tokens_per_second"] for one in rounds])
        entry: dict[str, Any] = {"tokens_per_second": round(1 / seconds, 3), "rounds": len(rounds)}
        plain = done.get(f"{100 * budget:g} %, LRU" if budget < 1 else REFERENCE) or []
        if plain:
            entry["over_lru"] = round(
                1 / seconds / median([one["tokens_per_second"] for one in plain]), 3
            )
            missed = median([one["missed_bytes_per_token"] for one in plain])
            floor = max(missed / link, active / bandwidth)
            entry["floor_seconds"], entry["over_floor"] = floor, round(seconds / floor, 3)
        if "moved_bytes_per_token" in rounds[0]:
            moved = median([one["moved_bytes_per_token"] for one in rounds])
            floor = max(moved / link, active / bandwidth)
            entry["over_own_floor"] = round(seconds / floor, 3)
        found[name] = entry
    return found


def end_to_end_table(result: dict[str, Any]) -> str:
    """The rows for a terminal."""
    head = f"{'row':34} {'tokens/s':>9} {'x LRU':>6} {'x floor':>8} {'x own':>6} {'hits':>6} "
    lines = [head + f"{'argmax':>8} {'bits':>8}"]
    for name, entry in result["rows"].items():
        first = entry["rounds"][0]
        if "tokens_per_second" not in first:
            why = first.get("skipped") or "failed: " + first.get("failed", "")
            lines.append(f"{name:34} {why.splitlines()[0][:90]}")
            continue
        made, same = result["figures"][name], first["agreement"]
        cells = [
            f"{made['tokens_per_second']:9.2f}",
            *(
                f"{made[key]:{width}.2f}" if key in made else "-".rjust(width)
                for key, width in (("over_lru", 6), ("over_floor", 8), ("over_own_floor", 6))
            ),
            "-".rjust(6) if first.get("hit_rate") is None else f"{first['hit_rate']:6.3f}",
            f"{same['same_argmax']}/{same['tokens']}".rjust(8),
            f"{same['same_bits']}/{same['tokens']}".rjust(8),
        ]
        lines.append(f"{name:34} " + " ".join(cells))
    link = result["link"]["bytes_per_second"] / 1e9
    memory = result["bandwidth_bytes_per_second"] / 1e9
    lines.append(f"link {link:.1f} GB/s, device memory {memory:.0f} GB/s")
    return "\n".join(lines)
