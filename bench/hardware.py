"""Measures this machine as `moe-runtime hardware` does, several times, and how far runs agree.

    python bench/hardware.py [--path DIR] [--rounds N] [-o FILE]

Each round is a whole measurement with a temporary file; the profile with the median of the hosts'
expert times is kept whole. Where a number is compared between rounds, others at work on the
machine are in it: see the load averages. Also: `choose_place` against all assignments on random
misses, and how long a decision takes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import moe_runtime
from moe_runtime import places
from moe_runtime.files import write_text
from moe_runtime.hardware import HardwareProfile, measure_hardware, profile_to_dict
from moe_runtime.places import Busy, MissCost, choose_place

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "hardware.json"
SEED = 0
COUNTS = (3, 4, 5, 6, 7, 8, 9, 11, 13)  # misses of which all assignments are weighed
TIMED = (1, 4, 8, 9, 16, 32, 64, 128)
INSTANCES = 500


def figures(profile: HardwareProfile) -> dict[str, float]:
    """The numbers of a profile by name: GB/s and milliseconds."""
    found = {
        f"memory {m.kind}, {m.threads} threads, GB/s": m.rate.median / 1e9 for m in profile.memory
    }
    for read in profile.reads:
        name = f"disk {read.nbytes >> 10} KiB, {read.threads} threads"
        found[f"{name}, GB/s"] = read.rate.median / 1e9
    for one in profile.experts:
        found[f"expert on {one.place}, {one.tokens} tokens, ms"] = one.seconds.median * 1e3
    return found


def drawn(generator: random.Random, count: int) -> tuple[list[MissCost], Busy]:
    """Misses whose link and host times are of one scale, drawn anew; places busy half the time."""
    scale = generator.choice([1.0, 5.0, 20.0])
    misses = [
        MissCost(
            fetch=generator.uniform(0.5, scale),
            device=generator.uniform(0.05, 2.0),
            host=generator.uniform(0.5, scale),
        )
        for _ in range(count)
    ]
    link, host, device = (generator.uniform(0, 5) * generator.randint(0, 1) for _ in range(3))
    return misses, Busy(link=link, host=host, device=device)


def search_against_all(progress: Progress) -> dict[str, Any]:
    """Seconds that the search for many misses finds, over the least of all assignments."""
    generator = random.Random(SEED)
    task = progress.add_task("placing", total=len(COUNTS))
    usual = places._ALL_TRIED
    table = {}
    for count in COUNTS:
        ratios = []
        for _ in range(INSTANCES):
            misses, busy = drawn(generator, count)
            places._ALL_TRIED = max(COUNTS)
            least = choose_place(misses, busy)
            places._ALL_TRIED = 0
            found = choose_place(misses, busy)
            ratios.append(found.seconds / least.seconds)
        table[str(count)] = {
            "mean": round(fmean(ratios), 5),
            "worst": round(max(ratios), 4),
            "best found": round(sum(ratio <= 1 + 1e-9 for ratio in ratios) / INSTANCES, 4),
        }
        progress.advance(task)
    places._ALL_TRIED = usual
    return table


def decision_microseconds() -> dict[str, Any]:
    """Median microseconds of one decision by the number of misses."""
    generator = random.Random(SEED)
    table = {}
    for count in TIMED:
        misses, busy = drawn(generator, count)
        choose_place(misses, busy)
        times = []
        for _ in range(25):
            began = time.perf_counter()
            choose_place(misses, busy)
            times.append(1e6 * (time.perf_counter() - began))
        table[str(count)] = {name: round(f(times), 1) for name, f in SPREAD.items()}
    return table


SPREAD = {"median": median, "low": min, "high": max}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--path", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(stderr=True)
    profiles, loads = [], []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=options.rounds)
        for _ in range(options.rounds):
            loads.append([round(load, 2) for load in os.getloadavg()])
            profiles.append(measure_hardware(path=options.path))
            progress.advance(task)
        placing = search_against_all(progress)
    rows = [figures(profile) for profile in profiles]
    table = {
        name: {which: round(f([row[name] for row in rows]), 3) for which, f in SPREAD.items()}
        for name in rows[0]
        if all(name in row for row in rows)
    }
    middle = sorted(profiles, key=lambda p: p.expert_seconds("host", 1) or 0)[len(profiles) // 2]
    result = {
        "what": "moe-runtime hardware on this machine, medians of each round: median, lowest and "
        "highest over the rounds; nothing here was measured on a GPU",
        "rounds": options.rounds,
        "load_average of each round": loads,
        "seconds": {w: round(f([p.seconds for p in profiles]), 2) for w, f in SPREAD.items()},
        "figures": table,
        "profile": profile_to_dict(middle),
        "placing": {
            "what": "choose_place's search for more than 8 misses, made to serve these numbers of "
            "random misses, over the least of all assignments; up to 8 misses all are weighed",
            "instances": INSTANCES,
            "seed": SEED,
            "ratio": placing,
            "microseconds of a decision": decision_microseconds(),
        },
        "settings": {"compute_threads": torch.get_num_threads()},
        "versions": {"moe_runtime": moe_runtime.__version__, "torch": str(torch.__version__)},
        "machine": describe_machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    shown = Table(title="this machine, medians of the rounds")
    for heading in ("", "median", "low", "high"):
        shown.add_column(heading)
    for name, row in table.items():
        shown.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console().print(shown)


if __name__ == "__main__":
    main()
