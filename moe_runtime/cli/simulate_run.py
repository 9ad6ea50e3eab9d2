"""From the options of `simulate` to its figures: traces read, contenders run and compared.

Does not know what is shown of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_runtime.cache_baselines import BASELINES, BOUND, Baseline, Setting, Subject, combined
from moe_runtime.cache_baselines import find as find_baselines
from moe_runtime.cache_baselines import run as run_baseline
from moe_runtime.cli.plan_inputs import model_facts
from moe_runtime.core import ExpertGrid, parse_bytes, parse_share
from moe_runtime.errors import ConfigError, MoERuntimeError, TraceError
from moe_runtime.predictors.files import load_predictor
from moe_runtime.predictors.origin import Origin, require_held_out
from moe_runtime.timed_result import TimedResult
from moe_runtime.timed_simulation import ComputeModel
from moe_runtime.trace import RoutingTrace
from moe_runtime.virtual_link import LinkModel

__all__ = ["Request", "simulated"]

FORMAT, VERSION = "moe-runtime.simulation", 1
BASE = "lru"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `simulate` as the command line took them; times in milliseconds.

    Args:
        contenders: names of baselines; `explicit` ones have to run, others may be left out.
        link: gigabytes a second, latency, reads at once.
        compute: fields of `ComputeModel`.
    """

    traces: tuple[Path, ...]
    fit: tuple[Path, ...]
    predictors: tuple[Path, ...]
    contenders: tuple[str, ...]
    explicit: bool
    budget: str
    expert_bytes: str | None
    model: str | None
    link: tuple[float, float, int]
    compute: Mapping[str, float]
    decode_only: bool
    recall: float
    seed: int
    trial: bool


def simulated(request: Request, progress: Console) -> dict[str, Any]:
    """Run all contenders on all traces; `docs/formats.md`, section Simulation.

    Raises:
        TraceError, PredictorError: a file that cannot be used, or figures that would flatter a
            predictor, since it was fitted to what is simulated. ConfigError, BudgetError: options.
    """
    rows = find_baselines(request.contenders)
    subjects = _subjects(request)
    first = subjects[0].trace
    setting = _setting(request, first)
    rows += [
        Baseline(name=path.name, predictor=str(path), summary="loads by a predictor file")
        for path in request.predictors
    ]
    needed = {row.name: row for row in [BASELINES[BASE], BASELINES[BOUND], *rows]}
    results: dict[str, TimedResult] = {}
    left_out = []
    for name, row in needed.items():
        progress.print(f"[dim]{name}[/dim]")
        try:
            results[name] = combined([run_baseline(row, one, setting) for one in subjects])
        except MoERuntimeError as error:
            wanted = request.explicit or row.predictor in map(str, request.predictors)
            if wanted or name in {BASE, BOUND}:
                raise
            left_out.append({"title": row.title(request.recall), "why": str(error)})
    base, bound = results[BASE], results[BOUND]
    return {
        "format": FORMAT,
        "version": VERSION,
        "traces": [str(path) for path in request.traces],
        "fit": [str(path) for path in request.fit],
        "model_id": first.model_id,
        "tokens": sum(len(one.trace) for one in subjects),
        "setting": {
            "budget": request.budget,
            "experts": first.grid.size,
            "slots": list(base.slots),
            "expert_bytes": list(setting.expert_bytes),
            "link": asdict(setting.link),
            "compute": asdict(setting.compute),
            "phase": "decode" if request.decode_only else "all",
            "recall": request.recall,
            "seed": request.seed,
            "trial": request.trial,
        },
        "contenders": [
            {
                "title": row.title(request.recall),
                "policy": row.policy,
                "predictor": row.predictor or None,
                "summary": row.summary,
                **results[row.name].to_dict(),
                "bytes_over_belady": _ratio(results[row.name].bytes_read, bound.bytes_read),
                "speed_over_lru": _ratio(base.seconds, results[row.name].seconds),
            }
            for row in rows
            if row.name in results
        ],
        "left_out": left_out,
    }


def _subjects(request: Request) -> list[Subject]:
    """Each trace with what contenders may know before it."""
    whole = _like_each_other(request.traces)
    fitted = _like_each_other(request.fit)
    if fitted:
        fitted[0].require_like(whole[0], str(request.fit[0]))
        origin = Origin.of(fitted)
        for path, trace in zip(request.traces, whole, strict=True):
            require_held_out(origin, trace, str(path))
    subjects = []
    for number, (path, trace) in enumerate(zip(request.traces, whole, strict=True)):
        run = trace.decode() if request.decode_only else trace
        if not len(run):
            raise TraceError(
                f"{path}: nothing was decoded in it; simulate its prompts with --phase all"
                if request.decode_only
                else f"{path}: the trace is empty; record some text"
            )
        subjects.append(
            Subject(
                trace=run,
                others=fitted or [other for at, other in enumerate(whole) if at != number],
                prompt=trace.prefill() if request.decode_only else None,
                recall=request.recall,
                seed=request.seed,
                given={str(file): _opened(file, trace, str(path)) for file in request.predictors},
            )
        )
    return subjects


def _opened(file: Path, trace: RoutingTrace, name: str) -> Any:
    found = load_predictor(file, fingerprint=trace.fingerprint, grid=trace.grid)
    require_held_out(found.origin, trace, name)
    return found


def _like_each_other(paths: Sequence[Path]) -> list[RoutingTrace]:
    traces = [RoutingTrace.load(path) for path in paths]
    for path, trace in zip(paths, traces, strict=True):
        trace.require_like(traces[0], str(path))
    return traces


def _setting(request: Request, trace: RoutingTrace) -> Setting:
    sizes = _sizes(request, trace.grid)
    total = sum(size * count for size, count in zip(sizes, trace.grid.experts, strict=True))
    share = parse_share(request.budget)
    if share is None:
        share = parse_bytes(request.budget) / total
    rate, latency, parallel = request.link
    return Setting(
        share=min(share, 1.0),
        expert_bytes=sizes,
        link=LinkModel(bytes_per_second=rate * 1e9, latency=latency / 1e3, parallel=parallel),
        compute=ComputeModel(**{name: value / 1e3 for name, value in request.compute.items()}),
        trial=request.trial,
    )


def _sizes(request: Request, grid: ExpertGrid) -> tuple[int, ...]:
    """Bytes of one expert of each layer position."""
    if request.model is None:
        size = parse_bytes(request.expert_bytes or "0")
        if not size:
            raise ConfigError("--expert-bytes: an expert has a byte at least")
        return (size,) * len(grid.layers)
    facts = model_facts(request.model)
    if facts.layer_ids != grid.layers or facts.experts != grid.experts:
        raise TraceError(
            f"{request.traces[0]}: has MoE layers {list(grid.layers)} with {list(grid.experts)} "
            f"experts, {facts.model_id} has {list(facts.layer_ids)} with {list(facts.experts)}; "
            "give the recorded model, or --expert-bytes"
        )
    return facts.expert_bytes


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
