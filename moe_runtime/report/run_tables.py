"""The lists at the end of a run's page: memory, counters, model, configuration, machine.

Does not know the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moe_runtime.report.run import Run
from moe_runtime.report.summary import NONE, Summary, count, duration, percent, size

__all__ = ["run_tables"]


def run_tables(run: Run, summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, names and values) of each section that is such a list."""
    totals, budget, model = run.counters, run.section("budget"), run.section("model")
    share, each = budget.get("share"), run.mean_expert_bytes
    memory = [
        ("Budget", size(summary.budget_bytes)),
        ("Share of all experts", percent(share) if isinstance(share, int | float) else NONE),
        ("Slots", _plain(budget.get("slots"))),
        ("All slots", _sizes(budget.get("slot_bytes"))),
        ("Staging", _sizes(budget.get("staging_bytes"))),
        ("Used at most", size(summary.budget_used_bytes)),
        ("Process peak", size(summary.peak_rss_bytes)),
        ("Process before loading", size(summary.rss_before_load_bytes)),
    ]
    counted = [
        ("Forward calls", count(totals.steps)),
        ("Tokens", count(totals.tokens)),
        ("Experts needed", count(totals.uses)),
        ("Misses", count(totals.misses)),
        ("… read again", count(totals.rereads)),
        ("Evictions", count(totals.evictions)),
        ("Read from disk", size(totals.bytes_read)),
        ("Weights of the misses", size(None if each is None else totals.misses * each)),
        ("Read from host memory", size(totals.host_bytes)),
        ("Misses computed on the host", count(totals.hosted)),
        ("… time of computing them", duration(totals.hosted_seconds)),
        ("Time in steps", duration(totals.step_seconds)),
        ("… in experts", duration(totals.expert_seconds)),
        ("… waiting for experts", duration(totals.stall_seconds)),
    ]
    shape = [
        ("Class", _plain(model.get("class"))),
        ("MoE layers", count(len(run.grid.layers))),
        ("Experts a layer", _plain(sorted(set(run.grid.experts)))),
        ("Experts a token", _plain(sorted(set(model.get("top_k") or [])))),
        ("Experts in all", count(run.grid.size)),
        ("Bytes an expert", _sizes(model.get("expert_bytes"))),
        ("All experts", _sizes(model.get("total_expert_bytes"))),
        ("Everything else", _sizes(model.get("dense_bytes"))),
        ("Weights", _plain(model.get("dtype"))),
        ("Fingerprint", _plain(model.get("fingerprint"))),
    ]
    return [
        ("Memory", memory),
        ("Counters", counted),
        ("Model", shape),
        ("Configuration", [(key, _plain(v)) for key, v in run.section("config").items()]),
        ("Machine", _machine(run.section("machine"))),
    ]


def _machine(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key.removesuffix("_bytes"), _sizes(value) if key.endswith("_bytes") else _plain(value))
        for key, value in machine.items()
    ]


def _plain(value: Any) -> str:
    """Any plain value in words."""
    if value is None or value == []:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _sizes(value: Any) -> str:
    """Byte sizes: one, or the distinct ones of a list."""
    if isinstance(value, list):
        known = sorted({item for item in value if isinstance(item, int)})
        return ", ".join(size(item) for item in known) or NONE
    return size(value) if isinstance(value, int) else _plain(value)
