"""Owns the end-to-end comparison of caching with and without prediction, really executed on a CPU.

A Qwen3-MoE with random weights in the shape of the recorded model, whose routers are made to choose
what the recording says; a quarter of the experts in memory, under a memory cgroup that counts the
page cache. Variants run in processes of their own, interleaved; ratios are of the same round.

    python bench/end_to_end.py WORK --traces FOLDER

Run as root, with nothing else running. Does not know how a run is done: `end_to_end_run.py`.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import typer
from moe_runtime.predictors.files import save_predictor
from moe_runtime.predictors.transition import PairCountPredictor, TransitionPredictor

from checkpoint import Routing, Shape, Weights, config_json, write_shards
from peers import cgroup, harness
from peers.harness import Conditions, Files, Runner
from peers.machine import describe_machine, direct_read_rate
from peers.protocol import versions, write_json
from shared_traces import load_shared_traces

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "end_to_end.json"
MODEL = "qwen1.5-moe-a2.7b"
SHAPE = Shape(layers=24, experts=60, top_k=4, hidden=1024, expert_width=352, vocab=2000)
SEED = 20261124
MARGIN = 250_000_000
HELD_OUT = (0,)  # the run that is measured: a text about cooking
BASE = "lru"


def write_checkpoint(out: Path) -> None:
    """Random weights in the recorded model's number of layers and experts, half its widths."""
    if (out / "config.json").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    write_shards(Weights(SHAPE, Routing(), SEED, list(range(100))), out)
    (out / "config.json").write_text(json.dumps(config_json(SHAPE)))


def fit_predictor(traces: Path, work: Path, runs: tuple[int, ...]) -> dict[str, Path]:
    """Predictors fitted on the recordings that are not measured."""
    others = [run for at, run in enumerate(load_shared_traces(traces)[MODEL]) if at not in runs]
    paths = {}
    for kind in (PairCountPredictor, TransitionPredictor):
        paths[kind.kind] = work / f"{kind.kind}.predictor.safetensors"
        save_predictor(kind.fit(others), paths[kind.kind])
    return paths


def variants(fitted: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Options of `from_pretrained` by name."""
    transition, pairs = str(fitted["transition"]), str(fitted["pair-counts"])
    return {
        BASE: {"policy": "lru"},
        "lru, predicted": {"policy": "lru", "predictor": transition},
        "lru, predicted, no trial": {
            "policy": "lru", "predictor": transition, "prediction_options": {"trial": False},
        },
        "lru, pair counts, no trial": {
            "policy": "lru", "predictor": pairs,
            "prediction_options": {"trial": False, "lookahead": 1},
        },
        "lru, oracle": {
            "policy": "lru", "predictor": "oracle", "prediction_options": {"trial": False},
        },
        "predicted": {"policy": "predicted"},
        "predicted, predicted": {"policy": "predicted", "predictor": transition},
        "predicted, predicted, no trial": {
            "policy": "predicted", "predictor": transition, "prediction_options": {"trial": False},
        },
        "predicted, oracle": {
            "policy": "predicted", "predictor": "oracle", "prediction_options": {"trial": False},
        },
    }  # fmt: skip


SETTINGS: dict[str, dict[str, Any]] = {
    "decode, batch 1": {"batch": 1, "runs": HELD_OUT, "latency": 0.0, "tokens": 96},
    "decode, batch 4": {"batch": 4, "runs": (0, 1, 3, 5), "latency": 0.0, "tokens": 48},
    "decode, batch 1, reads with 5 ms latency": {
        "batch": 1, "runs": HELD_OUT, "latency": 0.005, "tokens": 48,
        "options": {"reader_threads": 12},
    },
}  # fmt: skip


def run(checkpoint: Path, task: dict[str, Any], limit: int) -> dict[str, Any]:
    """One process under the memory limit; its result, or how it failed."""
    cgroup.drop_cached(sorted(checkpoint.glob("*.safetensors")))
    with tempfile.TemporaryDirectory() as scratch:
        out, described = Path(scratch) / "out.json", Path(scratch) / "task.json"
        described.write_text(json.dumps({**task, "out": str(out)}))
        outcome = cgroup.run(
            [os.sys.executable, str(HERE / "end_to_end_run.py"), str(described)],  # type: ignore[attr-defined]
            limit=limit, timeout=900, log=Path(scratch) / "log.txt", cwd=HERE,
            environment={**os.environ, "PYTHONPATH": str(HERE),
                         "OMP_NUM_THREADS": str(task["threads"])},
        )  # fmt: skip
        if not out.exists():
            return {"failed": outcome.failure or "no result", "tail": outcome.output_tail}
        return {**json.loads(out.read_text()), "peak_bytes": outcome.peak_bytes}


def interval(ratios: list[float]) -> dict[str, float]:
    """Median and a 95 % bootstrap interval of it, seeded."""
    draw = random.Random(SEED)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "median": round(median(ratios), 4),
        "low": round(medians[49], 4),
        "high": round(medians[1949], 4),
        "rounds": len(ratios),
    }


def figures(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What is made of the rounds of one setting: by variant."""
    table: dict[str, Any] = {}
    for name in rounds[0]:
        mine = [result[name] for result in rounds if "failed" not in result[name]]
        if not mine:
            table[name] = {"failed": rounds[0][name]["failed"]}
            continue
        last = mine[-1]
        pairs = [
            (result[name], result[BASE])
            for result in rounds
            if "failed" not in result[name] and "failed" not in result[BASE]
        ]
        table[name] = {
            "decode_steps_per_second": round(
                median(len(r["decode_seconds"]) / sum(r["decode_seconds"]) for r in mine), 3
            ),
            "speed_over_lru": interval(
                [sum(b["decode_seconds"]) / sum(r["decode_seconds"]) for r, b in pairs]
            ),
            "step_seconds_median": round(
                median(x for r in mine for x in r["decode_seconds"]), 5
            ),
            "prefill_over_lru": interval(
                [sum(b["prefill_seconds"]) / max(sum(r["prefill_seconds"]), 1e-9) for r, b in pairs]
            ) if last["prefill_seconds"] else None,
            "bytes_per_step": round(
                fmean(r["counters"]["bytes_read"] / len(r["decode_seconds"]) for r in mine)
            ),
            "bytes_over_lru": round(
                fmean(r["counters"]["bytes_read"] / b["counters"]["bytes_read"] for r, b in pairs),
                4,
            ),
            "stall_share": round(
                fmean(r["counters"]["stall_seconds"] / r["counters"]["step_seconds"] for r in mine),
                4,
            ),
            "hit_rate": round(
                fmean(
                    r["counters"]["hits"] / (r["counters"]["hits"] + r["counters"]["misses"])
                    for r in mine
                ),
                4,
            ),
            "peak_bytes": max(r["peak_bytes"] for r in mine),
            "prediction": last["prediction"]
            and {k: last["prediction"][k] for k in ("state", "decisions", "loads", "bytes",
                                                    "seconds")},
        }  # fmt: skip
    return table


def main(
    work: Path,
    traces: Annotated[Path, typer.Option(help="folder of the recordings")],
    rounds: int = 5,
    threads: int = 2,
    budget: float = 0.25,
    only: Annotated[str, typer.Option(help="settings whose name contains this")] = "",
    names: Annotated[str, typer.Option(help="variants, comma-separated; all if empty")] = "",
    out: Path = RESULT,
) -> None:
    """Runs the comparison, prints the table and writes the result file."""
    checkpoint = work / "replay"
    write_checkpoint(checkpoint)
    expert_bytes, dense = harness.expert_and_dense_bytes(checkpoint)
    bare = Runner(name="imports only", module="run_import_only")
    conditions = Conditions(start=0, warmup=1, tokens=1, threads=threads, timeout=300)
    files = Files(checkpoint=checkpoint, gguf=checkpoint / "none")
    imports = harness.run(bare, files, conditions, limit=None)["group"]["peak_bytes"]
    given = int(budget * expert_bytes)
    limit = imports + dense + given + MARGIN
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    disk = [direct_read_rate(shard)]
    table: dict[str, Any] = {}
    for setting, conditions_of in SETTINGS.items():
        if only not in setting:
            continue
        fitted = fit_predictor(traces, work, conditions_of["runs"])
        chosen = {
            name: options
            for name, options in variants(fitted).items()
            if not names or name in names.split(";")
        }
        found: list[dict[str, dict[str, Any]]] = []
        for round_ in range(rounds):
            order = list(chosen) if round_ % 2 == 0 else list(chosen)[::-1]
            done: dict[str, dict[str, Any]] = {}
            for name in order:
                task = {
                    **conditions_of, "model": MODEL, "traces": str(traces.resolve()),
                    "checkpoint": str(checkpoint.resolve()), "threads": threads,
                    "options": {
                        "expert_budget": given, **conditions_of.get("options", {}), **chosen[name],
                    },
                }  # fmt: skip
                done[name] = run(checkpoint, task, limit)
                seconds = done[name].get("decode_seconds") or [float("nan")]
                print(f"{setting}, round {round_ + 1}: {name:26} "
                      f"{np.mean(seconds) * 1e3:7.1f} ms a step, load {os.getloadavg()[0]:.1f} "
                      f"{done[name].get('tail', '')[-300:]}", flush=True)  # fmt: skip
            found.append(done)
        disk.append(direct_read_rate(shard))
        table[setting] = {**conditions_of, "variants": figures(found)}
        for name, row in table[setting]["variants"].items():
            print(f"  {name:26} {row}")
    write_json(out, {
        "what": "decode on CPU with routing replayed from a recording, experts in a quarter of "
        "their memory, under a memory cgroup; speed over lru of the same round",
        "machine": describe_machine(),
        "versions": versions(("torch", "transformers", "numpy")),
        "disk_direct_read_gb_per_s": disk,
        "settings": {"seed": SEED, "rounds": rounds, "threads": threads, "budget": budget,
                     "expert_budget": given, "limit": limit, "model": MODEL,
                     "expert_bytes_each": 3 * SHAPE.hidden * SHAPE.expert_width * 2,
                     "predictor": "transition counts, fitted on the recordings not measured"},
        "table": table,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
