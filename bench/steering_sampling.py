"""How fast steering evaluations sample: tokens a second on the bundled model, all experts loaded.

Two ways in one run, in turns, one thread: `complete` (random numbers of each sample's own; a
batch ends when three quarters of it have, the rest go on among their like) at two batch sizes,
and transformers' own `generate(do_sample=True)` on the same batches to their longest sample.
Counted are tokens up to the end token; padding is not. Run:

    python bench/steering_sampling.py        # to bench/results/steering_sampling.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_runtime
from bundled_model.puzzle_tasks import FOUND_ON, puzzles
from moe_runtime.steering.sampling import Request, Sampling, complete
from moe_runtime.version import __version__
from peers.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "steering_sampling.json"
STOP, PAD = 2, 0
LIMIT, SEED = 128, 0

Way = Callable[[], int]


def ours(model: Any, wanted: list[Request], size: int) -> int:
    sampling = Sampling(max_new_tokens=LIMIT, seed=SEED)
    parts = complete(model, wanted, sampling, batch_size=size, stop=frozenset({STOP}), pad=PAD)
    return sum(len(one.tokens) + one.ended for part in parts for one in part)


@torch.no_grad()
def plain(model: Any, wanted: list[Request], size: int) -> int:
    ordered = sorted(wanted, key=lambda one: -len(one.prompt))
    total = 0
    for first in range(0, len(ordered), size):
        batch = [list(one.prompt) for one in ordered[first : first + size]]
        longest = max(map(len, batch))
        ids = torch.tensor([[PAD] * (longest - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in batch])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=LIMIT, do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, eos_token_id=STOP, pad_token_id=PAD,
        )  # fmt: skip
        for row in out[:, longest:].tolist():
            total += row.index(STOP) + 1 if STOP in row else len(row)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    path = moe_runtime.bundled_model()
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, name)).eval()
        for name in ("float32", "bfloat16")
    }
    model = models["float32"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    wanted = [
        Request(problem=f"{at}", sample=sample, prompt=tuple(tokenizer.encode(puzzle.prompt)))
        for at, puzzle in enumerate(puzzles("held_out", FOUND_ON, options.problems, seed=6))
        for sample in range(options.samples)
    ]
    ways: dict[str, Way] = {
        "complete, 32 rows, float32": lambda: ours(model, wanted, 32),
        "complete, 128 rows, float32": lambda: ours(model, wanted, 128),
        "complete, 128 rows, bfloat16": lambda: ours(models["bfloat16"], wanted, 128),
        "transformers generate, 128 rows, float32": lambda: plain(model, wanted, 128),
    }
    ours(model, wanted[:64], 64)  # warm-up
    runs: dict[str, list[tuple[int, float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            wall, own = time.perf_counter(), time.process_time()
            tokens = way()
            runs[name].append((tokens, time.perf_counter() - wall, time.process_time() - own))
            print(name, tokens, f"{tokens / runs[name][-1][1]:.0f} tokens/s")
    result = {
        "what": "tokens a second of sampling puzzles from the bundled model, one thread",
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "problems": options.problems,
            "samples": options.samples,
            "max_new_tokens": LIMIT,
            "temperature": 1.0,
            "seed": SEED,
            "rounds": options.rounds,
            "experts_implementation": model.config._experts_implementation,
        },
        "ways": {
            name: {
                "tokens": [one[0] for one in found],
                "tokens_per_second": [round(one[0] / one[1], 1) for one in found],
                "tokens_per_cpu_second": [round(one[0] / one[2], 1) for one in found],
                "median_tokens_per_second": round(median(one[0] / one[1] for one in found), 1),
                "median_tokens_per_cpu_second": round(median(one[0] / one[2] for one in found), 1),
            }
            for name, found in runs.items()
        },
        "note": "the machine was shared with other work, so wall-clock figures are low; processor "
        "seconds are the process's own",
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
