"""RICE on the bundled model: experts found on training puzzles, judged on puzzles never seen.

Experts are found on training-side puzzles of some families, beta is chosen on other training-side
puzzles of the same families and frozen; then held-out puzzles of these families and of others are
solved with all controls. Beside it what steering does to routing and to the cache, and a model in
which a known expert carries the answer: there identification has to find it and steering has to
move accuracy as constructed. One core; a stage that was interrupted goes on. Run:

    OMP_NUM_THREADS=1 python bench/steering.py             # to bench/results/steering.json
    OMP_NUM_THREADS=1 python bench/steering.py --quick     # a try of all stages, another file
    python bench/steering.py --only test --again           # one stage anew; the others are kept
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_runtime
from bundled_model.puzzles import FAMILIES
from moe_runtime.report import SteeringReport
from peers.machine import describe_machine
from steering_stages import (
    BETAS,
    FOUND_ON,
    FULL,
    MARKERS,
    QUICK,
    SAMPLING,
    SAY,
    SEEDS,
    TRANSFER,
    Bench,
)

ROOT = Path(__file__).parent
STAGES = ("planted", "identify", "validate", "test", "transfer", "shift", "cost", "smoothed")


def draw(bench: Bench) -> None:
    """The page of what is there."""
    names = ("frozen.steer.json", "validate.steer-eval.json", "transfer.steer-eval.json",
             "test.steer-eval.json", "found.steer-cost.json")  # fmt: skip
    parts = [bench.file(name) for name in names if bench.file(name).exists()]
    if parts:
        SAY.print(f"wrote {SteeringReport.load(*parts).save(bench.file('steering.html'))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="all stages, very small")
    parser.add_argument("--only", choices=STAGES, action="append")
    parser.add_argument("--again", action="store_true", help="also stages that are done")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "steering")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    bench = Bench(sizes, given.work / sizes.name)
    out = given.out or (
        bench.file("steering.json") if given.quick else ROOT / "results" / "steering.json"
    )
    settings = {
        "sizes": {**asdict(sizes), "problems": list(sizes.problems)},
        "seeds": SEEDS,
        "sampling": SAMPLING,
        "markers": MARKERS,
        "families": {"found on": list(FOUND_ON), "transfer": list(TRANSFER),
                     "left out": sorted(set(FAMILIES) - set(FOUND_ON) - set(TRANSFER))},
        "betas": list(BETAS),
    }  # fmt: skip
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if result.get("settings") != settings:
        result = {}
    result |= {
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": moe_runtime.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
        "threads": torch.get_num_threads(),
        "settings": settings,
    }
    for stage in given.only or STAGES:
        if stage in result and not given.again:
            SAY.print(f"{stage}: done before")
            continue
        began, used = time.perf_counter(), time.process_time()
        result[stage] = getattr(bench, stage)()
        seconds, busy = time.perf_counter() - began, time.process_time() - used
        result[stage] |= {"seconds": round(seconds, 1), "cpu_seconds": round(busy, 1)}
        if stage == "validate":
            rule, best = bench.chosen()
            result[stage] |= {"beta by the rule": rule, "best above 1": best}
        SAY.print(f"{stage}: {seconds:.0f} s, {busy:.0f} s of processor")
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(bench)


if __name__ == "__main__":
    main()
