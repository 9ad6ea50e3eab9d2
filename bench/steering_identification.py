"""Identification of experts by nPMI over a trace of a million tokens: seconds and peak memory.

The trace is synthetic (48 layers x 128 experts, top-8, uniform but for one planted expert) and is
read from its file, each time in a process of its own. Beside it, at a size that allows it, the
count that one would write first: a numpy mask for each expert. Run:

    OMP_NUM_THREADS=1 python bench/steering_identification.py   # to bench/results/
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from moe_runtime.core import FloatArray
from moe_runtime.steering import Identification, identify
from moe_runtime.steering.markers import Marker
from moe_runtime.steering.npmi import npmi
from moe_runtime.trace import DECODE, PREFILL, RoutingTrace
from moe_runtime.trace_writer import open_writer
from moe_runtime.version import __version__
from peers.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "steering_identification.json"
LAYERS, EXPERTS, TOP_K, SEED = 48, 128, 8, 0
SEQUENCE = 1000  # tokens
BATCH = 50  # sequences that decode together in the interleaved trace
PLANTED = (30, 77)  # layer, expert
START, END, SWITCH = 1, 2, (3, 4)
MARKERS = {
    Marker(text="<think>", variants=((START,),)): 1.0,
    Marker(text="</think>", variants=((END,),)): -1.0,
    Marker(text="Alternatively", variants=(SWITCH, (5,))): -1.0,
}
SAY = Console(stderr=True, highlight=False)


def make_rows(rng: np.random.Generator, sequences: Sequence[int], phase: int) -> RoutingTrace:
    """Whole sequences; in decoding token after token, all sequences beside each other."""
    count = len(sequences)
    shape = (SEQUENCE, count)  # row order: position, then sequence
    tokens = rng.integers(6, 5000, shape)
    tokens[2], tokens[SEQUENCE * 3 // 4] = START, END
    for at in rng.integers(10, SEQUENCE // 2, 3):
        tokens[at : at + 2] = np.array(SWITCH)[:, None]
    # Eight distinct experts: a start and a stride, at random for each row and layer.
    first = rng.integers(EXPERTS, size=(*shape, LAYERS, 1), dtype=np.uint16)
    stride = rng.integers(1, EXPERTS // TOP_K, size=first.shape, dtype=np.uint16)
    ids = (first + stride * np.arange(TOP_K, dtype=np.uint16)) % EXPERTS
    layer, expert = PLANTED
    planted = ids[2, :, layer]
    planted[~(planted == expert).any(axis=1), 0] = expert
    positions, numbers = np.broadcast_arrays(
        np.arange(SEQUENCE)[:, None], np.asarray(sequences)[None, :]
    )

    def rows(column: Any) -> Any:
        """As they run: a prompt is one sequence after another."""
        ordered = column if phase == DECODE else np.swapaxes(column, 0, 1)
        return ordered.reshape(-1, *column.shape[2:])

    experts = rows(ids).astype(np.uint16)
    steps = positions if phase == DECODE else np.zeros(shape)
    return RoutingTrace(
        topk_ids=experts,
        topk_weights=np.full(experts.shape, 1 / TOP_K, np.float16),
        token_ids=rows(tokens).astype(np.int32),
        sequence_ids=rows(numbers).astype(np.int32),
        positions=rows(positions).astype(np.int32),
        phase=np.full(len(experts), phase, np.uint8),
        step_ids=rows(steps).astype(np.int32),
        layer_ids=tuple(range(LAYERS)),
        experts=(EXPERTS,) * LAYERS,
    )


def make_trace(path: Path, tokens: int, phase: int) -> None:
    rng = np.random.default_rng([SEED, phase])
    with open_writer(path) as writer:
        for start in range(0, tokens // SEQUENCE, BATCH):
            stop = min(start + BATCH, tokens // SEQUENCE)
            if phase == DECODE:
                writer.append(make_rows(rng, range(start, stop), phase))
            else:
                for one in range(start, stop):
                    writer.append(make_rows(rng, [one], phase))


def one(path: Path, bootstrap: int) -> dict[str, Any]:
    """One identification in this process: seconds, the file's reading included, and peak memory."""
    imported = peak()
    began = time.perf_counter()
    found = identify(path, MARKERS, bootstrap=bootstrap, seed=SEED)
    seconds = time.perf_counter() - began
    first = found.ranked[0]
    return {
        "seconds": round(seconds, 2),
        "peak_bytes": peak(),
        "peak_bytes_of_imports": imported,
        "rows": found.rows,
        "sequences": found.sequences,
        "first": [first.layer, first.expert],
        "stability": first.stability,
    }


def peak() -> int:
    """Of this program: getrusage would count what the process was before it became this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def in_child(path: Path, bootstrap: int, *, cold: bool) -> dict[str, Any]:
    """`one` in a process of its own; cold: nothing of the file is in the page cache."""
    if cold:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    outcome = subprocess.run(
        [sys.executable, __file__, "--one", str(path), "--bootstrap", str(bootstrap)],
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


def large(folder: Path, tokens: int, runs: int) -> list[dict[str, Any]]:
    rows = []
    for name, phase in (("sequence after sequence", PREFILL), (f"{BATCH} beside", DECODE)):
        path = folder / f"{phase}.trace.safetensors"
        make_trace(path, tokens, phase)
        for bootstrap in (0, 200):
            results = [in_child(path, bootstrap, cold=not run) for run in range(runs)]
            row = {
                "rows in order": name,
                "tokens": tokens,
                "file_bytes": path.stat().st_size,
                "bootstrap": bootstrap,
                "seconds_cold": results[0]["seconds"],
                "seconds_warm": [result["seconds"] for result in results[1:]],
                "peak_bytes": max(result["peak_bytes"] for result in results),
                "peak_bytes_of_imports": results[0]["peak_bytes_of_imports"],
                "sequences": results[0]["sequences"],
                "planted_found_first": all(r["first"] == list(PLANTED) for r in results),
                "stability": results[0]["stability"],
            }
            rows.append(row)
            SAY.print(row)
        path.unlink()
    return rows


# -- against the count that one would write first --------------------------------------------------


def naive(trace: RoutingTrace) -> FloatArray:
    """NPMI `[markers, layers, experts]`: a mask over all rows for each expert."""
    tokens = trace.token_ids
    follows = np.concatenate([[False], (tokens[:-1] == SWITCH[0]) & (tokens[1:] == SWITCH[1])])
    ends = np.stack([tokens == START, tokens == END, follows | (tokens == 5)])
    found = np.empty((len(ends), LAYERS, EXPERTS))
    for layer in range(LAYERS):
        ids = trace.topk_ids[:, layer]
        for expert in range(EXPERTS):
            chose = (ids == expert).any(axis=1)
            joint = (ends & chose).sum(axis=1)
            found[:, layer, expert] = npmi(joint, ends.sum(axis=1), chose.sum(), len(tokens))
    return found


def against_naive(folder: Path, tokens: int, runs: int) -> dict[str, Any]:
    """Both on the same trace in memory, in this process, alternating."""
    path = folder / "small.trace.safetensors"
    make_trace(path, tokens, PREFILL)
    trace = RoutingTrace.load(path)
    seconds: dict[str, list[float]] = {"ours": [], "ours with bootstrap": [], "naive": []}
    difference = 0.0
    for _ in range(runs):
        ours = timed(seconds["ours"], lambda: identified(trace, 0))
        timed(seconds["ours with bootstrap"], lambda: identified(trace, 200))
        plain = timed(seconds["naive"], lambda: naive(trace))
        maps = np.stack([ours.npmi_map(number) for number in range(len(MARKERS))])
        difference = max(difference, float(np.abs(maps - plain).max()))
    result = {
        "tokens": tokens,
        "seconds": {name: [round(s, 3) for s in took] for name, took in seconds.items()},
        "naive_over_ours": round(median(seconds["naive"]) / median(seconds["ours"]), 1),
        "largest_difference": difference,
        "rounded_to": 6,
    }
    SAY.print(result)
    return result


def identified(trace: RoutingTrace, bootstrap: int) -> Identification:
    return identify(trace, MARKERS, least_joint=1, least_uses=1, bootstrap=bootstrap, seed=SEED)


def timed(seconds: list[float], work: Any) -> Any:
    began = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - began)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=20_000, help="tokens for the naive count")
    parser.add_argument("--runs", type=int, default=3, help="the first one cold")
    parser.add_argument("--folder", type=Path, help="for the traces, 2 GB; a temporary one if none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bootstrap", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(one(given.one, given.bootstrap)))
        return
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seed": SEED,
        "settings": {
            "layers": LAYERS,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "tokens_a_sequence": SEQUENCE,
            "markers": len(MARKERS),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "niceness": os.nice(0),
            "runs": given.runs,
        },
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result["against naive"] = against_naive(Path(folder), given.small, given.runs)
        result["large"] = large(Path(folder), given.tokens, given.runs)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
