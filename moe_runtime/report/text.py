"""A run as plain text of some fifteen lines, for terminals and logs.

Does not know HTML or files.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_runtime.report.predicted_words import (
    fates,
    recall_ahead,
    seconds_per_token,
    verdict,
    waste,
)
from moe_runtime.report.run import DECODE, PREFILL, Run
from moe_runtime.report.summary import (
    NONE,
    Summary,
    compared,
    count,
    duration,
    latency,
    outcome,
    percent,
    rate,
    size,
)

__all__ = ["render_text"]


def render_text(run: Run, summary: Summary) -> str:
    """The report as text: the outcome, then one line for each part of it."""
    lines = [outcome(summary)]
    lines += [f"  {name:<14}{value}" for name, value in _rows(run, summary) if value]
    return "\n".join(lines)


def _rows(run: Run, summary: Summary) -> Iterator[tuple[str, str | None]]:
    totals = run.counters
    yield "model", _model(run)
    yield "compared", compared(run)
    yield "prefill", _phase(totals.prefill_tokens, totals.prefill_seconds)
    yield "decode", _phase(totals.decode_tokens, totals.decode_seconds)
    yield "prefill step", _latency(run, PREFILL)
    yield "decode step", _latency(run, DECODE)
    yield "experts", _uses(run)
    yield "read", _reads(run, summary)
    yield "layers", _layers(run)
    yield "plan", _plan(run)
    yield from _predicted(run)
    yield "same trace", _policies(run)
    yield "budget", _budget(run, summary)
    yield "why", _why(run)
    yield "memory", _memory(summary)
    yield "config", ", ".join(f"{key}={value}" for key, value in run.section("config").items())
    yield "machine", _machine(run)


def _model(run: Run) -> str:
    model, grid = run.section("model"), run.grid
    experts = sorted(set(grid.experts))
    top_k = sorted({value for value in model.get("top_k") or [] if isinstance(value, int)})
    return (
        f"{model.get('name') or model.get('class') or 'unnamed'}: {len(grid.layers)} MoE layers of "
        f"{_span(experts)} experts, top-{_span(top_k)}, "
        f"{size(model.get('total_expert_bytes'))} of experts, "
        f"{size(model.get('dense_bytes'))} besides, {model.get('dtype', 'unknown dtype')}"
    )


def _latency(run: Run, phase: int) -> str | None:
    times = latency(run, phase)
    if times is None:
        return None
    return (
        f"median {duration(times.median)}, p90 {duration(times.p90)}, "
        f"p99 {duration(times.p99)}, longest {duration(times.longest)}"
    )


def _uses(run: Run) -> str:
    totals = run.counters
    return (
        f"{count(totals.uses)} needed: {count(totals.hits)} hits, {count(totals.misses)} misses "
        f"({count(totals.rereads)} read again), {count(totals.evictions)} evictions"
    )


def _reads(run: Run, summary: Summary) -> str:
    totals = run.counters
    hosted = f"{count(totals.hosted)} misses computed on the host, " if totals.hosted else ""
    return (
        f"{size(totals.bytes_read)} from disk, {size(totals.host_bytes)} from host memory, {hosted}"
        f"stalled {duration(totals.stall_seconds)} ({percent(summary.stall_share)})"
    )


def _span(values: list[int]) -> str:
    if not values:
        return NONE
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _phase(tokens: int, seconds: float) -> str | None:
    if not tokens or not seconds:
        return None
    return f"{rate(tokens / seconds)} tokens/s ({count(tokens)} tokens in {duration(seconds)})"


def _layers(run: Run) -> str | None:
    rated = [(layer.hit_rate, layer.layer) for layer in run.layers if layer.hit_rate is not None]
    if len(rated) < 2:
        return None
    (worst, worst_layer), (best, best_layer) = min(rated), max(rated)
    return f"hits {percent(worst)} (layer {worst_layer}) to {percent(best)} (layer {best_layer})"


def _plan(run: Run) -> str | None:
    plan = run.pinned
    if plan is None:
        return None
    return (
        f"{count(plan.pinned)} experts pinned ({size(plan.nbytes)}) by {plan.name}: predicted to "
        f"serve {percent(plan.predicted)} of the uses, served {percent(plan.observed)}"
    )


def _predicted(run: Run) -> Iterator[tuple[str, str | None]]:
    found = run.predicted
    if found is None:
        return
    yield "prediction", verdict(found)
    yield "predictor", f"{found.predictor}: {seconds_per_token(run, found)}"
    yield "outcomes", fates(found)
    recall = ", ".join(percent(value) for value in recall_ahead(found))
    yield "recall", f"{recall} from 1 layer ahead on" if recall else None
    yield "ahead", f"{count(found.loads.ahead)} loads, {waste(run, found)}"


def _policies(run: Run) -> str | None:
    least = next((entry.misses for entry in run.simulated if entry.name == "belady"), 0)
    parts = []
    for entry in run.simulated:
        over = f", {entry.misses / least:.2f}x" if least and entry.name != "belady" else ""
        parts.append(f"{entry.name} {percent(entry.hit_rate)}{over}")
    return "hits (misses over Belady's): " + "; ".join(parts) if parts else None


def _budget(run: Run, summary: Summary) -> str:
    budget = run.section("budget")
    share = budget.get("share")
    text = size(summary.budget_bytes)
    if isinstance(share, int | float):
        text += f" ({percent(share)} of the experts)"
    slots = budget.get("slots")
    if isinstance(slots, list):
        slots = sum(slots)
    return f"{text}, {count(slots)} slots" if isinstance(slots, int) else text


def _why(run: Run) -> str | None:
    """How an automatic budget was chosen, or why it is less than what was asked for."""
    budget = run.section("budget")
    text = budget.get("explanation")
    told = isinstance(text, str) and (text.startswith("auto: ") or budget.get("shrunk"))
    return text if told else None


def _memory(summary: Summary) -> str | None:
    parts = []
    if summary.budget_used_bytes is not None:
        parts.append(f"{size(summary.budget_used_bytes)} of the budget used")
    if summary.peak_rss_bytes is not None:
        parts.append(f"process peak {size(summary.peak_rss_bytes)}")
    if summary.rss_before_load_bytes is not None:
        parts.append(f"{size(summary.rss_before_load_bytes)} of it before loading")
    return ", ".join(parts) or None


def _machine(run: Run) -> str:
    machine = run.section("machine")
    parts = [str(machine[key]) for key in ("device_name", "processor") if machine.get(key)]
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    if isinstance(machine.get("memory_bytes"), int):
        parts.append(size(machine["memory_bytes"]))
    parts += [
        f"{name} {machine[name]}"
        for name in ("python", "torch", "transformers", "moe_runtime")
        if machine.get(name)
    ]
    return ", ".join(dict.fromkeys(parts))
