"""Placement plans on real traces, on the bundled model and on planted instances.

Every figure is held out unless it says train: plans are measured on tokens that they were not
fitted to, beside contiguous, random, load-balanced and EPLB-style plans. Run:

    python bench/placement.py --traces ../shared/traces      # to bench/results/placement.json
    python bench/placement.py --traces ... --only themes     # one part; the others are kept
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from moe_runtime.placement.affinity import Affinity, affinity_of
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.bounds import lower_bound
from moe_runtime.placement.cost import Metrics, measure
from moe_runtime.placement.instance import make_instance
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.smoothing import LEVELS
from moe_runtime.placement.solve import make_plan, split_holdout
from moe_runtime.placement.sweep import improve, sweep
from moe_runtime.placement.topology import Topology
from rich.console import Console

from corpora import corpora
from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine
from shared_traces import load_shared_traces

RESULTS = Path(__file__).parent / "results" / "placement.json"
SEEDS = (0, 1, 2, 3, 4)
THEMES = ("cooking", "history", "ml_moe")
SAY = Console(stderr=True, highlight=False)
SHOWN = ("crossing", "distinct_devices", "load")


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: round(metrics[name], 4) for name in SHOWN}


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace; each of the given ones keeps sequences of its own."""
    ones = [
        replace(trace, sequence_ids=np.full(len(trace), number, np.int32))
        for number, trace in enumerate(traces)
    ]
    return RoutingTrace.concat(ones)


def problem_of(trace: RoutingTrace, devices: int, cap: float | None = None) -> Problem:
    """Equal counts where they divide, else one expert more on some devices."""
    counts = "equal" if all(count % devices == 0 for count in trace.experts) else "capped"
    most = max(-(-count // devices) * devices / count for count in trace.experts)
    return Problem(
        layer_ids=trace.layer_ids,
        experts=trace.experts,
        topology=Topology.of(devices),
        counts=counts,
        slack=most,
        load_cap=cap,
    )


# -- Qwen1.5-MoE across themes ---------------------------------------------------------------------


def plain_sweep(train: RoutingTrace, devices: int, seed: int) -> list[Any]:
    """The method to beat: exact layers swept from four random starts, counts as they are."""
    instance = make_instance(problem_of(train, devices), affinity_of(train))
    rng = np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(4):
        start = [
            rng.permutation(np.repeat(np.arange(devices), one.limits.most))
            for one in instance.slots
        ]
        # Renaming the devices behind a boundary is not part of it.
        found = improve(instance, start, rename=False)
        if instance.cost(found) < least:
            best, least = found, instance.cost(found)
    assert best is not None
    return instance.placement(best)


def themes(folder: Path) -> dict[str, Any]:
    runs = {
        name: [trace for path, trace in named if path.startswith(name)]
        for named in [_qwen_runs(folder)]
        for name in THEMES
    }
    result: dict[str, Any] = {"devices": {}}
    for devices in (2, 4, 8):
        rows: dict[str, dict[str, Any]] = {}
        for cap in (None, 1.1, 1.05) if devices == 4 else (None, 1.1):
            for theme in THEMES:
                train = joined([t for name in THEMES if name != theme for t in runs[name]])
                test = joined(runs[theme]).decode()
                counts = affinity_of(test)
                topology = Topology.of(devices)
                found: dict[str, list[Metrics]] = {"ours": [], "train": [], "plain sweep": []}
                levels, gaps = [], []
                for seed in SEEDS:
                    plan = make_plan(
                        problem_of(train, devices, cap),
                        train,
                        held_out=test,
                        options=SolveOptions(seed=seed, time_limit=20.0),
                    )
                    found["ours"].append(Metrics(**plan.metrics["held_out"]))
                    found["train"].append(Metrics(**plan.metrics["train"]))
                    levels.append(plan.metrics["smoothing"]["level"])
                    assert plan.certificate is not None
                    gaps.append(plan.certificate.gap)
                    if cap is None and devices != 8:
                        plain = plain_sweep(train.decode(), devices, seed)
                        found["plain sweep"].append(measure(plain, topology, test, counts))
                fixed = contiguous(train.experts, devices)
                found["contiguous"] = [measure(fixed, topology, test, counts)]
                rows.setdefault(f"cap {cap}", {})[theme] = {
                    name: {key: round(fmean(getattr(m, key) for m in metrics), 4) for key in SHOWN}
                    for name, metrics in found.items()
                    if metrics
                } | {"smoothing": levels, "gap": round(median(gaps), 4), "tokens": len(test)}
            SAY.print(devices, cap, rows[f"cap {cap}"])
        result["devices"][str(devices)] = {
            cap: {**by_theme, "mean": _mean(by_theme)} for cap, by_theme in rows.items()
        }
    return result


def _qwen_runs(folder: Path) -> list[tuple[str, RoutingTrace]]:
    name = "qwen1.5-moe-a2.7b"
    files = sorted((folder / name).glob("*.json"))
    return [(f.name, t) for f, t in zip(files, load_shared_traces(folder)[name], strict=True)]


def _mean(by_theme: dict[str, Any]) -> dict[str, Any]:
    names = [n for n, row in next(iter(by_theme.values())).items() if isinstance(row, dict)]
    return {
        name: {key: round(fmean(row[name][key] for row in by_theme.values()), 4) for key in SHOWN}
        for name in names
    }


# -- one run of each shared model, and the bundled model -------------------------------------------


def split_runs(folder: Path) -> dict[str, Any]:
    """The other shared models: the first 70 % of the rows against the rest."""
    result: dict[str, Any] = {}
    for name, traces in load_shared_traces(folder).items():
        if name.startswith("qwen1.5"):
            continue
        train, test = split_holdout(joined(traces), 0.3)
        result[name] = plans_for(train, test)
        SAY.print(name, result[name])
    return result


def plans_for(train: RoutingTrace, test: RoutingTrace) -> dict[str, Any]:
    rows = {}
    for devices in (2, 4, 8):
        options = SolveOptions(time_limit=15.0)
        cap: float | None = 1.1
        try:
            plan = make_plan(problem_of(train, devices, cap), train, held_out=test, options=options)
        except PlanError:  # some expert or layer is too uneven for it
            cap = None
            plan = make_plan(problem_of(train, devices), train, held_out=test, options=options)
        assert plan.certificate is not None
        rows[str(devices)] = {
            "ours": shown(plan.metrics["held_out"]),
            "train": shown(plan.metrics["train"]),
            **{name: shown(row["held_out"]) for name, row in plan.metrics["baselines"].items()},
            "load cap": cap,
            "gap": round(plan.certificate.gap, 4),
            "smoothing": plan.metrics["smoothing"]["level"],
            "seconds": round(plan.certificate.seconds, 1),
        }
    return {"train tokens": len(train), "test tokens": len(test), "devices": rows}


def bundled() -> dict[str, Any]:
    """Plans for the bundled model, fitted to one kind of text and tested on another."""
    recorded = {name: record_bundled(texts) for name, texts in corpora().items()}
    result: dict[str, Any] = {}
    for name, trace in recorded.items():
        train, test = split_holdout(trace, 0.3)
        result[f"{name}, held out"] = plans_for(train, test)
        SAY.print(name, result[f"{name}, held out"])
    for train_name, test_name in (("english", "python"), ("python", "puzzles")):
        key = f"{train_name} to {test_name}"
        result[key] = plans_for(recorded[train_name], recorded[test_name])
        SAY.print(key, result[key])
    return result


def record_bundled(texts: Sequence[str], tokens: int = 400) -> RoutingTrace:
    import torch
    from transformers import AutoTokenizer

    import moe_runtime

    path = moe_runtime.bundled_model()
    model = moe_runtime.from_pretrained(path, expert_budget="100%", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for text in texts:
            ids = tokenizer(text[:4000], return_tensors="pt")["input_ids"][:, :tokens]
            model(ids)
    return recorder.trace


# -- planted instances -----------------------------------------------------------------------------

PLANTED = (  # layers, experts, devices, share of pairs that stay at home, seconds allowed
    (8, 8, 2, 0.5, 60.0),
    (8, 8, 4, 0.5, 60.0),
    (24, 64, 8, 0.6, 60.0),
    (24, 64, 8, 0.3, 60.0),
    (58, 256, 32, 0.6, 300.0),
    (58, 256, 32, 0.3, 300.0),
)


def planted_counts(
    layers: int, experts: int, devices: int, stay: float, seed: int = 0
) -> tuple[Affinity, list[IntArray]]:
    """Counts in which experts have homes: this share of the pairs stays at home, the rest goes
    where popularity says. 200 pairs an expert and hop, Poisson.

    Returns:
        The counts, and for each layer the home of each expert.
    """
    rng = np.random.default_rng(seed)
    homes = [
        rng.permutation(np.repeat(np.arange(devices), experts // devices)) for _ in range(layers)
    ]
    popular = [np.exp(0.5 * rng.standard_normal(experts)) for _ in range(layers)]
    hops = []
    for s in range(layers - 1):
        free = popular[s][:, None] * popular[s + 1][None, :]
        home = free * (homes[s][:, None] == homes[s + 1][None, :])
        share = stay * home / home.sum() + (1 - stay) * free / free.sum()
        hops.append(rng.poisson(share * 200 * experts).astype(np.float64))
    load = [*(hop.sum(1) for hop in hops), hops[-1].sum(0)]
    counts = Affinity(
        layer_ids=tuple(range(layers)),
        experts=(experts,) * layers,
        load=tuple(load),
        hops=(tuple(hops),),
    )
    return counts, homes


def planted_one(number: int) -> dict[str, Any]:
    """One planted instance in this process: cost, seconds, bound, peak memory."""
    layers, experts, devices, stay, allowed = PLANTED[number]
    counts, homes = planted_counts(layers, experts, devices, stay)
    problem = Problem(
        layer_ids=counts.layer_ids, experts=counts.experts, topology=Topology.of(devices)
    )
    instance = make_instance(problem, counts)
    began = time.perf_counter()
    first: list[float] = []

    def note(seconds: float, cost: float) -> None:
        if cost <= instance.cost(homes) + 1e-9 and not first:
            first.append(round(seconds, 2))

    found = sweep(
        instance, seed=1, starts=3, perturbations=2, time_limit=0.4 * allowed, progress=note
    )
    solved = time.perf_counter() - began
    bound = lower_bound(instance, time_limit=0.5 * allowed)
    seconds = time.perf_counter() - began
    cost = found.cost
    return {
        "layers": layers,
        "experts": experts,
        "devices": devices,
        "stay": stay,
        "planted": round(instance.cost(homes), 6),
        "found": round(cost, 6),
        "seconds to the planted cost": first[0] if first else None,
        "seconds of sweeps": round(solved, 1),
        "seconds": round(seconds, 1),
        "allowed": allowed,
        "bound": round(bound.cost, 6),
        "gap": round((cost - bound.cost) / cost, 5),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def planted() -> list[dict[str, Any]]:
    rows = []
    for number in range(len(PLANTED)):
        outcome = subprocess.run(
            [sys.executable, __file__, "--planted-one", str(number)],
            check=True,
            capture_output=True,
            text=True,
        )
        rows.append(json.loads(outcome.stdout))
        SAY.print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, help="the folder of recordings of real models")
    parser.add_argument("--only", choices=("themes", "split", "bundled", "planted"))
    parser.add_argument("--planted-one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.planted_one is not None:
        print(json.dumps(planted_one(given.planted_one)))
        return
    result: dict[str, Any] = {}
    if given.out.exists():
        result = json.loads(given.out.read_text(encoding="utf-8"))
    wanted = [given.only] if given.only else ["planted", "bundled", "split", "themes"]
    result |= {
        "machine": describe_machine(),
        "versions": {"moe_runtime": __version__, "numpy": np.__version__},
        "seeds": list(SEEDS),
        "levels": {name: level.__dict__ for name, level in LEVELS.items()},
    }
    for part in wanted:
        if part in ("themes", "split") and given.traces is None:
            parser.error("--traces FOLDER is needed for the shared traces")
        if part == "themes":
            result["themes"] = themes(given.traces)
        elif part == "split":
            result["split"] = split_runs(given.traces)
        elif part == "bundled":
            result["bundled"] = bundled()
        else:
            result["planted"] = planted()
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
