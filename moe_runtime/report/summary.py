"""`Summary`: the figures of a run that people compare, and how numbers are written.

Does not know pages, figures or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.core import format_bytes
from moe_runtime.report.run import DECODE, Run

__all__ = [
    "NONE",
    "Latency",
    "Summary",
    "compared",
    "count",
    "duration",
    "latency",
    "outcome",
    "percent",
    "rate",
    "size",
    "summarise",
]

NONE = "\N{EN DASH}"


def count(value: float | None) -> str:
    """`12,345`."""
    return NONE if value is None else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """`81.2 %` of a share between 0 and 1."""
    return NONE if share is None else f"{100 * share:.1f} %"


def size(value: float | None) -> str:
    """`1.50 GiB`, `145 MiB`: three figures."""
    if value is None:
        return NONE
    number, unit = format_bytes(value).split()
    amount = float(number)
    if unit == "B" or amount < 10:
        return f"{number} {unit}"
    return f"{amount:.1f} {unit}" if amount < 100 else f"{amount:,.0f} {unit}"


def rate(value: float | None) -> str:
    """Tokens a second, three figures."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """`830 µs`, `12.3 ms`, `4.56 s`, `2 min 05 s`."""
    if seconds is None:
        return NONE
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.2f} s" if seconds else "0 s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _over(amount: float | None, whole: float | None) -> float | None:
    return amount / whole if amount is not None and whole else None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds of the forward calls of one phase."""

    steps: int
    mean: float
    median: float
    p90: float
    p99: float
    longest: float
    stalled: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of a run; None where the run does not give them.

    Bytes are bytes, times seconds, shares 0 to 1. `bytes_per_decode_token` is of the recorded
    decode steps alone; `bytes_per_token` of everything, prefill included. `over_belady` is misses
    over those of Belady's optimum with the same slots on the same routing.
    """

    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    hit_rate: float | None
    decode_hit_rate: float | None
    bytes_read: int
    bytes_per_token: float | None
    bytes_per_decode_token: float | None
    stall_seconds: float
    stall_share: float | None
    budget_bytes: int | None
    budget_used_bytes: int | None
    peak_rss_bytes: int | None
    rss_before_load_bytes: int | None
    over_belady: float | None
    tokens_compared: int | None
    tokens_equal: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def _whole(section: Mapping[str, Any], name: str) -> int | None:
    value = section.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def summarise(run: Run) -> Summary:
    """The figures of a run."""
    totals, steps, memory = run.counters, run.steps, run.section("memory")
    decode = steps.phase == DECODE
    decode_uses = int(steps.hits[decode].sum() + steps.misses[decode].sum())
    comparison = run.section("comparison")
    misses = {policy.name: policy.misses for policy in run.simulated}
    return Summary(
        decode_tokens_per_second=_over(totals.decode_tokens, totals.decode_seconds),
        prefill_tokens_per_second=_over(totals.prefill_tokens, totals.prefill_seconds),
        hit_rate=totals.hit_rate,
        decode_hit_rate=_over(int(steps.hits[decode].sum()), decode_uses),
        bytes_read=totals.bytes_read,
        bytes_per_token=_over(totals.bytes_read, totals.tokens),
        bytes_per_decode_token=_over(
            int(steps.bytes[decode].sum()), int(steps.tokens[decode].sum())
        ),
        stall_seconds=totals.stall_seconds,
        stall_share=_over(totals.stall_seconds, totals.step_seconds),
        budget_bytes=_whole(run.section("budget"), "total"),
        budget_used_bytes=_whole(memory, "budget_used"),
        peak_rss_bytes=_whole(memory, "peak_rss"),
        rss_before_load_bytes=_whole(memory, "rss_before_load"),
        over_belady=_over(totals.misses if misses else None, misses.get("belady")),
        tokens_compared=_whole(comparison, "tokens"),
        tokens_equal=_whole(comparison, "equal_tokens"),
    )


def outcome(summary: Summary) -> str:
    """The run in one line."""
    parts = []
    if summary.decode_tokens_per_second is not None:
        parts.append(f"{rate(summary.decode_tokens_per_second)} tokens/s decode")
    elif summary.prefill_tokens_per_second is not None:
        parts.append(f"{rate(summary.prefill_tokens_per_second)} tokens/s prefill")
    else:
        parts.append("nothing was run")
    if summary.hit_rate is not None:
        parts.append(f"{percent(summary.hit_rate)} hits")
    per_token = summary.bytes_per_decode_token
    read = f"{size(summary.bytes_read)} read"
    parts.append(read if per_token is None else f"{read} ({size(per_token)} a decoded token)")
    if summary.stall_share is not None:
        parts.append(f"stalled {percent(summary.stall_share)} of the time")
    if summary.budget_used_bytes is not None and summary.budget_bytes:
        parts.append(
            f"experts in {size(summary.budget_used_bytes)} of {size(summary.budget_bytes)}"
        )
    return ", ".join(parts)


def compared(run: Run) -> str | None:
    """What the run was compared with and what came of it; None if with nothing."""
    data = run.section("comparison")
    tokens, equal = _whole(data, "tokens"), _whole(data, "equal_tokens")
    if tokens is None or equal is None:
        return None
    reference = data.get("reference") or "the plain model"
    text = (
        f"all {count(tokens)} tokens equal to {reference}"
        if equal == tokens
        else f"only {count(equal)} of {count(tokens)} tokens equal to {reference}"
    )
    difference = data.get("max_abs_logit_difference")
    if isinstance(difference, int | float):
        largest = "logits bit-equal" if difference == 0 else f"logits within {difference:.3g}"
        text = f"{text}, {largest}"
    return text


def latency(run: Run, phase: int) -> Latency | None:
    """Latency of the recorded steps of a phase; None if there were none."""
    chosen = run.steps.phase == phase
    seconds = run.steps.seconds[chosen]
    if not len(seconds):
        return None
    median, p90, p99 = np.percentile(seconds, (50, 90, 99)).tolist()
    return Latency(
        steps=len(seconds),
        mean=float(seconds.mean()),
        median=median,
        p90=p90,
        p99=p99,
        longest=float(seconds.max()),
        stalled=_over(float(run.steps.stall_seconds[chosen].sum()), float(seconds.sum())),
    )
