"""Eviction policies on the shared traces of real models, against the global optimum (Belady).

Decode only, cold cache, one pool of slots over all layers. Simulated: it counts, and times only
the policies' own calls. Run:

    python bench/policies.py                      # the table, to bench/results/policies.json
    python bench/policies.py --fit 60             # first fits the constants of `echo` again
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid
from moe_runtime.eviction import Belady, EvictionPolicy, make_policy
from moe_runtime.eviction_learned import Echo, EchoConstants
from moe_runtime.simulate import simulate
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from shared_traces import TRACE_NAMES, load_shared_traces

SHARES = (0.125, 0.25, 0.375, 0.5)
FITTED_SHARES = (0.125, 0.25)
SEED = 2
RESULTS = Path(__file__).parent / "results" / "policies.json"

# The box that constants are drawn from: (lowest, highest), uniform.
BOX: dict[str, tuple[float, float]] = {
    "sharpness": (1.0, 3.0),
    "fade": (0.7, 0.95),
    "carry": (0.2, 0.8),
    "discount": (0.3, 0.65),
    "prior": (0.5, 10.0),
    "fast": (0.7, 0.92),
    "slow": (0.94, 0.985),
    "fast_share": (0.3, 0.7),
    "recent": (0.03, 0.3),
    "recent_fade": (0.4, 0.85),
    "trust": (0.4, 0.75),
    "order": (0.4, 1.6),
}
LFU_DECAYS = (0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)

SIMPLE = ("lru", "lfu", "echo")
LONG = "qwen1.5-moe-a2.7b"  # the model with several runs

Maker = Callable[[ExpertGrid], EvictionPolicy]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One run, ready to replay.

    Args:
        prompt: the prompt's layer steps, one forward call for all of it.
        prompt_tokens: the prompt's layer steps as if its tokens had come one by one.
        decoded: the layer steps of decoding, which alone are simulated.
    """

    grid: ExpertGrid
    prompt: list[Access]
    prompt_tokens: list[Access]
    decoded: list[Access]

    def slots(self, share: float) -> int:
        return round(self.grid.size * share)


class TimedPolicy:
    """A policy and the seconds of processor time that its calls took."""

    name = "timed"

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self.seconds = 0.0
        self.steps = 0

    def observe(self, position: int, experts: Any, tokens: Any) -> None:
        start = time.thread_time()
        self._policy.observe(position, experts, tokens)
        self.seconds += time.thread_time() - start
        self.steps += 1

    def rank(self, candidates: Any) -> Any:
        start = time.thread_time()
        values = self._policy.rank(candidates)
        self.seconds += time.thread_time() - start
        return values


def recordings(folder: Path) -> dict[str, list[Recording]]:
    """The shared traces by model, as lists of layer steps."""

    def recording(trace: RoutingTrace) -> Recording:
        prompt = trace.prefill()
        one_by_one = replace(prompt, step_ids=np.arange(len(prompt), dtype=np.int32))
        return Recording(
            grid=trace.grid,
            prompt=prompt.accesses(),
            prompt_tokens=one_by_one.accesses(),
            decoded=trace.decode().accesses(),
        )

    return {
        name: [recording(trace) for trace in traces]
        for name, traces in load_shared_traces(folder).items()
    }


def one_after_another(runs: Sequence[Recording]) -> Recording:
    """The runs of a model as one long run: other themes follow, the cache stays warm."""
    return replace(runs[0], decoded=[access for run in runs for access in run.decoded])


def optimum(runs: Sequence[Recording], share: float) -> tuple[int, int]:
    """Misses and requests of the global Belady, summed over the runs of a model."""
    results = [
        simulate(Belady(run.grid, run.decoded), run.grid, run.decoded, run.slots(share))
        for run in runs
    ]
    return sum(r.misses for r in results), sum(r.requests for r in results)


def replay(
    make: Maker, runs: Sequence[Recording], share: float, *, known: str = "nothing"
) -> tuple[int, float]:
    """Misses over the runs of a model, and microseconds of the policy per layer step.

    `known` is what the policy has taken in before; the cache is cold whatever it is.
    """
    misses, seconds, steps = 0, 0.0, 0
    for run in runs:
        policy = TimedPolicy(make(run.grid))
        seen = {"nothing": [], "prompt": run.prompt, "prompt tokens": run.prompt_tokens}[known]
        for access in seen:
            policy.observe(access.position, access.experts, access.tokens)
        misses += simulate(policy, run.grid, run.decoded, run.slots(share)).misses
        seconds, steps = seconds + policy.seconds, steps + policy.steps
    return misses, 1e6 * seconds / steps


def draw_constants(count: int) -> list[EchoConstants]:
    """`count` seeded draws from the box; not the defaults, which know all four traces."""
    generator = np.random.default_rng(SEED)
    drawn: list[EchoConstants] = []
    while len(drawn) < count:
        values = {name: float(generator.uniform(*span)) for name, span in BOX.items()}
        drawn.append(replace(EchoConstants(), **{k: round(v, 4) for k, v in values.items()}))
    return drawn


def fit(
    data: dict[str, list[Recording]],
    bounds: dict[tuple[str, float], tuple[int, int]],
    candidates: Sequence[Any],
    make: Callable[[Any], Maker],
    progress: Progress,
    label: str,
) -> dict[str, Any]:
    """Which candidate is best on all models, and on all but each one.

    Returns:
        {"all": candidate, model: candidate fitted without this model, ...}
    """
    task = progress.add_task(f"fit {label}", total=len(candidates))
    ratios = np.zeros((len(candidates), len(TRACE_NAMES)))
    for row, candidate in enumerate(candidates):
        for column, name in enumerate(TRACE_NAMES):
            ratios[row, column] = fmean(
                replay(make(candidate), data[name], share)[0] / bounds[name, share][0]
                for share in FITTED_SHARES
            )
        progress.advance(task)
    chosen = {"all": candidates[int(ratios.mean(1).argmin())]}
    for column, name in enumerate(TRACE_NAMES):
        others = np.delete(ratios, column, axis=1).mean(1)
        chosen[name] = candidates[int(others.argmin())]
    return chosen


def static_counts(run: Recording, others: Sequence[Recording]) -> np.ndarray:
    """Counts of the model's other runs; of the run's own prompt where it is the only one."""
    counts = np.zeros(run.grid.size)
    source = [a for other in others for a in other.decoded] or run.prompt
    for access in source:
        counts[run.grid.offsets[access.position] + access.experts] += access.tokens
    return counts


def measure(
    data: dict[str, list[Recording]],
    bounds: dict[tuple[str, float], tuple[int, int]],
    makers: dict[str, dict[str, Maker]],
    progress: Progress,
) -> dict[str, Any]:
    """The table: policy -> share -> hits and ratio of each trace, mean, worst, cost."""
    known = {"echo after prompt": "prompt", "echo after prompt tokens": "prompt tokens"}
    task = progress.add_task("policies", total=len(makers) * len(SHARES) * len(TRACE_NAMES))
    table: dict[str, Any] = {}
    for policy, by_model in makers.items():
        table[policy] = {}
        for share in SHARES:
            traces: dict[str, Any] = {}
            for name in TRACE_NAMES:
                least, requests = bounds[name, share]
                misses, cost = replay(
                    by_model[name], data[name], share, known=known.get(policy, "nothing")
                )
                traces[name] = {
                    "hit_rate": round(1 - misses / requests, 4),
                    "bytes_over_belady": round(misses / least, 4),
                    "misses": misses,
                    "policy_cpu_microseconds_per_layer_step": round(cost, 1),
                }
                progress.advance(task)
            ratios = [entry["bytes_over_belady"] for entry in traces.values()]
            table[policy][str(share)] = {
                "mean": round(fmean(ratios), 4),
                "worst": max(ratios),
                "traces": traces,
            }
    return table


def static_table(
    data: dict[str, list[Recording]], bounds: dict[tuple[str, float], tuple[int, int]]
) -> dict[str, Any]:
    """The static policy, whose counts differ from run to run."""
    table: dict[str, Any] = {}
    for share in SHARES:
        traces = {}
        for name in TRACE_NAMES:
            misses = 0
            for run in data[name]:
                counts = static_counts(run, [other for other in data[name] if other is not run])
                policy = make_policy("static", run.grid, counts=counts)
                misses += simulate(policy, run.grid, run.decoded, run.slots(share)).misses
            least, requests = bounds[name, share]
            traces[name] = {
                "hit_rate": round(1 - misses / requests, 4),
                "bytes_over_belady": round(misses / least, 4),
                "misses": misses,
            }
        ratios = [entry["bytes_over_belady"] for entry in traces.values()]
        table[str(share)] = {
            "mean": round(fmean(ratios), 4),
            "worst": max(ratios),
            "traces": traces,
        }
    return table


def long_run(run: Recording, makers: dict[str, Maker]) -> dict[str, Any]:
    """Ratios on one long run: share -> policy -> bytes over Belady."""
    result: dict[str, Any] = {"tokens": sum(access.position == 0 for access in run.decoded)}
    for share in SHARES:
        least = optimum([run], share)[0]
        result[str(share)] = {
            name: round(replay(make, [run], share)[0] / least, 4) for name, make in makers.items()
        }
    return result


def show(table: dict[str, Any], console: Console) -> None:
    """Ratios on the terminal."""
    shown = Table(title="bytes over the global Belady, decode only, cold cache")
    for heading in ("policy", "slots", *TRACE_NAMES, "mean", "worst"):
        shown.add_column(heading)
    for policy, shares in table.items():
        for share, entry in shares.items():
            cells = [f"{entry['traces'][name]['bytes_over_belady']:.3f}" for name in TRACE_NAMES]
            shown.add_row(
                policy,
                f"{float(share):.1%}",
                *cells,
                f"{entry['mean']:.3f}",
                f"{entry['worst']:.3f}",
            )
    console.print(shown)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--fit", type=int, default=0, metavar="N", help="draw N sets of constants")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console()
    data = recordings(options.traces)
    previous = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with Progress(console=console) as progress:
        task = progress.add_task("optimum", total=len(SHARES) * len(TRACE_NAMES))
        bounds = {}
        for share in SHARES:
            for name in TRACE_NAMES:
                bounds[name, share] = optimum(data[name], share)
                progress.advance(task)
        if options.fit:
            echoes = fit(
                data, bounds, draw_constants(options.fit),
                lambda c: lambda grid: Echo(grid, c), progress, "echo",
            )  # fmt: skip
            decays = fit(
                data, bounds, LFU_DECAYS,
                lambda d: lambda grid: make_policy("lfu", grid, decay=d), progress, "lfu",
            )  # fmt: skip
            fitted = {
                "draws": options.fit, "seed": SEED, "box": BOX, "shares": FITTED_SHARES,
                "echo": {name: asdict(constants) for name, constants in echoes.items()},
                "lfu": decays,
            }  # fmt: skip
        else:
            fitted = previous["fitted"]
        left_out = {name: EchoConstants(**fitted["echo"][name]) for name in TRACE_NAMES}
        makers: dict[str, dict[str, Maker]] = {
            "lru": {name: lambda grid: make_policy("lru", grid) for name in TRACE_NAMES},
            "lfu": {
                name: lambda grid, d=fitted["lfu"][name]: make_policy("lfu", grid, decay=d)
                for name in TRACE_NAMES
            },
            "echo": {name: lambda grid, c=left_out[name]: Echo(grid, c) for name in TRACE_NAMES},
            **{
                name: {
                    model: lambda grid, c=left_out[model]: Echo(grid, c) for model in TRACE_NAMES
                }
                for name in ("echo after prompt", "echo after prompt tokens")
            },
            "echo, shipped constants": {
                name: lambda grid: make_policy("echo", grid) for name in TRACE_NAMES
            },
        }
        table = measure(data, bounds, makers, progress)
        table["static"] = static_table(data, bounds)
        long = long_run(one_after_another(data[LONG]), {n: makers[n][LONG] for n in SIMPLE})
    result = {
        "what": "misses (bytes, experts of equal size) over those of the global Belady with the "
        "same slots; decode only, cold cache, one pool over all layers",
        "constants": "lfu and echo: fitted on the three other models; 'shipped constants': fitted "
        "on all four; the form of echo and the box were chosen looking at all four",
        "after prompt": "the policy has taken in the prompt as one step, as in the runtime; 'after "
        "prompt tokens': one by one, which the runtime does not do; the cache is cold",
        "static counts": "of the model's other runs; of the prompt where there is one run",
        "belady": {
            name: {str(share): round(1 - bounds[name, share][0] / bounds[name, share][1], 4)
                   for share in SHARES}
            for name in TRACE_NAMES
        },
        "policies": table,
        "long run": {"model": LONG, "what": "its runs one after another, cold once", **long},
        "fitted": fitted,
        "machine": machine(),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(options.output)
    show(table, console)


if __name__ == "__main__":
    main()
