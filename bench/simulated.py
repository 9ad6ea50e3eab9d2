"""Owns the table of caching policies and predictors in simulated time, on recorded runs.

Decode only, cold cache, equal slots; the runtime's own cache, loader and planner on a virtual clock
(moe_runtime.timed_simulation). Nothing is executed: link and compute are stated below, only the
predictors' processor time is measured. Run:

    python bench/simulated.py --traces ../shared/traces [--tokens 64] [--resume]

Does not know how a policy or predictor is made: `moe_runtime.cache_baselines`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_runtime.cache_baselines import BASELINES, BOUND, Setting, Subject, run
from moe_runtime.errors import MoERuntimeError
from moe_runtime.files import write_text
from moe_runtime.prefetch_planner import PlannerRules
from moe_runtime.timed_result import TimedResult
from moe_runtime.timed_simulation import ComputeModel
from moe_runtime.trace import RoutingTrace
from moe_runtime.virtual_link import LinkModel
from peers.machine import describe_machine
from peers.protocol import versions
from shared_traces import TRACE_NAMES, load_shared_traces

RESULTS = Path(__file__).parent / "results" / "simulated.json"
SHARES = (0.25, 0.125, 0.5)
RECALL, SEED = 0.9, 20261124
BASE = "lru"
KEPT = (
    *("hit_rate", "resident", "in_time", "late", "missed"),
    *("seconds", "stall_seconds", "tokens_per_second"),
)

GEMMA_SIZE = (
    "hidden 2816 x expert width 704, bf16: the product is that of the recording's sizes, "
    "4.5 bits for gate and up and 8.5 or 5.5 for down (4,336,640 or 3,593,216 bytes)"
)

# Bytes of one expert in the form in which each model is published, and where the numbers are from.
EXPERTS: dict[str, tuple[int, str]] = {
    "qwen1.5-moe-a2.7b": (3 * 2048 * 1408 * 2, "hidden 2048, expert width 1408, bf16: config"),
    "qwen3.6-35b-a3b": (
        3 * 2048 * 512 * 2,
        "hidden 2048, expert width 512, bf16: defaults of transformers' Qwen3_5MoeTextConfig",
    ),
    "gemma-4-26b-a4b": (
        3 * 2816 * 704 * 2,
        GEMMA_SIZE,
    ),
    "gpt-oss-120b": (13_219_200, "the recording's expert_bytes: 3 * 2880 * 2880 at 4.25 bits"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A stated machine: experts stream from its memory at `memory` bytes a second."""

    link: LinkModel
    memory: float
    launch: float
    layer: float
    call: float

    def compute(self, expert_bytes: int) -> ComputeModel:
        """Decoding: an expert takes what reading its weights takes, and a launch."""
        return ComputeModel(
            layer=self.layer, expert=self.launch + expert_bytes / self.memory, call=self.call
        )


MACHINES = {
    "disk": Machine(  # experts computed on a CPU
        link=LinkModel(bytes_per_second=1e9, latency=1e-4, parallel=4),
        memory=20e9, launch=0.0, layer=1e-3, call=5e-3,
    ),
    "pcie": Machine(  # experts computed on a GPU
        link=LinkModel(bytes_per_second=25e9, latency=2e-5, parallel=2),
        memory=1e12, launch=3e-5, layer=1.5e-4, call=1e-3,
    ),
}  # fmt: skip


class Stopwatch:
    """A predictor and the processor seconds of its calls."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in {"begin_step", "observe", "predict"}:
            return found

        def timed(*values: Any) -> Any:
            begin = time.thread_time()
            try:
                return found(*values)
            finally:
                self.seconds += time.thread_time() - begin

        return timed


def subject_of(runs: list[RoutingTrace], tokens: int | None) -> Subject:
    """A model's first run; its other runs, if any, are what predictors are fitted to."""
    trace = runs[0].decode()
    steps = trace.step_ids - trace.step_ids.min(initial=0)
    if tokens is not None:
        trace = trace.select(rows=steps < tokens)
    return Subject(trace=trace, others=runs[1:], prompt=runs[0].prefill(), recall=RECALL, seed=SEED)


def figures(
    found: TimedResult, base: TimedResult, bound: TimedResult, cpu_seconds: float | None
) -> dict[str, Any]:
    """One contender's numbers, beside plain LRU and Belady in the same setting."""
    gain = (base.seconds - found.seconds) / (found.calls * len(found.stall_seconds))
    data = found.to_dict()
    return {
        **{name: data[name] for name in KEPT},
        **{name: data["loads_ahead"][name] for name in ("unused", "withdrawn")},
        "gigabytes_read": round(found.bytes_read / 1e9, 3),
        "gigabytes_wasted": round(found.bytes_wasted / 1e9, 3),
        "bytes_over_belady": round(found.bytes_read / bound.bytes_read, 4),
        "speed_over_lru": round(base.seconds / found.seconds, 4),
        "microseconds_gained_per_layer": round(1e6 * gain, 1),
        "predictor_cpu_microseconds_per_layer": None
        if cpu_seconds is None
        else round(1e6 * cpu_seconds / (found.calls * len(found.stall_seconds)), 1),
    }


def contenders(subject: Subject, setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every baseline by its title; why it could not run, where it could not."""
    results: dict[str, tuple[TimedResult, float | None]] = {}
    for baseline in BASELINES.values():
        title, cpu = baseline.title(RECALL), None
        try:
            if baseline.predictor:
                watch = Stopwatch(subject.predictor(baseline.predictor))
                timed = dataclasses.replace(subject, given={baseline.predictor: watch})
                found = run(baseline, timed, setting)
                cpu = watch.seconds
            else:
                found = run(baseline, subject, setting)
        except MoERuntimeError as error:
            yield title, {"left_out": str(error)}
            continue
        results[title] = (found, cpu)
    base, bound = results[BASE][0], results[BOUND][0]
    for title, (found, cpu) in results.items():
        yield title, figures(found, base, bound, cpu)


def summary(table: dict[str, Any]) -> dict[str, Any]:
    """Means over the traces, by machine, share and contender; of what ran on all four."""
    means: dict[str, Any] = {name: {} for name in MACHINES}
    for machine, share in ((m, str(s)) for m in MACHINES for s in SHARES):
        places = [model[machine][share] for model in table.values() if share in model[machine]]
        if len(places) < len(TRACE_NAMES):
            continue
        means[machine][share] = {
            title: {
                name: round(fmean(place[title][name] for place in places), 4)
                for name in ("hit_rate", "speed_over_lru", "bytes_over_belady")
            }
            for title in places[0]
            if not any("left_out" in place[title] for place in places)
        }
    return means


def show(means: dict[str, Any], console: Console) -> None:
    for machine, shares in means.items():
        table = Table(title=f"{machine}: hits, speed over LRU, bytes over Belady; mean of traces")
        for heading in ("contender", *shares):
            table.add_column(heading)
        for title in next(iter(shares.values()), {}):
            cells = [
                f"{found['hit_rate']:.3f} {found['speed_over_lru']:.3f} "
                f"{found['bytes_over_belady']:.3f}"
                for found in (share[title] for share in shares.values() if title in share)
            ]
            table.add_row(title, *cells)
        console.print(table)


def measured(
    table: dict[str, Any], runs: dict[str, list[RoutingTrace]], tokens: int | None
) -> Iterator[str]:
    """Fill in what the table lacks, the middle share first; yields after each setting."""
    subjects = {model: subject_of(runs[model], tokens) for model in TRACE_NAMES}
    for share in SHARES:
        for model, subject in subjects.items():
            size = EXPERTS[model][0]
            for name, stated in MACHINES.items():
                places = table.setdefault(model, {n: {} for n in MACHINES})[name]
                if str(share) in places:
                    continue
                setting = Setting(
                    share=share,
                    expert_bytes=(size,) * len(subject.trace.layer_ids),
                    link=stated.link,
                    compute=stated.compute(size),
                )
                places[str(share)] = dict(contenders(subject, setting))
                yield f"{model} {share} {name}"


def described(table: dict[str, Any], tokens: int | None, machine: Any) -> dict[str, Any]:
    """The result file."""
    return {
        "what": "simulated seconds of decoding with a cold cache of a share of all experts; "
        "speed_over_lru: seconds of plain LRU over the contender's in the same setting",
        "simulated": "no model is executed; predictors are free here: what a layer's forecasts may "
        "cost so that predicting still pays is microseconds_gained_per_layer, what these Python "
        "predictors took on this (loaded) machine stands beside it",
        "held out": "qwen1.5-moe-a2.7b: predictors and static counts from its five other runs, "
        "of other themes; of the other models there is one run, from which predictors learn while "
        "it goes, and whose prompt gives the static counts. Not held out: echo's constants and the "
        "transition predictor's first weights, which were fitted to all four traces",
        "pre-gated": f"a stand-in: the next layer's experts, each right with probability {RECALL}, "
        "errors independent; hidden states, which a real gate needs, are in no trace",
        "oracle": "the run itself, two layers ahead; what the planner can make of a perfect "
        "forecast, not the best possible",
        "spread": "deterministic but for the processor times; the traces are the spread",
        "tokens": tokens,
        "experts": {name: {"bytes": n, "from": why} for name, (n, why) in EXPERTS.items()},
        "machines": {
            name: {
                "link": dataclasses.asdict(m.link),
                "memory_bytes_per_second": m.memory,
                "launch": m.launch,
                "layer": m.layer,
                "call": m.call,
            }
            for name, m in MACHINES.items()
        },
        "rules": dataclasses.asdict(PlannerRules()),
        "seed": SEED,
        "machine": machine,
        "versions": versions(("moe-runtime", "numpy", "torch")),
        "means": summary(table),
        "traces": table,
    }


def in_lines(result: dict[str, Any]) -> str:
    """JSON with an object that holds no other on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--tokens", type=int, help="at most so many decoded tokens of each run")
    parser.add_argument("--resume", action="store_true", help="keep what the output has already")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    progress, table, machine = Console(stderr=True), {}, describe_machine()
    if options.resume:
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if before["tokens"] != options.tokens:
            parser.error(f"{options.output} has runs of {before['tokens']} tokens")
        table, machine = before["traces"], before["machine"]
    result = described(table, options.tokens, machine)
    for done in measured(table, load_shared_traces(options.traces), options.tokens):
        progress.print(f"{time.strftime('%H:%M:%S')} {done}")
        result = described(table, options.tokens, machine)
        write_text(options.output, in_lines(result))
    show(result["means"], Console())


if __name__ == "__main__":
    main()
