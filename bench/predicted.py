"""The policy that ranks by predicted next use: against the global Belady, ablated, and in batches.

Decode only, cold cache, one pool of slots over all layers, 12.5 % and 25 % of the experts of the
four shared traces; then the bundled model's decoding at batch 4 and 16. Simulated: it counts, and
times only the policies' own calls. Run:

    python bench/predicted.py                   # to bench/results/predicted.json
    python bench/predicted.py --only batches    # one part; the others are kept
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid
from moe_runtime.eviction import Belady, EvictionPolicy, make_policy
from moe_runtime.eviction_learned import EchoConstants
from moe_runtime.eviction_predicted import Predicted
from moe_runtime.simulate import simulate
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine
from policies import RESULTS as POLICIES
from policies import Recording, TimedPolicy, machine, optimum, recordings, replay
from shared_traces import TRACE_NAMES

RESULTS = Path(__file__).parent / "results" / "predicted.json"
SHARES = (0.125, 0.25)
TARGET = 1.25
# A second resemblance, by surprising experts, and all constants searched anew by an evolution
# strategy on the three other models: measured as commit 3bfe81b has it, and no better held out.
DROPPED = {
    "two echoes, fitted on the other models": {"0.125": 1.4459, "0.25": 1.408},
    "two echoes, fitted on all four": {"0.125": 1.4404, "0.25": 1.3981},
}
SAY = Console(stderr=True, highlight=False)
Maker = Callable[[ExpertGrid], EvictionPolicy]
Bounds = dict[tuple[str, float], tuple[int, int]]


# -- the shared traces -----------------------------------------------------------------------------


def ratios_of(
    make: Callable[[str], Maker],
    data: dict[str, list[Recording]],
    bounds: Bounds,
    known: str = "nothing",
) -> dict[str, Any]:
    """Share -> ratio of each trace, their mean and worst, and what the policy's calls cost."""
    table: dict[str, Any] = {}
    for share in SHARES:
        ratios, costs = {}, []
        for name in TRACE_NAMES:
            misses, cost = replay(make(name), data[name], share, known=known)
            ratios[name] = round(misses / bounds[name, share][0], 4)
            costs.append(cost)
        table[str(share)] = {
            "mean": round(fmean(ratios.values()), 4),
            "worst": max(ratios.values()),
            "traces": ratios,
            "policy_cpu_microseconds_per_layer_step": round(max(costs), 1),
        }
    return table


class Foreseeing:
    """`Predicted` fed with what will really be used: how much a perfect predictor would be worth.

    Args:
        whole: also the coming step of the layers that the present pass has passed.
    """

    name = "foreseeing"

    def __init__(self, policy: Predicted, run: Recording, *, whole: bool) -> None:
        self._policy, self._whole, self._grid = policy, whole, run.grid
        layers = len(run.grid.layers)
        self._uses: list[list[np.ndarray | None]] = []
        position = layers
        for access in run.decoded:
            if access.position <= position:
                self._uses.append([None] * layers)
            position = access.position
            used = np.zeros(run.grid.experts[position])
            used[access.experts] = 1.0
            self._uses[-1][position] = used
        self._pass, self._position = -1, layers

    def observe(self, position: int, experts: Any, tokens: Any) -> None:
        self._pass += position <= self._position
        self._position = position
        self._policy.observe(position, experts, tokens)
        values = np.full(self._grid.size, np.nan)
        for layer, (start, count) in enumerate(
            zip(self._grid.offsets, self._grid.experts, strict=True)
        ):
            at = self._pass + (layer <= position)
            if at < len(self._uses) and (self._whole or layer > position):
                used = self._uses[at][layer]
                if used is not None:
                    values[start : start + count] = used
        self._policy.expect(values)

    def rank(self, candidates: Any) -> Any:
        return self._policy.rank(candidates)


def foreseen(
    data: dict[str, list[Recording]], bounds: Bounds, constants: dict[str, EchoConstants],
    *, whole: bool,
) -> dict[str, Any]:  # fmt: skip
    """Ratios with an oracle behind `expect`."""
    table: dict[str, Any] = {}
    for share in SHARES:
        ratios = {}
        for name in TRACE_NAMES:
            misses = 0
            for run in data[name]:
                policy = Foreseeing(Predicted(run.grid, constants[name]), run, whole=whole)
                misses += simulate(policy, run.grid, run.decoded, run.slots(share)).misses
            ratios[name] = round(misses / bounds[name, share][0], 4)
        table[str(share)] = {
            "mean": round(fmean(ratios.values()), 4), "worst": max(ratios.values()),
            "traces": ratios,
        }  # fmt: skip
    return table


_ROWS: dict[str, Callable[[], dict[str, Any]]] = {}  # what the forked workers find in place


def _row(label: str) -> tuple[str, dict[str, Any]]:
    return label, _ROWS[label]()


def shared(folder: Path, workers: int) -> dict[str, Any]:
    """The table and the ablation; constants fitted on the three other models."""
    data = recordings(folder)
    bounds = {(n, share): optimum(data[n], share) for n in TRACE_NAMES for share in SHARES}
    fitted = json.loads(POLICIES.read_text())["fitted"]
    ours = {name: EchoConstants(**fitted["echo"][name]) for name in TRACE_NAMES}

    def variant(**changes: float) -> Callable[[str], Maker]:
        return lambda name: lambda grid: Predicted(grid, replace(ours[name], **changes))

    rows: dict[str, tuple[Callable[[str], Maker], str]] = {
        "lru": (lambda _: lambda grid: make_policy("lru", grid), "nothing"),
        "lfu": (lambda n: lambda grid: make_policy("lfu", grid, decay=fitted["lfu"][n]), "nothing"),
        "predicted": (variant(), "nothing"),
        "predicted after prompt": (variant(), "prompt"),
        "predicted after prompt tokens": (variant(), "prompt tokens"),
        "predicted, shipped constants": (
            lambda _: lambda grid: make_policy("predicted", grid), "nothing",
        ),
        "without the echo": (variant(trust=0.0), "nothing"),
        "without layer order": (variant(order=0.0), "nothing"),
    }  # fmt: skip
    for label, (make, known) in rows.items():
        _ROWS[label] = partial(ratios_of, make, data, bounds, known)
    for label, whole in (("oracle of this pass", False), ("oracle of one pass ahead", True)):
        _ROWS[label] = partial(foreseen, data, bounds, ours, whole=whole)
    table: dict[str, Any] = dict.fromkeys(_ROWS)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for label, row in pool.imap_unordered(_row, list(_ROWS)):
            table[label] = row
            SAY.print(label, {s: (e["mean"], e["traces"]) for s, e in row.items()})
    return {"target": TARGET, "policies": table, "tried and dropped": DROPPED, "machine": machine()}


# -- batches of the bundled model ------------------------------------------------------------------


def record_batches(batch: int, batches: int, new_tokens: int) -> RoutingTrace:
    """Greedy decoding of held-out puzzles, `batch` prompts at a time, left-padded."""
    import torch
    from transformers import AutoTokenizer

    import moe_runtime
    from bundled_model.puzzles import held_out

    path = moe_runtime.bundled_model()
    model = moe_runtime.from_pretrained(path, expert_budget="100%", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    prompts = [one.prompt for one in held_out(batch * batches)]
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for first in range(0, len(prompts), batch):
            inputs = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True)
            model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return recorder.trace


def by_layer(grid: ExpertGrid, run: Sequence[Access], slots: int) -> float:
    """Hit rate of LRU with an equal part of the slots for each layer."""
    hits = requests = 0
    for position, count in enumerate(grid.experts):
        own = ExpertGrid(layers=(grid.layers[position],), experts=(count,))
        steps = [replace(access, position=0) for access in run if access.position == position]
        part = slots // len(grid.layers)
        result = simulate(make_policy("lru", own), own, steps, part)
        hits, requests = hits + result.hits, requests + result.requests
    return hits / requests


def batches() -> dict[str, Any]:
    """Hit rates of the bundled model's decoding; the paper's two settings are among them."""
    result: dict[str, Any] = {
        "what": "greedy decoding of held-out puzzles, 64 new tokens",
        "paper": {
            "batch 4, half": {"ours": 0.9196, "lru": 0.7661},
            "batch 16, quarter": {"ours": 0.7189, "lru": 0.3622},
        },
    }
    for batch, count in ((1, 8), (4, 8), (16, 4)):
        trace = record_batches(batch, count, 64)
        grid, run = trace.grid, trace.decode().accesses()
        rows = {}
        for share in (0.25, 0.5):
            slots = round(grid.size * share)
            hits = {"lru, by layer": round(by_layer(grid, run, slots), 4)}
            for name in ("lru", "lfu", "echo", "predicted"):
                policy = TimedPolicy(make_policy(name, grid))
                hits[name] = round(simulate(policy, grid, run, slots).hit_rate, 4)
            hits["belady"] = round(simulate(Belady(grid, run), grid, run, slots).hit_rate, 4)
            rows[str(share)] = hits
        active = fmean(len(access.experts) for access in run)
        result[f"batch {batch}"] = {
            "prompts": batch * count, "layer steps": len(run),
            "experts a layer step": round(active, 2), "hit rates": rows,
        }  # fmt: skip
        SAY.print(batch, result[f"batch {batch}"])
    return {**result, "machine": describe_machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--only", choices=("shared", "batches"))
    parser.add_argument("--workers", type=int, default=4, help="rows measured at a time")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"moe_runtime": __version__}
    parts = {"shared": lambda: shared(options.traces, options.workers), "batches": batches}
    for part, measure in parts.items():
        if options.only in (None, part):
            found[part] = measure()
            options.output.parent.mkdir(parents=True, exist_ok=True)
            temporary = options.output.with_suffix(".tmp")
            temporary.write_text(json.dumps(found, indent=1) + "\n")
            temporary.replace(options.output)


if __name__ == "__main__":
    main()
