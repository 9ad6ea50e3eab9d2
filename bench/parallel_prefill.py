"""The engine's prefill over links shaped in rate, beside what its cost model foretells for them.

The bundled model (hidden width 128, float32, four experts a token) reads prompts on two ranks, in
both modes, with contiguous and planned experts. What a run foretells is on its links alone; beside
it stands what the rank that waits least has waited for, once over the shaped link and once over one
that is not shaped (what ranks wait for each other's computing and packing, on two shared cores).
As many exchanges of as many bytes without a model say what the shaped link gives when both ways are
full, which the cost model takes for its nominal rate.
The plan is fitted to other texts than the prompts'. Needs root. Run:

    python bench/parallel_prefill.py          # to bench/results/parallel_prefill.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.messages import COHERENT, MODES
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.solve import make_plan, plan_of
from moe_runtime.placement.topology import Topology
from rich.console import Console

import moe_runtime
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from parallel_steps import inputs
from peers.machine import describe_machine
from shaped_network import run_ranks

RESULTS = Path(__file__).parent / "results" / "parallel_prefill.json"
SAY = Console(stderr=True, highlight=False)
SEED, RANKS, PROMPT_TOKENS, ROUNDS = 0, 2, 96, 6
UNSHAPED = 1e11
LINKS = (
    ("100 Mbit/s, 0.2 ms", 1e8, 2e-4),
    ("100 Mbit/s, 20 ms", 1e8, 2e-2),
    ("1 Gbit/s, 0.2 ms", 1e9, 2e-4),
)


def plans(train: RoutingTrace, folder: Path) -> dict[str, str]:
    """Files of contiguous and planned experts."""
    problem = Problem(layer_ids=train.layer_ids, experts=train.experts, topology=Topology.of(RANKS))
    made = make_plan(problem, train, options=SolveOptions(seed=SEED, time_limit=3.0))
    fixed = plan_of(problem, contiguous(train.experts, RANKS), train)
    return {
        name: str(one.save(folder / f"{name}.plan.json"))
        for name, one in (("contiguous", fixed), ("plan", made))
    }


def over(link: tuple[str, float, float], told: dict[str, Any], *, shaped: bool) -> Any:
    """What the ranks found, by variant and round."""
    _, rate, latency = link
    with tempfile.TemporaryDirectory() as folder:
        task = {**told, "latency": latency * shaped, "link": [rate / 8, latency]}
        rate = rate if shaped else UNSHAPED
        return run_ranks("parallel_prefill_rank.py", RANKS, rate, task, Path(folder))


def measured(link: tuple[str, float, float], told: dict[str, Any]) -> dict[str, Any]:
    """Rows by variant; the first round, which warms up, is left out."""
    shaped, unshaped = (over(link, told, shaped=one) for one in (True, False))
    rows = {}
    for variant, runs in shaped.items():
        waits, bare = (
            [1e3 * min(one["waits"]) for one in found[variant][1:]] for found in (shaped, unshaped)
        )
        foretold = runs[-1]["foretold"]
        ms = 1e3 * foretold["seconds"]
        rows[variant] = {
            "foretold_ms": round(ms, 3),
            "foretold_latency_ms": round(1e3 * foretold["latency_seconds"], 3),
            "least_wait_ms": round(median(waits), 3),
            "least_wait_ms_range": [round(min(waits), 3), round(max(waits), 3)],
            "least_wait_unshaped_ms": round(median(bare), 3),
            "bare_exchanges_ms": round(1e3 * median(runs[-1]["bare_seconds"]), 3),
            "wait_over_foretold": round(median(waits) / ms, 3),
            "bare_over_foretold": round(1e3 * median(runs[-1]["bare_seconds"]) / ms, 3),
            "prefill_ms": round(1e3 * median(one["seconds"] for one in runs[1:]), 3),
            "cross_bytes_foretold": foretold["cross_bytes"],
            "cross_bytes_counted": runs[-1]["cross_bytes"],
            "calls": foretold["calls"],
        }
        SAY.print(link[0], variant, rows[variant])
    return rows


def main() -> None:
    """Link by link; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    path = str(moe_runtime.bundled_model())
    train, prompts = inputs(path, prompt_tokens=PROMPT_TOKENS)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "seed": SEED, "ranks": RANKS, "prompts": len(prompts),
            "prompt_tokens": sum(map(len, prompts)), "rounds": ROUNDS - 1,
            "model": "bundled, float32, its own four experts a token",
            "latency": "slept in every collective, as stated",
        },
        "prefill": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = plans(train, Path(folder))
        told = {
            "model": path,
            "prompts": prompts,
            "rounds": ROUNDS,
            "variants": {f"{m}, {name}": [m, file] for m in MODES for name, file in files.items()},
            "new_tokens": {mode: 1 + (mode == COHERENT) for mode in MODES},
        }
        for link in LINKS:
            rows = measured(link, told)
            result["prefill"][link[0]] = {"load_average": os.getloadavg()[0], "variants": rows}
            given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
