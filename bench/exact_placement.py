"""What is proved how fast, and what the polish adds to sweeps.

Sizes (layers x experts x devices) of planted and of random counts, by HiGHS and CBC on the integer
program and by the dynamic program; then polishing what sweeps found, on planted instances with a
weak signal and on a run of Qwen1.5-MoE. One thread each. Run:

    python bench/exact_placement.py --time-limit 60
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import pulp
from moe_runtime.placement.affinity import Affinity, affinity_of
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.ilp import SOLVERS, solve_program
from moe_runtime.placement.instance import Instance, make_instance
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.sweep import sweep
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.windows import POLISHERS, polish
from rich.console import Console

from moe_runtime.version import __version__
from shared_traces import load_shared_traces

SIZES = ((4, 8, 2), (8, 8, 2), (8, 8, 4), (12, 16, 2), (12, 16, 4))
STAYS = {"planted": 0.6, "weak": 0.2, "random": 0.0}
PAIRS = 200  # a hop and expert
SEED = 0
RESULTS = Path(__file__).parent / "results" / "exact_placement.json"


def counts(layers: int, experts: int, devices: int, stay: float) -> Affinity:
    """Poisson counts: with a probability a token's next expert is one of the same device's."""
    rng = np.random.default_rng(SEED)
    even = np.repeat(np.arange(devices), experts // devices)
    homes = [rng.permutation(even) for _ in range(layers)]
    popular = [np.exp(0.5 * rng.standard_normal(experts)) for _ in range(layers)]
    hops = []
    for a in range(layers - 1):
        base = popular[a][:, None] * popular[a + 1][None, :]
        same = homes[a][:, None] == homes[a + 1][None, :]
        share = stay * base * same / (base * same).sum() + (1 - stay) * base / base.sum()
        hops.append(rng.poisson(share * PAIRS * experts).astype(np.float64))
    return Affinity(
        layer_ids=tuple(range(layers)),
        experts=(experts,) * layers,
        load=(*(hop.sum(1) for hop in hops), hops[-1].sum(0)),
        hops=(tuple(hops),),
        together=tuple(np.zeros((experts, experts)) for _ in range(layers)),
    )


def instance_of(affinity: Affinity, devices: int, cap: float | None = None) -> Instance:
    problem = Problem(
        layer_ids=affinity.layer_ids,
        experts=affinity.experts,
        topology=Topology.of(devices),
        load_cap=cap,
    )
    return make_instance(problem, affinity)


def proofs(time_limit: float, console: Console) -> Iterator[dict[str, Any]]:
    for (layers, experts, devices), (kind, stay) in (
        (size, case) for size in SIZES for case in STAYS.items()
    ):
        instance = instance_of(counts(layers, experts, devices, stay), devices)
        row: dict[str, Any] = {"size": f"{layers}x{experts}x{devices}", "counts": kind}
        began = time.perf_counter()
        swept = sweep(instance, seed=SEED, time_limit=time_limit)
        row["sweep"] = {"cost": swept.cost, "seconds": time.perf_counter() - began}
        began = time.perf_counter()
        exact = solve_exactly(instance)
        row["chain"] = {
            "proved": exact is not None,
            "cost": None if exact is None else instance.cost(exact),
            "seconds": time.perf_counter() - began,
        }
        for solver in SOLVERS:
            result = solve_program(instance, solver=solver, time_limit=time_limit, seed=SEED)
            row[solver] = {
                "proved": result.proved,
                "cost": None if result.assignment is None else result.cost,
                "bound": result.bound,
                "seconds": result.seconds,
            }
        console.print(rounded(row))
        yield row


def polishes(traces: Path, time_limit: float, console: Console) -> Iterator[dict[str, Any]]:
    qwen = affinity_of(load_shared_traces(traces)["qwen1.5-moe-a2.7b"][1])  # history_1
    cases = (
        ("12x16x4 weak", counts(12, 16, 4, 0.15), 4, (None, 1.2)),
        ("24x64x8 weak", counts(24, 64, 8, 0.15), 8, (None, 1.05)),
        ("qwen1.5-moe history_1, 4 devices", qwen, 4, (None, 1.05)),
    )
    for name, affinity, devices, caps in cases:
        for cap in caps:
            instance = instance_of(affinity, devices, cap)
            began = time.perf_counter()
            swept = sweep(instance, seed=SEED, time_limit=time_limit)
            seconds = time.perf_counter() - began
            row: dict[str, Any] = {"case": name, "load_cap": cap}
            row["sweep"] = {"cost": swept.cost, "seconds": seconds}
            longer = sweep(
                instance, seed=SEED, time_limit=seconds + time_limit, perturbations=10**6
            )
            row["sweep, as long again as a polish"] = {"cost": longer.cost, "tried": longer.starts}
            for solver in POLISHERS:
                began = time.perf_counter()
                found, improvements = polish(
                    instance, swept.assignment, time_limit=time_limit, seed=SEED, solver=solver
                )
                row[solver] = {
                    "cost": instance.cost(found),
                    "improvements": improvements,
                    "seconds": time.perf_counter() - began,
                }
            found, _ = polish(instance, longer.assignment, time_limit=time_limit, seed=SEED)
            row["chain after the longer sweep"] = {"cost": instance.cost(found)}
            console.print(rounded(row))
            yield row


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pulp": pulp.__version__,
        "moe_runtime": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of each solver")
    parser.add_argument("--polish-limit", type=float, default=10.0, help="seconds of each polish")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(stderr=True)
    result = {
        "what": "cost: share of consecutive-layer pairs on different devices; one thread; the "
        "machine was shared with other work, so seconds are upper limits",
        "time_limit": options.time_limit,
        "polish_limit": options.polish_limit,
        "polish": list(polishes(options.traces, options.polish_limit, console)),
        "proofs": list(proofs(options.time_limit, console)),
        "machine": machine(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(rounded(result), indent=1) + "\n")
    temporary.replace(options.output)


if __name__ == "__main__":
    main()
