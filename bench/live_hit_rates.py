"""Hit rates of the predictive cache against LRU while the bundled model really generates.

In the proportions of ExpertFlow (He)'s table: half of the experts at batch 4, a quarter at batch
16. A late expert counts as a miss (the paper's counts as a hit). Held-out puzzles, greedy; variants
run in turn, speeds are compared within a round.

    python bench/live_hit_rates.py            # to bench/results/live_hit_rates.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

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


def run(batch: int, budget: str, options: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """Generate for all prompts, `batch` at a time; what the cache did, decode and prefill."""
    path = moe_runtime.bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = moe_runtime.from_pretrained(path, expert_budget=budget, device="cpu", **options)
    for at in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[at : at + batch], return_tensors="pt", padding=True)
        model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS, do_sample=False,
        )  # fmt: skip
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
        "uses": uses,
        "bytes_read": counters["bytes_read"],
        "decode_tokens_per_second": round(
            counters["decode_tokens"] / counters["decode_seconds"], 2
        ),
        "belady_hit_rate": round(record["simulation"]["belady"]["hits"] / uses, 4),
    }


def in_sum(name: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One variant over all rounds: the last one's counts (they hardly differ), speeds in pairs."""
    mine = [done[name] for done in rounds]
    speeds = [
        done[name]["decode_tokens_per_second"] / done["lru"]["decode_tokens_per_second"]
        for done in rounds
    ]
    return {
        **mine[-1],
        "decode_tokens_per_second": round(
            median(one["decode_tokens_per_second"] for one in mine), 2
        ),
        "speed_over_lru": {
            "median": round(median(speeds), 4), "low": round(min(speeds), 4),
            "high": round(max(speeds), 4), "rounds": len(rounds),
        },
        "hit_rates": [one["hit_rate"] for one in mine],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = [puzzle.prompt for puzzle in held_out(options.prompts, seed=3)]
    table: dict[str, Any] = {}
    for setting, (batch, budget) in SETTINGS.items():
        some = prompts[: max(24, 6 * batch)]
        rounds = []
        for round_ in range(options.rounds):
            order = list(variants().items())
            done = {
                name: run(batch, budget, chosen, some)
                for name, chosen in (order if round_ % 2 == 0 else order[::-1])
            }
            rounds.append(done)
            print(setting, {n: round(r["decode_tokens_per_second"], 1) for n, r in done.items()},
                  flush=True)  # fmt: skip
        table[setting] = {"ours": {name: in_sum(name, rounds) for name in variants()}}
        if setting in PAPER:
            table[setting]["paper, Switch-32"] = dict(
                zip(("predictive", "lru"), PAPER[setting], strict=True)
            )
        for name, row in table[setting]["ours"].items():
            print("  ", name, row)
    write_json(options.output, {
        "what": "share of expert uses (a batch's distinct experts of a layer) that were in their "
        "slots when asked for, prefill and decode; one pool over all layers; bundled predictor; "
        "speed_over_lru: decode, of the same round, lowest and highest beside the median",
        "machine": describe_machine(),
        "versions": versions(("torch", "transformers", "numpy")),
        "settings": {"new_tokens": NEW_TOKENS, "prompts_seed": 3, "threads": options.threads},
        "table": table,
    })  # fmt: skip


if __name__ == "__main__":
    main()
