"""Run records of any size for the tests of reports: a small LRU cache fed with random routing.

Does not know the runtime; the record's form is the one of `docs/formats.md`.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any

import numpy as np

EXPERT_BYTES = 98_304


def run_record(
    *,
    layers: int = 4,
    experts: int = 16,
    top_k: int = 2,
    steps: int = 40,
    slots: int = 16,
    prompts: int = 2,
    snapshots: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """A consistent record: every `steps / prompts`-th step is a prefill of ten tokens."""
    rng = np.random.default_rng(seed)
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    seen: set[tuple[int, int]] = set()
    names = ("phase", "tokens", "seconds", "hits", "misses", "bytes", "stall_seconds")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    by_layer = [
        {"layer": at, "hits": 0, "misses": 0, "bytes_read": 0, "stall_seconds": 0.0}
        for at in range(layers)
    ]
    rereads = evictions = 0
    taken: list[int] = []
    bitmaps: list[str] = []
    for step in range(steps):
        prefill = step % max(1, steps // prompts) == 0
        tokens = 10 if prefill else 1
        hits = misses = 0
        for at, totals in enumerate(by_layer):
            weights = 1.0 / np.arange(1, experts + 1)
            chosen = rng.choice(
                experts, min(experts, top_k * tokens), False, weights / weights.sum()
            )
            for expert in sorted(int(number) for number in chosen):
                key = (at, expert)
                if key in cache:
                    cache.move_to_end(key)
                    hits += 1
                    totals["hits"] += 1
                    continue
                misses += 1
                totals["misses"] += 1
                totals["bytes_read"] += EXPERT_BYTES
                rereads += key in seen
                seen.add(key)
                if len(cache) >= slots:
                    cache.popitem(last=False)
                    evictions += 1
                cache[key] = None
        stall = 2e-4 * misses
        row = (int(not prefill), tokens, 0.008 + stall, hits, misses, misses * EXPERT_BYTES, stall)
        for name, value in zip(names, row, strict=True):
            columns[name].append(value)
        if step % max(1, steps // snapshots) == 0:
            held = np.zeros(layers * experts, np.bool_)
            held[[at * experts + expert for at, expert in cache]] = True
            taken.append(step)
            bitmaps.append(base64.b64encode(np.packbits(held).tobytes()).decode())
    sums = {name: float(np.sum(columns[name])) for name in names}
    decode = np.asarray(columns["phase"], np.bool_)
    by_phase = {
        f"{phase}_{name}": np.asarray(columns[name])[chosen].sum().item()
        for phase, chosen in (("prefill", ~decode), ("decode", decode))
        for name in ("tokens", "seconds")
    }
    hits, misses = int(sums["hits"]), int(sums["misses"])
    return {
        "format": "moe-runtime.run",
        "version": 1,
        "model": {
            "name": "tiny <moe>",
            "class": "Qwen3MoeForCausalLM",
            "fingerprint": "9f3a1c77e0b2d4aa",
            "layers": list(range(layers)),
            "experts": [experts] * layers,
            "top_k": [top_k] * layers,
            "expert_bytes": [EXPERT_BYTES] * layers,
            "total_expert_bytes": EXPERT_BYTES * layers * experts,
            "dense_bytes": 1_843_200,
            "dtype": "bfloat16",
        },
        "config": {"expert_budget": "25%", "policy": "lru", "exact": False, "reader_threads": 2},
        "budget": {
            "total": EXPERT_BYTES * slots + 65_536,
            "slots": slots,
            "slot_bytes": EXPERT_BYTES * slots,
            "staging_bytes": 65_536,
            "share": slots / (layers * experts),
            "explanation": f"{slots} slots of {layers * experts} experts",
        },
        "machine": {"processor": "a processor", "cores": 2, "memory_bytes": 24 << 30},
        "counters": {
            "steps": steps,
            "tokens": int(sums["tokens"]),
            **by_phase,
            "hits": hits,
            "misses": misses,
            "evictions": evictions,
            "rereads": rereads,
            "bytes_read": int(sums["bytes"]),
            "host_bytes": 0,
            "hosted": 0,
            "hosted_rows": 0,
            "hosted_seconds": 0.0,
            "stall_seconds": sums["stall_seconds"],
            "expert_seconds": 2 * sums["stall_seconds"],
            "step_seconds": sums["seconds"],
        },
        "layers": by_layer,
        "steps": {**columns, "dropped": 0},
        "residency": {"steps": taken, "bitmaps": bitmaps},
        "memory": {"peak_rss": 600 << 20, "rss_before_load": 400 << 20, "budget_used": 1 << 20},
        "simulation": {
            "slots": slots,
            "accesses": layers * steps,
            "lru": {"hits": hits, "misses": misses},
            "belady": {"hits": hits + misses // 4, "misses": misses - misses // 4},
        },
        "comparison": {
            "reference": "plain transformers (eager)",
            "tokens": steps,
            "equal_tokens": steps,
            "max_abs_logit_difference": 0.0,
            "reference_seconds": 1.0,
        },
        "generated": [
            {"prompt": "if a < b:", "text": " return '<think>'", "new_tokens": 8, "seconds": 0.1}
        ],
    }
