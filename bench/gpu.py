"""Owns the GPU measurements' command: which stages run, for how long, and the result file.

Does not know what a stage measures: `gpu_kernels.py` has the kernels over slots against the copy
ceiling and transformers' own, `gpu_end_to_end.py` a Qwen3-30B-A3B-shaped model under budgets.

    python bench/gpu.py --traces DIR              # on a CUDA device, eight minutes at most
    python bench/gpu.py --only kernels            # one part: kernels, end_to_end
    python bench/gpu.py --only end_to_end --traces DIR --full --minutes 9
    python bench/gpu.py --dry-run                 # anywhere: tiny shapes, Triton's interpreter

DIR holds recorded routing (`qwen3.6-35b-a3b/prompt_1.json` or another of `--trace`'s; the
repository has none). The result file is written anew after every row, so that whatever ends the
run early loses one row. On a machine where only the package's sources are:
`pip install --no-deps --no-build-isolation --no-index -e .` first.

Minutes planned on an H100: kernels 2 to 3; end to end 5: set-up 1 (57 GB of host memory), three
rows at 100 % 0.5, four rows and accelerate's at each of 25, 12.5 and 50 % 1 each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before PyTorch is imported, which imports Triton

import torch
import transformers

from gpu_dry import stand_in
from gpu_end_to_end import Plan, end_to_end
from gpu_figures import end_to_end_table
from gpu_kernels import DRY, FULL, KERNEL_STAGES, SEED, Bench, Shape, judged, kernel_table
from gpu_routing import DEFAULT_TRACE
from moe_runtime.files import write_text
from moe_runtime.version import __version__
from peers.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PARTS = ("kernels", "end_to_end")


def kernels(shape: Shape, device: str, repeats: int, save: Callable[[Any], None]) -> dict[str, Any]:
    """The kernel stages; one that fails is told and the others go on."""
    bench = Bench(shape, device, repeats)
    result: dict[str, Any] = {
        "what": "experts of a layer, seconds a layer; every result checked against the "
        "specification first; layers in turn, so that weights are not in the cache",
        "shape": {**asdict(shape), "expert_bytes": shape.expert_bytes, "dtype": "bfloat16"},
        "seed": SEED,
        "repeats": repeats,
    }
    for name, stage in KERNEL_STAGES.items():
        began = time.perf_counter()
        try:
            result[name] = stage(bench)
        except Exception as error:  # noqa: BLE001  the other stages are wanted
            result[name] = []
            result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name} failed: {error}", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        save(result)
    result["targets"] = judged(result, shape)
    return result


def versions() -> dict[str, str]:
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moe_runtime": __version__,
    }
    for name in ("triton", "accelerate"):
        try:
            found[name] = str(__import__(name).__version__)
        except ImportError:
            found[name] = "not installed"
    return found


def measure(
    options: argparse.Namespace, plan: Plan, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All parts asked for, in one result that `save` gets again and again."""
    dry = bool(options.dry_run)
    result: dict[str, Any] = {
        "dry_run": dry,
        "machine": describe_machine(),
        "versions": versions(),
    }
    if not dry:
        result["machine"]["gpu"] = torch.cuda.get_device_name()

    def saving(part: str) -> Callable[[Any], None]:
        def keep(found: Any) -> None:
            result[part] = found
            save(result)

        return keep

    device = "cpu" if dry else "cuda"
    if options.only in (None, "kernels"):
        with torch.inference_mode():
            found = kernels(DRY if dry else FULL, device, options.repeats, saving("kernels"))
        saving("kernels")(found)
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()
    if options.only in (None, "end_to_end"):
        ceiling = result.get("kernels", {}).get("copy_ceiling") or {}
        bandwidth = ceiling.get("bytes_per_second", {}).get("median")
        keep = saving("end_to_end")
        try:
            keep(end_to_end(plan, torch.device(device), bandwidth, keep))
        except Exception:  # noqa: BLE001  the kernels' figures are to be shown nevertheless
            result["failed"] = traceback.format_exc()[-4000:]
            save(result)
    return result


def main() -> None:
    options = arguments()
    plan = Plan(
        traces=options.traces, trace=options.trace, minutes=options.minutes, full=options.full,
        only=options.rows, rounds=2 if options.full else 1,
    )  # fmt: skip
    if options.dry_run:
        torch.set_num_threads(1)
        stand_in()
        plan = Plan.dry(
            prepare=stand_in_kernel,
            traces=options.traces,
            only=options.rows,
            minutes=options.minutes,
        )
        options.repeats = 1
    output = options.output or (None if options.dry_run else RESULTS)

    def save(result: dict[str, Any]) -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, json.dumps(result, indent=1) + "\n")

    result = measure(options, plan, save)
    if options.dry_run:
        print("dry run through the interpreter: the figures below mean nothing")
    if "kernels" in result:
        print(kernel_table(result["kernels"]))
    if result.get("end_to_end", {}).get("rows"):
        print(end_to_end_table(result["end_to_end"]))
    if "failed" in result:
        sys.exit(f"the end-to-end part broke off:\n{result['failed']}")


def stand_in_kernel(model: Any) -> None:
    """Let an attached model run the kernels over slots, as it does by itself on a GPU."""
    import moe_runtime

    executor = moe_runtime.runtime_of(model).executor
    # Whichever of the two this runtime has; with neither the rehearsal would silently be another.
    holder, name = (
        (executor.slots, "kernel") if hasattr(executor, "slots") else (executor, "_kernel")
    )
    if not hasattr(holder, name):
        raise AttributeError(f"the executor's kernels are not chosen by {name} any more")
    setattr(holder, name, "triton")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreter, no GPU")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--rows", default="", help="end to end: rows whose name contains this")
    parser.add_argument("--traces", type=Path, help="folder of recorded routing")
    parser.add_argument("--trace", default=DEFAULT_TRACE, help="which of them")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the end-to-end part")
    parser.add_argument("--full", action="store_true", help="all rows, two rounds")
    parser.add_argument("--repeats", type=int, default=50, help="of each kernel")
    parser.add_argument("-o", "--output", type=Path, help="result file (dry run: none)")
    options = parser.parse_args()
    if not options.dry_run:
        if not torch.cuda.is_available():
            parser.error("no CUDA device is visible; --dry-run goes through everything without one")
        if options.only != "kernels" and options.traces is None:
            parser.error("the end-to-end part needs --traces DIR (or --only kernels)")
    return options


if __name__ == "__main__":
    main()
