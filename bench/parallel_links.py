"""Decode steps of expert parallelism over links shaped in rate, beside the cost model's prediction.

Ranks are processes in network namespaces of this bench's own, joined by a switch; a token bucket at
both ends of each cable sets the rate, and the latency is slept in every collective, as stated. What
they send is what the cost model says: the exchanges of every step, byte for byte, replayed from
recorded routing of the bundled model (held-out tokens; plans fitted to others), at stated hidden
and key/value widths, over the engine's own link (`GroupLink` on gloo). Nothing is computed: it is
the time on the links alone. Each case says beforehand what the model predicts of it; all are
reported. Needs root. Run:

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
from moe_runtime.placement.step_time import ModeTime, compare_modes
from moe_runtime.placement.step_traffic import replay
from moe_runtime.placement.timed_plan import Serving, make_timed_plan
from moe_runtime.placement.topology import Topology
from rich.console import Console

import moe_runtime
from corpora import corpora
from moe_runtime.core import IntArray
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine
from shaped_network import burst_bytes, run_ranks

RESULTS = Path(__file__).parent / "results" / "parallel_links.json"
SAY = Console(stderr=True, highlight=False)
SEED = 0
STEPS, ROUNDS = 6, 5
TEXTS, TOKENS = 40, 400  # of each kind; of each text
PLAN_SECONDS = 4.0
RAW_SIZES = [8, 4096, 65536, 262144]
SLOW, FAST = ("100 Mbit/s, 0.2 ms", 1e8, 2e-4), ("1 Gbit/s, 0.2 ms", 1e9, 2e-4)
LINKS = (FAST, SLOW)
CASES = {  # top-k, hidden width, numbers of a key and value, rows a step, links
    "top-1, narrow keys and values": (1, 2048, 128, 32, LINKS),
    "top-1, narrow keys and values, 128 rows": (1, 2048, 128, 128, LINKS),
    "top-1, one row a rank": (1, 2048, 128, 0, (SLOW,)),
    "top-1, wide keys and values": (1, 2048, 2048, 32, (SLOW,)),
    "top-4, narrow keys and values": (4, 2048, 128, 32, (SLOW,)),
}
BASELINE = "vanilla, contiguous"
GOAL = 2.2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case on so many ranks over one link: what goes over it, and what that should take.

    Args:
        sent: by variant int64 `[steps, collectives, ranks, ranks]`, bytes from rank to rank.
        predicted: by variant, the cost model's.
    """

    name: str
    serving: Serving
    sent: dict[str, IntArray]
    predicted: dict[str, ModeTime]


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


def raw_links(found: list[dict[str, Any]], ranks: int, rate: float) -> list[dict[str, Any]]:
    """Measured collectives, beside bytes over bandwidth, alone and with an empty one's time."""
    base = found[0]["seconds"]
    for row in found:
        ideal = row["bytes"] * (ranks - 1) * 8 / rate
        row["modelled_seconds"] = ideal
        row["modelled_over_measured"] = round(ideal / row["seconds"], 3)
        row["with_base_over_measured"] = round((ideal + base) / row["seconds"], 3)
    return found


def plans_of(ranks: int, serving: Serving, train: RoutingTrace) -> dict[str, list[BoolArray]]:
    """Contiguous experts, and for each mode the plan that is fastest in it on training tokens."""
    topology = Topology.of(ranks)
    problem = Problem(layer_ids=train.layer_ids, experts=train.experts, topology=topology)
    options = SolveOptions(seed=SEED, time_limit=PLAN_SECONDS)
    made = {
        mode: make_timed_plan(problem, train, serving, mode, options=options).matrices()
        for mode in MODES
    }
    return {"contiguous": contiguous(train.experts, ranks), **made}


def case_of(name: str, ranks: int, link: tuple[str, float, float], recorded: RoutingTrace) -> Case:
    """The case's plans, fitted to training tokens, and what held-out ones send under them."""
    k, hidden, kv, rows, _ = CASES[name]
    _, rate, latency = link
    trace = first_choices(recorded) if k == 1 else recorded
    train, test = split_holdout(trace, 0.3, SEED)
    sizes = MessageSizes.of(
        hidden=hidden, keys_values=kv, layers=len(trace.layer_ids), top_k=k,
        experts=max(trace.experts), rows=rows or ranks,
    )  # fmt: skip
    links = Links(near=Link(bandwidth=rate / 8, latency=latency))
    serving = Serving(rows=rows or ranks, sizes=sizes, links=links)
    topology, plans = Topology.of(ranks), plans_of(ranks, serving, train)
    lanes, steps = in_lanes(test, serving.rows, most=STEPS)
    arrays: dict[str, IntArray] = {}
    predicted: dict[str, ModeTime] = {}
    for plan in ("contiguous", "plan"):
        traffic = {}
        for mode in MODES:
            held = plans["contiguous" if plan == "contiguous" else mode]
            starts = starts_of(held, topology, lanes, steps)
            sent = replay(held, topology, lanes, steps, sizes, mode, starts, keep=True)
            assert sent.matrices is not None
            assert (loads_by_level(sent.matrices, topology) == sent.loads).all()
            arrays[f"{mode}, {plan}"] = sent.matrices.astype(np.int64)
            traffic[mode] = sent
        both = compare_modes(traffic["vanilla"], traffic["coherent"], links, topology)
        predicted |= {f"{mode}, {plan}": getattr(both, mode) for mode in MODES}
    return Case(name=name, serving=serving, sent=arrays, predicted=predicted)


def figures(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Step times of the four variants, predicted and on the links."""
    latency, empty = case.serving.links.near.latency, median(found["base"])
    # Means over the steps of a round, compared within the round: rounds see the same machine load.
    rounds = {name: [fmean(times) for times in found["steps"][name]][1:] for name in case.sent}
    rows = {}
    for name, times in rounds.items():
        ratios = [base / mine for base, mine in zip(rounds[BASELINE], times, strict=True)]
        mine = case.predicted[name]
        steps = len(case.sent[name])
        assert found["sent"][name] == round(mine.cross_bytes * steps), (name, "bytes as modelled")
        # An empty collective's time as measured here stands in for the stated latency alone.
        with_base = mine.seconds + mine.collectives * (empty - latency)
        rows[name] = {
            "measured_ms": round(1e3 * median(times), 3),
            "measured_ms_range": [round(1e3 * min(times), 3), round(1e3 * max(times), 3)],
            "predicted_ms": round(1e3 * mine.seconds, 3),
            "predicted_with_base_ms": round(1e3 * with_base, 3),
            "with_base_over_measured": round(with_base / median(times), 3),
            "predicted_over_measured": round(mine.seconds / median(times), 3),
            "speedup_measured": round(median(ratios), 3),
            "speedup_measured_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "speedup_predicted": round(case.predicted[BASELINE].seconds / mine.seconds, 3),
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
        "rows": case.serving.rows,
        "sizes": case.serving.sizes.to_dict(),
        "empty_collective_ms": [round(1e3 * one, 3) for one in sorted(found["base"])],
    }


def goal_met(steps: dict[str, Any]) -> dict[str, Any]:
    """Every case of coherent ranks with a plan of which 2.2x or more was predicted."""
    rows = {
        f"{name}, {where}": found["variants"]["coherent, plan"]
        for name, by_ranks in steps.items()
        for where, found in by_ranks.items()
    }
    shown = ("speedup_predicted", "speedup_measured", "speedup_measured_range")
    asked = {
        name: {key: row[key] for key in shown}
        for name, row in rows.items()
        if row["speedup_predicted"] >= GOAL
    }
    reached = sum(row["speedup_measured"] >= GOAL for row in asked.values())
    return {"goal": GOAL, "cases": len(asked), "reached": reached, "each": asked}


def main() -> None:
    """Everything, link by link; the file is written after each."""
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
            "sent": "the cost model's messages over the engine's link, nothing computed; latency "
            "slept per collective",
            "burst_bytes": {name: burst_bytes(rate) for name, rate, _ in LINKS},
        },
        "raw": {},
        "steps": {},
    }
    for ranks in given.ranks:
        for link in LINKS:
            name, rate, latency = link
            names = [one for one, case in CASES.items() if link in case[-1]]
            cases = [case_of(one, ranks, link, recorded) for one in names]
            task = {
                "raw": RAW_SIZES,
                "cases": [list(case.sent) for case in cases],
                "rounds": ROUNDS,
                "latency": latency,
            }
            arrays = {
                f"{at} {variant}": sent
                for at, case in enumerate(cases)
                for variant, sent in case.sent.items()
            }
            answer = told_ranks(ranks, rate, task, arrays)
            raw = raw_links(answer["raw"], ranks, rate)
            result["raw"][f"{ranks} ranks, {name.split(',')[0]}"] = raw
            for case, found in zip(cases, answer["cases"], strict=True):
                shown = figures(case, found)
                result["steps"].setdefault(case.name, {})[f"{ranks} ranks, {name}"] = shown
                for variant, row in shown["variants"].items():
                    keys = ("measured_ms", "predicted_ms", "predicted_with_base_ms",
                            "speedup_measured", "speedup_predicted")  # fmt: skip
                    SAY.print(ranks, name, case.name, variant, *(row[key] for key in keys))
            result["predicted_at_the_goal"] = goal_met(result["steps"])
            result["seconds"] = round(time.time() - began)
            given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
