"""The engine's decode steps over links shaped in rate: both modes, contiguous and planned experts.

As `parallel_links.py`, but `moe_runtime.parallel.generate` runs: the bundled model (hidden width
128, float32), its own four experts a token and its heaviest alone. Computing is in the time, and
the ranks share the machine's cores; the cost model's link time of the very tokens stands beside.
Plans are fitted to other texts than the prompts'. Needs root. Run:

    python bench/parallel_steps.py          # to bench/results/parallel_steps.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.decode_steps import first_choices, recorded_steps, starts_of
from moe_runtime.placement.links import Link, Links
from moe_runtime.placement.messages import MODES, MessageSizes
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.solve import plan_of
from moe_runtime.placement.step_time import step_time
from moe_runtime.placement.step_traffic import replay
from moe_runtime.placement.timed_plan import Serving, make_timed_plan
from moe_runtime.placement.topology import Topology
from rich.console import Console

import moe_runtime
from corpora import corpora
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine
from shaped_network import run_ranks

RESULTS = Path(__file__).parent / "results" / "parallel_steps.json"
SAY = Console(stderr=True, highlight=False)
SEED = 0
TRAIN_TEXTS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 30, 16, 24, 9, 3
LINKS = (("100 Mbit/s, 20 ms", 1e8, 2e-2), ("1 Gbit/s, 0.2 ms", 1e9, 2e-4))
BASELINE = "vanilla, contiguous"


def inputs(
    path: str, *, prompt_tokens: int = PROMPT_TOKENS
) -> tuple[RoutingTrace, list[list[int]]]:
    """Routing of the first texts of every kind, and prompts from others."""
    model = moe_runtime.from_pretrained(path, expert_budget="100%", device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompts = []
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for texts in corpora().values():
            for text in texts[:TRAIN_TEXTS]:
                model(tokenizer(text[:4000], return_tensors="pt")["input_ids"][:, :400])
            prompts += [
                tokenizer(text[: max(400, 8 * prompt_tokens)])["input_ids"][:prompt_tokens]
                for text in texts[TRAIN_TEXTS : TRAIN_TEXTS + PROMPTS // 3 + 1]
            ]
    return recorder.trace, prompts[:PROMPTS]


def measured(
    ranks: int, link: tuple[str, float, float], k: int, train: RoutingTrace, told: dict[str, Any]
) -> dict[str, Any]:
    """The four variants of one case."""
    _, rate, latency = link
    topology = Topology.of(ranks)
    config = transformers.AutoConfig.from_pretrained(told["model"])
    sizes = MessageSizes.of(
        hidden=config.hidden_size,
        keys_values=2 * config.num_key_value_heads * config.head_dim,
        layers=config.num_hidden_layers, top_k=k, itemsize=4, experts=config.num_experts,
        rows=len(told["prompts"]),
    )  # fmt: skip
    links = Links(near=Link(bandwidth=rate / 8, latency=latency))
    serving = Serving(rows=len(told["prompts"]), sizes=sizes, links=links)
    routing = first_choices(train) if k == 1 else train
    problem = Problem(layer_ids=routing.layer_ids, experts=routing.experts, topology=topology)
    options = SolveOptions(seed=SEED, time_limit=3.0)
    fixed = plan_of(problem, contiguous(routing.experts, ranks), routing)
    plans: dict[str, Plan] = {}
    for mode in MODES:
        plans[f"{mode}, contiguous"] = fixed
        plans[f"{mode}, plan"] = make_timed_plan(problem, routing, serving, mode, options=options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {}
        for number, (variant, found_plan) in enumerate(plans.items()):
            # With another number of experts a token the same weights have another fingerprint.
            plan = replace(found_plan, fingerprint="")
            paths[variant] = str(plan.save(folder / f"{number}.plan.json"))
        task = {**told, "top_k": k, "plans": paths, "latency": latency}
        found = run_ranks("parallel_steps_rank.py", ranks, rate, task, folder)
        rows = {}
        for variant, plan in plans.items():
            trace = RoutingTrace.load(folder / f"{variant}.trace.safetensors").decode()
            trace = first_choices(trace) if k == 1 else trace
            steps = recorded_steps(trace)
            held = plan.matrices()
            starts = starts_of(held, topology, trace, steps, by_token=False)
            mode = variant.split(",", maxsplit=1)[0]
            mine = step_time(replay(held, topology, trace, steps, sizes, mode, starts), links,
                             topology)  # fmt: skip
            times = [one["step_seconds"] for one in found[variant]][1:]
            base = [one["step_seconds"] for one in found[BASELINE]][1:]
            ratios = [a / b for a, b in zip(base, times, strict=True)]
            rows[variant] = {
                "step_ms": round(1e3 * median(times), 3),
                "step_ms_range": [round(1e3 * min(times), 3), round(1e3 * max(times), 3)],
                "link_ms_modelled": round(1e3 * mine.seconds, 3),
                "collectives": round(mine.collectives, 2),
                "stays": round(mine.stays, 4),
                "speedup": round(median(ratios), 3),
                "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "cross_bytes_a_step": round(sum(found[variant][-1]["sent"]) / steps.count),
            }
    for row in rows.values():
        ideal = rows[BASELINE]["link_ms_modelled"] / row["link_ms_modelled"]
        row["speedup_modelled_link"] = round(ideal, 3)
    return rows


def main() -> None:
    """Case by case; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    path = str(moe_runtime.bundled_model())
    train, prompts = inputs(path)
    told = {"model": path, "prompts": prompts, "new_tokens": NEW_TOKENS, "rounds": ROUNDS}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "seed": SEED, "prompts": len(prompts), "new_tokens": NEW_TOKENS, "rounds": ROUNDS - 1,
            "start": "ended", "model": "bundled, float32",
            "latency": "slept in every collective, as stated",
        },
        "steps": {},
    }  # fmt: skip
    for ranks in given.ranks:
        for link in LINKS:
            for k in (1, 4):
                rows = measured(ranks, link, k, train, told)
                result["steps"].setdefault(f"top-{k}", {})[f"{ranks} ranks, {link[0]}"] = rows
                for variant, row in rows.items():
                    SAY.print(ranks, link[0], k, variant, row["step_ms"], row["link_ms_modelled"],
                              row["speedup"], row["speedup_modelled_link"])  # fmt: skip
                given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
