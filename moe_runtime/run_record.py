"""A run as plain data, the form of a run file: counters, spans, configuration, machine.

Gathers; formats nothing and renders nothing.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import psutil
import torch
import transformers

from moe_runtime.budget import BudgetPlan
from moe_runtime.cache import ExpertCache
from moe_runtime.config import RuntimeConfig
from moe_runtime.core import IntArray
from moe_runtime.eviction import Belady, EvictionPolicy, make_policy
from moe_runtime.memory import peak_rss
from moe_runtime.model_spec import MoESpec
from moe_runtime.profiler import Profiler
from moe_runtime.simulate import simulate
from moe_runtime.version import __version__

__all__ = ["machine", "run_record"]


def run_record(
    *,
    spec: MoESpec,
    config: RuntimeConfig,
    budget: BudgetPlan,
    cache: ExpertCache,
    profiler: Profiler,
    device: torch.device,
    rss_before: int,
    simulated: bool,
    plan: dict[str, Any] | None = None,
    prediction: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of `docs/formats.md`, section Run; `plan` and `prediction` are sections of it."""
    whole = sum(layer.num_experts for layer in spec.layers)
    return {
        "format": "moe-runtime.run",
        "version": 1,
        "model": _model(spec),
        "config": config.to_dict(),
        "budget": {
            "total": budget.total,
            "slots": sum(budget.slots),
            "slot_bytes": budget.pools,
            "staging_bytes": budget.staging,
            "share": round(sum(budget.slots) / whole, 6),
            "explanation": budget.explanation,
            "shrunk": None
            if budget.shrunk is None
            else {
                "slots": sum(budget.shrunk.asked),
                "slot_bytes": budget.shrunk.nbytes,
                "why": budget.shrunk.why,
            },
        },
        "machine": machine(device),
        "counters": _counters(cache, profiler),
        "layers": [
            {
                "layer": layer.layer,
                "hits": int(cache.counters.hits[position]),
                "misses": int(cache.counters.misses[position]),
                "bytes_read": int(profiler.bytes_read[position]),
                "hosted": int(profiler.hosted[position]),
                "stall_seconds": round(profiler.stall_seconds[position], 6),
            }
            for position, layer in enumerate(spec.layers)
        ],
        "steps": profiler.step_columns(),
        "residency": {
            "steps": [step for step, _ in profiler.snapshots],
            "bitmaps": [bitmap for _, bitmap in profiler.snapshots],
        },
        "memory": {
            "peak_rss": peak_rss(),
            "rss_before_load": rss_before,
            "budget_used": budget.used,
        },
        "plan": plan,
        "prediction": prediction,
        "simulation": _simulation(spec, config, budget, cache, profiler) if simulated else None,
        "comparison": None,
        "generated": [],
    }


def _model(spec: MoESpec) -> dict[str, Any]:
    dtype = str(spec.layers[0].params[0].dtype).removeprefix("torch.")
    return {
        "name": spec.model_id,
        "class": spec.model_class,
        "fingerprint": spec.fingerprint,
        "layers": [layer.layer for layer in spec.layers],
        "experts": [layer.num_experts for layer in spec.layers],
        "top_k": [layer.top_k for layer in spec.layers],
        "expert_bytes": [layer.expert_bytes for layer in spec.layers],
        "total_expert_bytes": spec.total_expert_bytes,
        "dense_bytes": spec.dense_bytes,
        "dtype": dtype,
    }


def _counters(cache: ExpertCache, profiler: Profiler) -> dict[str, Any]:
    totals = profiler.totals
    return {
        "steps": profiler.count,
        "tokens": int(totals["tokens"]),
        "prefill_tokens": int(totals["prefill_tokens"]),
        "decode_tokens": int(totals["decode_tokens"]),
        "hits": int(cache.counters.hits.sum()),
        "misses": int(cache.counters.misses.sum()),
        "evictions": cache.counters.evictions,
        "rereads": cache.counters.rereads,
        "bytes_read": int(profiler.bytes_read.sum()),
        "host_bytes": int(profiler.host_bytes.sum()),
        "hosted": int(profiler.hosted.sum()),
        "hosted_rows": profiler.hosted_rows,
        "hosted_seconds": round(profiler.hosted_seconds, 6),
        "stall_seconds": round(sum(profiler.stall_seconds), 6),
        "expert_seconds": round(profiler.expert_seconds, 6),
        "step_seconds": round(totals["step_seconds"], 6),
        "prefill_seconds": round(totals["prefill_seconds"], 6),
        "decode_seconds": round(totals["decode_seconds"], 6),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What this ran on."""
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": int(psutil.virtual_memory().total),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moe_runtime": __version__,
        "device_name": name,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _simulation(
    spec: MoESpec,
    config: RuntimeConfig,
    budget: BudgetPlan,
    cache: ExpertCache,
    profiler: Profiler,
) -> dict[str, Any] | None:
    """The same routing replayed with LRU, this policy and Belady, each from a cold start.

    What a plan keeps resident stays in each of them; beside them is this policy without the plan.
    One pool over all layers: with several expert shapes there is no single Belady, and None.
    """
    if len(budget.slots) != 1 or not profiler.accesses or profiler.dropped_accesses:
        return None
    slots, accesses = budget.slots[0], profiler.accesses
    pinned = _permanent(cache)

    def own() -> EvictionPolicy:
        return make_policy(config.policy, spec.grid, **config.policy_options)

    policies: dict[str, tuple[EvictionPolicy, IntArray | None]] = {
        "lru": (make_policy("lru", spec.grid), pinned),
        config.policy: (own(), pinned),
        "belady": (Belady(spec.grid, accesses), pinned),
    }
    if pinned is not None:
        policies[f"{config.policy} without the plan"] = (own(), None)
    result: dict[str, Any] = {"slots": slots, "accesses": len(accesses)}
    for name, (policy, stays) in policies.items():
        outcome = simulate(policy, spec.grid, accesses, slots, pinned=stays)
        result[name] = {"hits": outcome.hits, "misses": outcome.misses}
    return result


def _permanent(cache: ExpertCache) -> IntArray | None:
    """Dense indices of the experts that never leave; None if there are none."""
    found = [
        offset + expert
        for position, offset in enumerate(cache.grid.offsets)
        for expert in sorted(cache.permanent(position))
    ]
    return np.array(found, np.int64) if found else None
