"""A run as one HTML page: what the template is given.

Does not know how figures are drawn nor how numbers were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.report import figures
from moe_runtime.report.layout import Figure, Tile, present, template
from moe_runtime.report.predicted_page import predicted_part
from moe_runtime.report.predicted_words import loaded_bytes
from moe_runtime.report.run import DECODE, PREFILL, Run
from moe_runtime.report.run_tables import run_tables
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

__all__ = ["render_page"]


@dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """One line of the comparison of eviction policies; `bar` is its misses over the most, 0 to 1.

    `kind` is `run` for what was measured, `bound` for Belady's optimum, else empty.
    """

    name: str
    kind: str
    hit_rate: str
    misses: str
    bytes: str
    over: str
    bar: float


def render_page(run: Run, summary: Summary) -> str:
    """The whole page."""
    model = run.section("model")
    simulation = run.section("simulation")
    held_over_time, most_held = figures.residency_over_time(run) or ("", 0.0)
    return template("report.html.j2").render(
        kind="run report",
        title=model.get("name") or model.get("class") or "unnamed model",
        outcome=outcome(summary).replace(" %", "\N{NO-BREAK SPACE}%"),
        compared=compared(run),
        equal=summary.tokens_equal is not None and summary.tokens_equal == summary.tokens_compared,
        tiles=_tiles(run, summary),
        policies=_policies(run),
        simulation_slots=count(simulation.get("slots")) if simulation.get("slots") else None,
        layer_figures=present(
            Figure(
                title="Hit rate by layer",
                note=f"dashed: whole run, {percent(summary.hit_rate)}",
                svg=figures.hit_rate_by_layer(run) or "",
            ),
        ),
        time_figures=present(
            Figure(
                title="Misses a step",
                note="of the experts that the step needed",
                svg=figures.misses_over_time(run) or "",
            ),
            Figure(
                title="Read so far",
                note="bytes from the slow tiers",
                svg=figures.bytes_over_time(run) or "",
            ),
            Figure(
                title="Latency a step",
                note="and the part of it spent waiting",
                svg=figures.latency_over_time(run) or "",
            ),
        ),
        residency_figures=present(
            Figure(
                title="Held, by expert",
                note="share of the snapshots in which the expert was in the fast tier",
                svg=figures.residency_share(run) or "",
                full="100 %",
            ),
            Figure(
                title="Held, over time",
                note="share of the layer's experts in the fast tier at each snapshot",
                svg=held_over_time,
                full=percent(most_held),
            ),
        ),
        plan=_plan(run),
        plan_figures=present(
            Figure(
                title="Uses served by the plan's experts, by layer",
                note="share of the layer's uses",
                svg=figures.pinned_by_layer(run) or "",
            ),
        ),
        predicted=predicted_part(run),
        snapshots=0 if run.residency is None else len(run.residency.steps),
        dropped=run.steps.dropped,
        latencies=_latencies(run),
        layers=_layers(run),
        generated=_generated(run),
        tables=run_tables(run, summary),
        explanation=run.section("budget").get("explanation"),
    )


def _tiles(run: Run, summary: Summary) -> list[Tile]:
    totals = run.counters
    used, budget = summary.budget_used_bytes, summary.budget_bytes
    share = used / budget if used is not None and budget else None
    return [
        Tile(
            label="Decode",
            value=f"{rate(summary.decode_tokens_per_second)} tok/s",
            note=f"{count(totals.decode_tokens)} tokens in {duration(totals.decode_seconds)}",
        ),
        Tile(
            label="Prefill",
            value=f"{rate(summary.prefill_tokens_per_second)} tok/s",
            note=f"{count(totals.prefill_tokens)} tokens in {duration(totals.prefill_seconds)}",
        ),
        Tile(
            label="Hit rate",
            value=percent(summary.hit_rate),
            note=f"{count(totals.hits)} of {count(totals.uses)} uses; "
            f"decode {percent(summary.decode_hit_rate)}",
        ),
        Tile(
            label="Read from disk",
            value=size(summary.bytes_read),
            note=f"{size(summary.bytes_per_decode_token)} a decoded token",
        ),
        Tile(
            label="Stalled",
            value=duration(summary.stall_seconds),
            note=f"{percent(summary.stall_share)} of the step time",
        ),
        Tile(
            label="Expert memory",
            value=size(used),
            note=f"{percent(share)} of budget, process peak {size(summary.peak_rss_bytes)}",
        ),
    ]


def _policies(run: Run) -> list[PolicyRow]:
    """The run as measured, then each policy simulated on its routing, Belady's optimum last."""
    if not run.simulated:
        return []
    policy = str(run.section("config").get("policy", "policy"))
    each, totals = run.mean_expert_bytes, run.counters
    least = next((entry.misses for entry in run.simulated if entry.name == "belady"), 0)
    entries = sorted(run.simulated, key=lambda entry: -entry.misses)
    if run.predicted is not None:
        policy += " with prediction"
    lines = [(f"{policy}, as run", "run", totals.hit_rate, totals.misses)] + [
        (
            "Belady's optimum" if entry.name == "belady" else f"{entry.name}, simulated",
            "bound" if entry.name == "belady" else "",
            entry.hit_rate,
            entry.misses,
        )
        for entry in entries
    ]
    most = max(misses for *_, misses in lines)
    return [
        PolicyRow(
            name=name,
            kind=kind,
            hit_rate=percent(hit_rate),
            misses=count(misses),
            bytes=size(
                loaded_bytes(run, run.predicted)  # loads ahead of need are no misses
                if kind == "run" and run.predicted is not None
                else None
                if each is None
                else misses * each
            ),
            over=f"{misses / least:.2f}\N{MULTIPLICATION SIGN}" if least else NONE,
            bar=misses / most if most else 0.0,
        )
        for name, kind, hit_rate, misses in lines
    ]


def _plan(run: Run) -> dict[str, Any] | None:
    """What the plan pins, predicted beside observed: the whole run, then each layer."""
    plan = run.pinned
    if plan is None:
        return None
    rows = [
        ("All layers", plan.pinned, plan.predicted, plan.observed),
        *((str(row.layer), row.pinned, row.predicted, row.observed) for row in plan.layers),
    ]
    return {
        "name": plan.name,
        "pinned": count(plan.pinned),
        "bytes": size(plan.nbytes),
        "rows": [
            {
                "layer": layer,
                "pinned": count(pinned),
                "predicted": percent(predicted),
                "observed": percent(observed),
                "off": _points(predicted, observed),
            }
            for layer, pinned, predicted, observed in rows
        ],
    }


def _points(predicted: float | None, observed: float | None) -> str:
    """Observed less predicted, in percentage points."""
    if predicted is None or observed is None:
        return NONE
    return f"{100 * (observed - predicted):+.1f}".replace("-", "\N{MINUS SIGN}")


def _latencies(run: Run) -> list[dict[str, str]]:
    rows = []
    for name, phase in (("Prefill", PREFILL), ("Decode", DECODE)):
        times = latency(run, phase)
        if times is not None:
            rows.append(
                {
                    "phase": name,
                    "steps": count(times.steps),
                    "mean": duration(times.mean),
                    "median": duration(times.median),
                    "p90": duration(times.p90),
                    "p99": duration(times.p99),
                    "longest": duration(times.longest),
                    "stalled": percent(times.stalled),
                }
            )
    return rows


def _layers(run: Run) -> list[dict[str, str]]:
    held: dict[int, str] = {}
    if run.residency is not None and run.grid.size:
        sums = np.add.reduceat(run.residency.held, run.grid.offsets, axis=1, dtype=np.int64)
        means = sums.mean(axis=0)
        held = {
            layer: f"{mean:.1f} of {experts}"
            for layer, mean, experts in zip(run.grid.layers, means, run.grid.experts, strict=True)
        }
    return [
        {
            "layer": str(layer.layer),
            "hit_rate": percent(layer.hit_rate),
            "hits": count(layer.hits),
            "misses": count(layer.misses),
            "bytes": size(layer.bytes_read),
            "stall": duration(layer.stall_seconds),
            "held": held.get(layer.layer, NONE),
        }
        for layer in run.layers
    ]


def _generated(run: Run) -> list[dict[str, str]]:
    samples = run.data.get("generated") or []
    shown = []
    for sample in samples if isinstance(samples, list) else []:
        if not isinstance(sample, Mapping):
            continue
        tokens, seconds = sample.get("new_tokens"), sample.get("seconds")
        note = f"{count(tokens)} tokens" if isinstance(tokens, int) else ""
        if note and isinstance(seconds, int | float):
            note += f" in {duration(seconds)}"
        shown.append(
            {
                "prompt": str(sample.get("prompt", "")),
                "text": str(sample.get("text", "")),
                "note": note,
            }
        )
    return shown
