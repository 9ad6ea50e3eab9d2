"""Hit rates of the predictive cache against LRU while the bundled model really generates.

In the proportions of ExpertFlow (He)'s table: half of the experts at batch 4, a quarter at batch
16. A late expert counts as a miss (the paper's counts as a hit). Held-out puzzles, greedy; each
batch goes through all variants in turn, and speeds are compared batch by batch.

    python bench/live_hit_rates.py            # to bench/results/live_hit_rates.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import moe_runtime
from bundled_model.puzzles import held_out
from peers.machine import describe_machine
from peers.protocol import versions, write_json

RESULT = Path(__file__).resolve().parent / "results" / "live_hit_rates.json"
PAPER = {"batch 4, half": (0.9196, 0.7661), "batch 16, quarter": (0.7189, 0.3622)}
SETTINGS = {"batch 1, quarter": (1, "25%"), "batch 4, half": (4, "50%"),
            "batch 16, quarter": (16, "25%")}  # fmt: skip
NEW_TOKENS = 48


def variants() -> dict[str, dict[str, Any]]:
    """Options of `from_pretrained` by name."""
    predictor = str(moe_runtime.bundled_predictor())
    options = {"trial": False, "lookahead": 3, "share": 0.5}
    return {
        "lru": {"policy": "lru"},
        "predicted": {"policy": "predicted"},
        "lru, predictor, as by default": {"policy": "lru", "predictor": predictor},
        "lru, loads ahead": {
            "policy": "lru", "predictor": predictor, "prediction_options": options,
        },
        "predicted, loads ahead": {
            "policy": "predicted", "predictor": predictor, "prediction_options": options,
        },
    }  # fmt: skip


def run(batch: int, budget: str, prompts: list[str]) -> dict[str, dict[str, Any]]:
    """All variants beside each other: each batch of prompts goes through all of them in turn.

    So a second in which the machine does something else too falls on few of them at most, and
    speeds are compared batch by batch.
    """
    path = moe_runtime.bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    models = {
        name: moe_runtime.from_pretrained(path, expert_budget=budget, device="cpu", **options)
        for name, options in variants().items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn, at in enumerate(range(0, len(prompts), batch)):
        inputs = tokenizer(prompts[at : at + batch], return_tensors="pt", padding=True)
        order = list(models.items())[:: 1 if turn % 2 else -1]
        for name, model in order:
            before = decode_seconds(model)
            model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                max_new_tokens=NEW_TOKENS, do_sample=False,
            )  # fmt: skip
            seconds[name].append(decode_seconds(model) - before)
    return {
        name: {**counted(model), **speed_over(seconds["lru"], seconds[name])}
        for name, model in models.items()
    }


def decode_seconds(model: Any) -> float:
    return float(moe_runtime.runtime_of(model).profiler.totals["decode_seconds"])


def speed_over(base: list[float], mine: list[float]) -> dict[str, Any]:
    """Seconds of all batches against the base's; interval by a bootstrap over batches."""
    pairs = np.array([base, mine])
    draws = np.random.default_rng(0).integers(len(mine), size=(2000, len(mine)))
    ratios = pairs[0][draws].sum(axis=1) / pairs[1][draws].sum(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {
        "speed_over_lru": {
            "ratio": round(float(pairs[0].sum() / pairs[1].sum()), 4),
            "low": round(float(low), 4), "high": round(float(high), 4), "batches": len(mine),
            "median_of_batches": round(float(median(pairs[0] / pairs[1])), 4),
        }
    }  # fmt: skip


def counted(model: Any) -> dict[str, Any]:
    """What the cache did, decode and prefill."""
    record = moe_runtime.runtime_of(model).run_record()
    counters, found = record["counters"], record["prediction"]
    uses = counters["hits"] + counters["misses"]
    in_time = found["loads"]["in_time"] if found else 0
    return {
        "hit_rate": round(counters["hits"] / uses, 4),
        "resident": round((counters["hits"] - in_time) / uses, 4),
        "in_time": round(in_time / uses, 4),
        "late": round(found["loads"]["late"] / uses, 4) if found else 0.0,
        "unused_loads": found["loads"]["unused"] if found else 0,
        "decisions": found["decisions"] if found else [],
        "uses": uses,
        "bytes_read": counters["bytes_read"],
        "decode_steps": sum(step.decode for step in moe_runtime.runtime_of(model).profiler.steps),
        "decode_tokens_per_second": round(
            counters["decode_tokens"] / counters["decode_seconds"], 2
        ),
        "belady_hit_rate": round(record["simulation"]["belady"]["hits"] / uses, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = [puzzle.prompt for puzzle in held_out(options.prompts, seed=3)]
    table: dict[str, Any] = {}
    for setting, (batch, budget) in SETTINGS.items():
        done = run(batch, budget, prompts[: 24 * batch])
        table[setting] = {"ours": done}
        if setting in PAPER:
            table[setting]["paper, Switch-32"] = dict(
                zip(("predictive", "lru"), PAPER[setting], strict=True)
            )
        for name, row in table[setting]["ours"].items():
            print("  ", name, row)
    write_json(options.output, {
        "what": "share of expert uses (a batch's distinct experts of a layer) that were in their "
        "slots when asked for, prefill and decode; one pool over all layers; bundled predictor; "
        "speed_over_lru: decode seconds of all batches, 95 % bootstrap interval over batches",
        "machine": describe_machine(),
        "versions": versions(("torch", "transformers", "numpy")),
        "settings": {"new_tokens": NEW_TOKENS, "prompts_seed": 3, "threads": options.threads},
        "table": table,
    })  # fmt: skip


if __name__ == "__main__":
    main()
