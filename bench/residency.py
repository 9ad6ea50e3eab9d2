"""Whether pinning what a plan says helps: the bundled model run, the shared traces replayed.

Plans are fitted to some prompts (or runs, or the first half of a run) and tested on others, with
the same slots with and without the plan. It counts hits, misses and bytes; it times nothing. Run:

    python bench/residency.py                       # to bench/results/residency.json
    python bench/residency.py --new-tokens 16       # quicker
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.residency import apply_tiers, count_uses
from moe_runtime.placement.topology import Topology
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

import moe_runtime
from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid, FloatArray
from moe_runtime.eviction import make_policy
from moe_runtime.simulate import simulate
from moe_runtime.version import __version__
from shared_traces import TRACE_NAMES, load_shared_traces

RESULTS = Path(__file__).parent / "results" / "residency.json"
PINNED_SHARES = (0.25, 0.5, 0.75)
POLICIES = ("lru", "echo")
BUDGETS = ("25%", "50%")
SLOT_SHARES = (0.125, 0.25, 0.5)


def residency_plan(
    grid: ExpertGrid, counts: Sequence[FloatArray], pinned: int, **about: Any
) -> Plan:
    """A plan for one device that pins `pinned` experts; all of a model's have the same bytes."""
    plan = Plan(
        topology=Topology.of(1),
        layers=tuple(
            LayerPlan(layer=layer, hosts=((0,),) * experts)
            for layer, experts in zip(grid.layers, grid.experts, strict=True)
        ),
        **about,
    )
    return apply_tiers(plan, counts, (1,) * len(grid.layers), memory=(pinned,), reserve=0)


# -- the bundled model ---------------------------------------------------------------------------


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> None:
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)


def splits(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """(prompts to fit to, prompts to test on) by name."""
    stored = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    by_kind = {kind: [entry["prompt"] for entry in entries] for kind, entries in stored.items()}
    mixed = list(by_kind.values())
    return {
        "other prompts of the same kinds": (
            [prompt for prompts in mixed for prompt in prompts[::2]],
            [prompt for prompts in mixed for prompt in prompts[1::2]],
        ),
        "prompts of another kind": (
            by_kind["english"] + by_kind["python"],
            by_kind["reasoning"],
        ),
    }


def run_bundled(progress: Progress, new_tokens: int) -> dict[str, Any]:
    """Split -> budget -> policy -> pinned share -> counts of a real run."""
    folder = Path(moe_runtime.bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table: dict[str, Any] = {}
    rows = 2 * len(BUDGETS) * len(POLICIES) * (1 + len(PINNED_SHARES))
    task = progress.add_task("bundled model", total=rows)
    for name, (fit, test) in splits(folder).items():
        model = moe_runtime.from_pretrained(folder, expert_budget="100%", device="cpu")
        with moe_runtime.record(model) as recorder:
            answers(model, tokenizer, fit, new_tokens)
        counts = count_uses(recorder.trace)
        table[name] = {"fitted to prompts": len(fit), "tested on prompts": len(test)}
        for budget in BUDGETS:
            table[name][budget] = {}
            for policy in POLICIES:
                found = {}
                for share in (0.0, *PINNED_SHARES):
                    found[f"{share:.0%} pinned"] = run_once(
                        folder, tokenizer, test, counts, budget, policy, share, new_tokens
                    )
                    progress.advance(task)
                table[name][budget][policy] = found
    return table


def run_once(
    folder: Path,
    tokenizer: Any,
    prompts: Sequence[str],
    counts: Sequence[FloatArray],
    budget: str,
    policy: str,
    share: float,
    new_tokens: int,
) -> dict[str, Any]:
    """One run of the test prompts; the cache is cold but for what the plan loads."""
    options = {"expert_budget": budget, "policy": policy, "device": "cpu"}
    model = moe_runtime.from_pretrained(folder, **options)
    runtime = moe_runtime.runtime_of(model)
    slots = sum(runtime.budget.slots)
    predicted = None
    if share:
        plan = residency_plan(
            runtime.spec.grid, counts, round(share * slots), fingerprint=runtime.spec.fingerprint
        )
        predicted = plan.metrics["residency"]["predicted_share"]
        model = moe_runtime.from_pretrained(folder, plan=plan, **options)
    loaded = moe_runtime.report(model, simulate=False).counters.bytes_read
    answers(model, tokenizer, prompts, new_tokens)
    report = moe_runtime.report(model, simulate=False)
    plan_section = report.to_dict()["plan"] or {}
    return {
        "slots": slots,
        "pinned": plan_section.get("pinned", 0),
        "hit_rate": round(report.counters.hit_rate or 0.0, 4),
        "hits": report.counters.hits,
        "misses": report.counters.misses,
        "bytes_read": report.counters.bytes_read,
        "bytes_read_before_the_first_step": loaded,
        "predicted_share": predicted,
        "observed_share": plan_section.get("observed_share"),
    }


# -- the shared traces ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One test of a plan on a trace.

    Args:
        counts: what the plan is fitted to.
        warm: accesses that come before the test and are not counted.
        test: accesses that are.
    """

    grid: ExpertGrid
    counts: list[FloatArray]
    warm: list[Access]
    test: list[Access]

    def oracle(self) -> list[FloatArray]:
        """The counts of the test itself, which no plan can know."""
        return uses_of(self.grid, self.test)


def uses_of(grid: ExpertGrid, accesses: Sequence[Access]) -> list[FloatArray]:
    uses = [np.zeros(count) for count in grid.experts]
    for access in accesses:
        uses[access.position][access.experts] += 1.0
    return uses


def trials(folder: Path) -> dict[str, list[Trial]]:
    """Several runs: each is tested with a plan of the others, cold. One run: a plan of its first
    half, which also warms the cache, is tested on the second. Decoding only.
    """
    found: dict[str, list[Trial]] = {}
    for name, traces in load_shared_traces(folder).items():
        decoded = [trace.decode().accesses() for trace in traces]
        grid = traces[0].grid
        if len(traces) > 1:
            uses = [uses_of(grid, accesses) for accesses in decoded]
            found[name] = [
                Trial(
                    grid=grid,
                    counts=[
                        np.sum([u[at] for n, u in enumerate(uses) if n != run], axis=0)
                        for at in range(len(grid.layers))
                    ],
                    warm=[],
                    test=decoded[run],
                )
                for run in range(len(traces))
            ]
        else:
            half = len(decoded[0]) // len(grid.layers) // 2 * len(grid.layers)
            warm = decoded[0][:half]
            found[name] = [
                Trial(grid=grid, counts=uses_of(grid, warm), warm=warm, test=decoded[0][half:])
            ]
    return found


def replay(trial: Trial, policy: str, slots: int, pinned: int, *, oracle: bool) -> dict[str, Any]:
    """Hits, misses and pinned hits on the test, and the plan's prediction."""
    stays, predicted = None, 0.0
    if pinned:
        counts = trial.oracle() if oracle else trial.counts
        plan = residency_plan(trial.grid, counts, pinned)
        stays = np.array([trial.grid.index(*expert) for expert in plan.residents()], np.int64)
        predicted = plan.metrics["residency"]["predicted_share"]
    runs = [
        simulate(make_policy(policy, trial.grid), trial.grid, accesses, slots, pinned=stays)
        for accesses in ([*trial.warm, *trial.test], trial.warm)
    ]
    hits, misses, served = (
        getattr(runs[0], name) - getattr(runs[1], name)
        for name in ("hits", "misses", "pinned_hits")
    )
    return {
        "hits": hits,
        "misses": misses,
        "served": served,
        "predicted": predicted * (hits + misses),
        "loads": misses + (0 if stays is None else len(stays)),
    }


def replay_traces(progress: Progress, folder: Path) -> dict[str, Any]:
    """Model -> share of experts that have a slot -> policy -> pinned share -> counts."""
    table: dict[str, Any] = {}
    task = progress.add_task("shared traces", total=len(TRACE_NAMES) * len(SLOT_SHARES))
    for name, tests in trials(folder).items():
        table[name] = {"tests": len(tests), "kind": "other runs" if len(tests) > 1 else "2nd half"}
        for slot_share in SLOT_SHARES:
            slots = round(tests[0].grid.size * slot_share)
            entry: dict[str, Any] = {"slots": slots}
            for policy in POLICIES:
                entry[policy] = {}
                for share in (0.0, *PINNED_SHARES):
                    pinned = round(share * slots)
                    entry[policy][f"{share:.0%} pinned"] = summed(
                        [replay(test, policy, slots, pinned, oracle=False) for test in tests]
                    )
                    if share and policy == "lru":
                        entry[policy][f"{share:.0%} pinned, fitted to the test itself"] = summed(
                            [replay(test, policy, slots, pinned, oracle=True) for test in tests]
                        )
            table[name][str(slot_share)] = entry
            progress.advance(task)
    return table


def summed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tests of a model together."""
    total = {name: sum(result[name] for result in results) for name in results[0]}
    uses = total["hits"] + total["misses"]
    return {
        "hit_rate": round(total["hits"] / uses, 4),
        "misses": total["misses"],
        "misses_and_pinned_loads": total["loads"],
        "predicted_share": round(total["predicted"] / uses, 4),
        "observed_share": round(total["served"] / uses, 4),
    }


# -- together ------------------------------------------------------------------------------------


def against_no_plan(rows: dict[str, Any]) -> dict[str, float]:
    """Misses over those without a plan; below 1 the plan helps."""
    base = rows["0% pinned"]["misses"]
    return {
        name: round(row["misses"] / base, 4) for name, row in rows.items() if name != "0% pinned"
    }


def verdict(bundled: dict[str, Any], traces: dict[str, Any]) -> dict[str, Any]:
    """Misses with the plan over misses without it, everywhere."""
    found: dict[str, Any] = {}
    for split, entry in bundled.items():
        for budget in BUDGETS:
            for policy in POLICIES:
                found[f"bundled, {split}, {budget}, {policy}"] = against_no_plan(
                    entry[budget][policy]
                )
    for name, entry in traces.items():
        for share in SLOT_SHARES:
            for policy in POLICIES:
                found[f"{name}, {share:.1%}, {policy}"] = against_no_plan(entry[str(share)][policy])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        traces = replay_traces(progress, options.traces)
        bundled = run_bundled(progress, options.new_tokens)
    result = {
        "what": "the same slots with and without a residency plan; the plan is fitted to other "
        "prompts, other runs or the run's first half, but where it says 'the test itself'. "
        "Loading pinned experts is no miss; it is in bytes_read and misses_and_pinned_loads",
        "misses over those without a plan": verdict(bundled, traces),
        "bundled model": {"new_tokens": options.new_tokens, "splits": bundled},
        "shared traces": {"what": "decode only, replayed; a single run's test starts warm",
                          **traces},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_average": [round(load, 1) for load in os.getloadavg()],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "moe_runtime": __version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        },
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(options.output)
    for name, ratios in verdict(bundled, traces).items():
        console.print(name, ratios, highlight=False)


if __name__ == "__main__":
    main()
