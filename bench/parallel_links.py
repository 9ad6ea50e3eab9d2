"""Decode steps of expert parallelism over links shaped in rate, beside the cost model's prediction.

Ranks are processes in network namespaces of this bench's own, joined by a switch; a token bucket at
both ends of each cable sets the rate, and the latency is slept in every collective, as stated. What
they send is what the cost model says: the exchanges of every step, byte for byte, replayed from
recorded routing of the bundled model (held-out tokens; plans fitted to others), at stated hidden
and key/value widths. Nothing is computed: it is the time on the links alone, through gloo. Needs
root. Run:

    python bench/parallel_links.py          # to bench/results/parallel_links.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import transformers
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.decode_steps import first_choices, in_lanes, starts_of
from moe_runtime.placement.links import Link, Links, loads_by_level
from moe_runtime.placement.messages import MODES, MessageSizes
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.solve import split_holdout
from moe_runtime.placement.step_time import compare_modes
from moe_runtime.placement.step_traffic import replay
from moe_runtime.placement.timed_plan import Serving, make_timed_plan
from moe_runtime.placement.topology import Topology
from rich.console import Console

import moe_runtime
from corpora import corpora
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine
from shaped_network import burst_bytes, run_ranks

RESULTS = Path(__file__).parent / "results" / "parallel_links.json"
SAY = Console(stderr=True, highlight=False)
SEED = 0
STEPS, ROUNDS = 8, 5
TEXTS, TOKENS = 40, 400  # of each kind; of each text
RAW_SIZES = [8, 4096, 65536, 524288]
CASES = {  # top-k, hidden width, numbers of a key and value, rows a step
    "top-1, narrow keys and values": (1, 2048, 128, 32),
    "top-1, one row a rank": (1, 2048, 128, 0),
    "top-1, wide keys and values": (1, 2048, 2048, 32),
    "top-4, narrow keys and values": (4, 2048, 128, 32),
}
LINKS = (("1 Gbit/s, 0.2 ms", 1e9, 2e-4), ("100 Mbit/s, 0.2 ms", 1e8, 2e-4))
BASELINE = "vanilla, contiguous"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One case on so many ranks over one link."""

    name: str
    ranks: int
    serving: Serving


def told_ranks(ranks: int, rate: float, task: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """What rank 0 found, of ranks that were given these arrays too."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "arrays.npz"), **arrays)
        return run_ranks("parallel_links_rank.py", ranks, rate, task, Path(folder))


def recorded_routing() -> RoutingTrace:
    """The bundled model's routing of the texts of every kind, a sequence each."""
    path = moe_runtime.bundled_model()
    model = moe_runtime.from_pretrained(path, expert_budget="100%", device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for texts in corpora().values():
            for text in texts[:TEXTS]:
                ids = tokenizer(text[:4000], return_tensors="pt")["input_ids"][:, :TOKENS]
                model(ids)
    return recorder.trace


def raw_links(ranks: int, rate: float) -> list[dict[str, Any]]:
    """Measured collectives, beside bytes over bandwidth, alone and with an empty one's time."""
    found = told_ranks(ranks, rate, {"raw": RAW_SIZES, "variants": []}, {})["raw"]
    base = found[0]["seconds"]
    for row in found:
        ideal = row["bytes"] * (ranks - 1) * 8 / rate
        row["modelled_seconds"] = ideal
        row["modelled_over_measured"] = round(ideal / row["seconds"], 3)
        row["with_base_over_measured"] = round((ideal + base) / row["seconds"], 3)
    return found


def plans_of(setting: Setting, train: RoutingTrace) -> dict[str, list[BoolArray]]:
    """Contiguous experts, and for each mode the plan that is fastest in it on training tokens."""
    topology = Topology.of(setting.ranks)
    problem = Problem(layer_ids=train.layer_ids, experts=train.experts, topology=topology)
    options = SolveOptions(seed=SEED, time_limit=6.0)
    made = {
        mode: make_timed_plan(problem, train, setting.serving, mode, options=options).matrices()
        for mode in MODES
    }
    return {"contiguous": contiguous(train.experts, setting.ranks), **made}


def measured(
    setting: Setting,
    test: RoutingTrace,
    rate: float,
    plans: dict[str, list[BoolArray]],
) -> dict[str, Any]:
    """Step times of the four variants, predicted and on the links."""
    topology, serving = Topology.of(setting.ranks), setting.serving
    lanes, steps = in_lanes(test, serving.rows, most=STEPS)
    arrays, predicted = {}, {}
    for plan in ("contiguous", "plan"):
        traffic = {}
        for mode in MODES:
            held = plans["contiguous" if plan == "contiguous" else mode]
            starts = starts_of(held, topology, lanes, steps)
            sent = replay(held, topology, lanes, steps, serving.sizes, mode, starts, keep=True)
            assert sent.matrices is not None
            assert (loads_by_level(sent.matrices, topology) == sent.loads).all()
            arrays[f"{mode}, {plan}"] = sent.matrices.astype(np.int64)
            traffic[mode] = sent
        both = compare_modes(traffic["vanilla"], traffic["coherent"], serving.links, topology)
        predicted |= {f"{mode}, {plan}": getattr(both, mode) for mode in MODES}
    task = {
        "raw": [],
        "variants": list(arrays),
        "rounds": ROUNDS,
        "latency": serving.links.near.latency,
    }
    answer = told_ranks(setting.ranks, rate, task, arrays)
    found, base = answer["steps"], median(answer["base"])
    # Means over the steps of a round, compared within the round: rounds see the same machine load.
    rounds = {name: [fmean(times) for times in found[name]][1:] for name in found}
    rows = {}
    for name, times in rounds.items():
        ratios = [base / mine for base, mine in zip(rounds[BASELINE], times, strict=True)]
        mine = predicted[name]
        # An empty collective's time as measured here stands in for the stated latency alone.
        with_base = mine.seconds + mine.collectives * (base - serving.links.near.latency)
        rows[name] = {
            "measured_ms": round(1e3 * median(times), 3),
            "measured_ms_range": [round(1e3 * min(times), 3), round(1e3 * max(times), 3)],
            "predicted_ms": round(1e3 * mine.seconds, 3),
            "predicted_with_base_ms": round(1e3 * with_base, 3),
            "with_base_over_measured": round(with_base / median(times), 3),
            "predicted_over_measured": round(mine.seconds / median(times), 3),
            "speedup_measured": round(median(ratios), 3),
            "speedup_measured_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "speedup_predicted": round(predicted[BASELINE].seconds / mine.seconds, 3),
            "collectives": round(mine.collectives, 2),
            "cross_bytes": round(mine.cross_bytes),
            "bytes_by_kind": {kind: round(sent) for kind, sent in mine.bytes_by_kind.items()},
            "stays": round(mine.stays, 4),
        }
    based = {name: row["predicted_with_base_ms"] for name, row in rows.items()}
    for name, row in rows.items():
        row["speedup_predicted_with_base"] = round(based[BASELINE] / based[name], 3)
    return {
        "variants": rows,
        "rows": serving.rows,
        "sizes": serving.sizes.to_dict(),
        "empty_collective_ms": [round(1e3 * one, 3) for one in sorted(answer["base"])],
    }


def main() -> None:
    """Everything, case by case; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    began = time.time()
    recorded = recorded_routing()
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "seed": SEED,
            "steps": STEPS,
            "rounds": ROUNDS - 1,
            "routing": "bundled model, english, python and puzzles; 30 % of the sequences held out",
            "sent": "the cost model's messages, nothing computed; latency slept per collective",
            "burst_bytes": {name: burst_bytes(rate) for name, rate, _ in LINKS},
        },
        "raw": {},
        "steps": {},
    }
    for ranks in given.ranks:
        for link, rate, latency in LINKS:
            result["raw"][f"{ranks} ranks, {link.split(',')[0]}"] = raw_links(ranks, rate)
            for name, (k, hidden, kv, rows) in CASES.items():
                trace = first_choices(recorded) if k == 1 else recorded
                train, test = split_holdout(trace, 0.3, SEED)
                sizes = MessageSizes.of(
                    hidden=hidden,
                    keys_values=kv,
                    layers=len(trace.layer_ids),
                    top_k=k,
                    experts=max(trace.experts),
                    rows=rows or ranks,
                )
                links = Links(near=Link(bandwidth=rate / 8, latency=latency))
                serving = Serving(rows=rows or ranks, sizes=sizes, links=links)
                setting = Setting(name=name, ranks=ranks, serving=serving)
                found = measured(setting, test, rate, plans_of(setting, train))
                result["steps"].setdefault(name, {})[f"{ranks} ranks, {link}"] = found
                for variant, row in found["variants"].items():
                    shown = ("measured_ms", "predicted_ms", "predicted_with_base_ms",
                             "speedup_measured", "speedup_predicted")  # fmt: skip
                    SAY.print(ranks, link, name, variant, *(row[key] for key in shown))
            result["seconds"] = round(time.time() - began)
            given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
