"""The engine's decode steps over links shaped in rate: both modes, contiguous and planned experts.

As `parallel_links.py`, but `moe_runtime.parallel.generate` runs: the bundled model (hidden width
128, float32), its own four experts a token and its heaviest alone. Computing is in the time, and
all ranks share the machine's cores (four or eight wait for each other's computing, which real ones
would not); the cost model's link time of the very tokens stands beside, alone and as a ratio. Of
each variant the time in which ranks waited or slept is given too: the rest is computing. Plans are
fitted to other texts than the prompts'. Needs root. Run:

    python bench/parallel_steps.py          # to bench/results/parallel_steps.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
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
from moe_runtime.placement.step_time import step_seconds
from moe_runtime.placement.step_traffic import StepTraffic, replay
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
PLAN_SECONDS = 3.0
LINKS = {  # and the numbers of experts a token that are tried
    ("100 Mbit/s, 20 ms", 1e8, 2e-2): (1, 4),
    ("1 Gbit/s, 0.2 ms", 1e9, 2e-4): (1,),  # computing alone takes longer than such a link
}
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


@dataclass(frozen=True, kw_only=True)
class Case:
    """So many experts a token on so many ranks over one link, and the plan of each variant."""

    top_k: int
    topology: Topology
    sizes: MessageSizes
    links: Links
    plans: dict[str, Plan]

    def saved(self, folder: Path) -> dict[str, Any]:
        """What ranks are told of it; its plans as files."""
        paths = {}
        for number, (variant, plan) in enumerate(self.plans.items()):
            # With another number of experts a token the same weights have another fingerprint.
            bare = replace(plan, fingerprint="")
            paths[variant] = str(bare.save(folder / f"{self.top_k}-{number}.plan.json"))
        return {"top_k": self.top_k, "plans": paths}


def case_of(
    ranks: int, link: tuple[str, float, float], k: int, train: RoutingTrace, told: dict[str, Any]
) -> Case:
    """The case with its plans, fitted to training tokens."""
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
    options = SolveOptions(seed=SEED, time_limit=PLAN_SECONDS)
    fixed = plan_of(problem, contiguous(routing.experts, ranks), routing)
    plans: dict[str, Plan] = {}
    for mode in MODES:
        plans[f"{mode}, contiguous"] = fixed
        plans[f"{mode}, plan"] = make_timed_plan(problem, routing, serving, mode, options=options)
    return Case(top_k=k, topology=topology, sizes=sizes, links=links, plans=plans)


def modelled(case: Case, variant: str, trace: RoutingTrace) -> tuple[float, float, StepTraffic]:
    """(link seconds a step, bytes of all steps, traffic) of the tokens that a run had.

    A run's last step hands round no keys and values any more, as nobody needs them.
    """
    steps = recorded_steps(trace)
    held, mode = case.plans[variant].matrices(), variant.split(",", maxsplit=1)[0]
    starts = starts_of(held, case.topology, trace, steps, by_token=False)
    seconds, sent, parts = [], [], []
    for sizes in (case.sizes, replace(case.sizes, keys_values=0, group=case.sizes.group // 2)):
        part = replay(held, case.topology, trace, steps, sizes, mode, starts)
        seconds.append(step_seconds(part, case.links, case.topology))
        sent.append(np.sum([kind.sum(1) for kind in part.kinds.values()], 0))
        parts.append(part)
    whole = [np.append(all_but_last[:-1], last[-1:]) for all_but_last, last in (seconds, sent)]
    return float(whole[0].mean()), float(whole[1].sum()), parts[0]


def figures(case: Case, found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The four variants' steps beside the link model's time of the tokens that they had."""
    base = found[BASELINE][1:]
    rows = {}
    for variant in case.plans:
        trace = RoutingTrace.load(folder / f"{case.top_k} {variant}.trace.safetensors").decode()
        trace = first_choices(trace) if case.top_k == 1 else trace
        seconds, sent, traffic = modelled(case, variant, trace)
        counted = sum(found[variant][-1]["sent"])
        assert counted == round(sent), (variant, "bytes as modelled", counted, sent)
        runs = found[variant][1:]
        times = [1e3 * one["step_seconds"] for one in runs]
        ratios = [a["step_seconds"] / b["step_seconds"] for a, b in zip(base, runs, strict=True)]
        rows[variant] = {
            "step_ms": round(median(times), 3),
            "step_ms_range": [round(min(times), 3), round(max(times), 3)],
            "waiting_ms": round(median(1e3 * one["waiting_seconds"] for one in runs), 3),
            "link_ms_modelled": round(1e3 * seconds, 3),
            "collectives": round(float(traffic.present.sum(1).mean()), 2),
            "stays": round(traffic.stays, 4),
            "speedup": round(median(ratios), 3),
            "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "cross_bytes_a_step": round(counted / traffic.steps),
        }
    for row in rows.values():
        ideal = rows[BASELINE]["link_ms_modelled"] / row["link_ms_modelled"]
        row["speedup_modelled_link"] = round(ideal, 3)
    return rows


def main() -> None:
    """Case by case; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    began = time.time()
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
            "cores": "all ranks share this machine's; speedup_modelled_link is of the links alone",
        },
        "steps": {},
    }  # fmt: skip
    for ranks in given.ranks:
        for link, tried in LINKS.items():
            cases = [case_of(ranks, link, k, train, told) for k in tried]
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                task = {
                    **told,
                    "cases": [case.saved(folder) for case in cases],
                    "latency": link[2],
                }
                answer = run_ranks("parallel_steps_rank.py", ranks, link[1], task, folder)
                for case, found in zip(cases, answer, strict=True):
                    rows = figures(case, found, folder)
                    by_ranks = result["steps"].setdefault(f"top-{case.top_k}", {})
                    by_ranks[f"{ranks} ranks, {link[0]}"] = rows
                    for variant, row in rows.items():
                        SAY.print(ranks, link[0], case.top_k, variant, row["step_ms"],
                                  row["waiting_ms"], row["link_ms_modelled"], row["speedup"],
                                  row["speedup_modelled_link"])  # fmt: skip
            result["seconds"] = round(time.time() - began)
            given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
