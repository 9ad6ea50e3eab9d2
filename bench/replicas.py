"""Balance with replicas against EPLB at the same redundancy, on made-up skewed counts.

Each layer's experts get tokens by a Zipf law in random order, or a few get most of them (spiky).
Everything is computed from the same counts; nothing is run on devices. Run:

    python bench/replicas.py                      # the table, to bench/results/replicas.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from moe_runtime.placement.eplb import eplb
from moe_runtime.placement.replicas import balance, imbalance, least_imbalance
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_runtime.core import FloatArray
from moe_runtime.version import __version__

RESULTS = Path(__file__).parent / "results" / "replicas.json"
SIZES = (  # layers, experts, devices, redundant slots
    *((26, 64, 8, redundant) for redundant in (0, 8, 16)),
    *((58, 256, 32, redundant) for redundant in (0, 32, 64)),
)
LOADS = ("zipf 0.5", "zipf 1.0", "zipf 1.2", "spiky")
TOKENS = 200_000  # choices of experts in each layer


def counts(kind: str, layers: int, experts: int, seed: int) -> FloatArray:
    """Tokens of each expert, float64 `[layers, experts]`."""
    random = np.random.default_rng(seed)
    if kind == "spiky":
        spikes = random.random((layers, experts)) < 0.1
        share = np.where(spikes, random.uniform(1, 10, spikes.shape), 0.01)
    else:
        law = 1 / np.arange(1, experts + 1) ** float(kind.split()[1])
        share = np.stack([random.permutation(law) for _ in range(layers)])
    share = share / share.sum(axis=1, keepdims=True)
    return np.stack([random.multinomial(TOKENS, row) for row in share]).astype(np.float64)


def contiguous(experts: int, devices: int) -> FloatArray:
    """Expert e on device e // (E / G); no replicas."""
    return np.kron(np.eye(devices), np.ones((experts // devices, 1)))


def summary(values: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 5), "worst": round(max(values), 5)}


def measure(kind: str, size: tuple[int, int, int, int], seeds: int) -> dict[str, Any]:
    """Max over mean load of each method, over all layers of all seeds."""
    layers, experts, devices, redundant = size
    found: dict[str, list[float]] = {n: [] for n in ("contiguous", "eplb", "ours", "bound")}
    seconds = {"eplb": 0.0, "ours": 0.0}
    twice = 0
    for seed in range(seeds):
        load = counts(kind, layers, experts, seed)
        start = time.perf_counter()
        theirs = eplb(load, experts + redundant, 1, 1, devices).copies(devices)
        middle = time.perf_counter()
        ours = balance(load, devices, redundant, seed=seed)
        seconds["eplb"] += (middle - start) / seeds
        seconds["ours"] += (time.perf_counter() - middle) / seeds
        twice += sum(int(copies.max() > 1) for copies in theirs)
        for at, row in enumerate(load):
            found["contiguous"].append(imbalance(row, contiguous(experts, devices)))
            found["eplb"].append(imbalance(row, theirs[at]))
            found["ours"].append(imbalance(row, ours[at]))
            found["bound"].append(least_imbalance(row, devices, redundant))
    worse = [o > e + 1e-9 for o, e in zip(found["ours"], found["eplb"], strict=True)]
    return {
        "loads": kind,
        "layers": layers,
        "experts": experts,
        "devices": devices,
        "redundant": redundant,
        "max_over_mean": {name: summary(values) for name, values in found.items()},
        "layers_where_ours_is_worse_than_eplb": sum(worse),
        "layers_where_eplb_puts_an_expert_twice_on_a_device": twice,
        "layers_in_all": len(worse),
        "seconds_for_all_layers": {name: round(value, 3) for name, value in seconds.items()},
    }


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "moe_runtime": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    shown = Table(title="highest load of a device over the mean (mean over layers)")
    for heading in ("loads", "size", "R", "contiguous", "EPLB", "ours", "bound", "seconds"):
        shown.add_column(heading)
    for row in rows:
        means = [f"{entry['mean']:.4f}" for entry in row["max_over_mean"].values()]
        size = f"{row['layers']}x{row['experts']} on {row['devices']}"
        spent = f"{row['seconds_for_all_layers']['ours']:.2f}"
        shown.add_row(row["loads"], size, str(row["redundant"]), *means, spent)
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console()
    measure("zipf 1.0", SIZES[0], 1)  # warm-up
    cases = [(kind, size) for size in SIZES for kind in LOADS]
    with Progress(console=console) as progress:
        rows = [measure(kind, size, options.seeds) for kind, size in progress.track(cases)]
    show(rows, console)
    result = {
        "what": "highest load of a device over the mean load, contiguous without replicas, EPLB "
        "(our own writing of it, global: one node, one group) and ours with the same replicas; "
        "bound: no placement is lower",
        "loads": f"{TOKENS} choices in each layer; Zipf exponents in random order, or 10 % of the "
        "experts with 100 to 1000 times the load of the others",
        "seeds": options.seeds,
        "machine": machine(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
