"""A simulation in words and plain data: who is how fast, and what it is compared with.

Does not know pages or drawings.
"""

from __future__ import annotations

from typing import Any

from moe_runtime.report.simulated import Contender, Simulated
from moe_runtime.report.summary import count, percent, rate, size

__all__ = ["TITLES", "best", "cells", "facts_of", "headline", "ranked", "ratio", "setting_line"]


def ranked(found: Simulated) -> list[Contender]:
    """Contenders by simulated speed, the fastest first."""
    return sorted(found.contenders, key=lambda one: -one.tokens_per_second)


def best(found: Simulated) -> Contender | None:
    """The fastest of this runtime's own, else of all that know nothing of the future."""
    own = found.of("ours") or [
        one for one in ranked(found) if one.role not in {"bound", "oracle", "lru"}
    ]
    return own[0] if own else next(iter(found.of("lru")), None)


def ratio(value: float | None) -> str:
    """`1.23` and the sign for times, empty if there is nothing to compare with."""
    return "" if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def headline(found: Simulated) -> str:
    """The simulation in one line."""
    one = best(found)
    if one is None:
        return "no contender was simulated that does not know the future"
    line = f"{one.title}: {rate(one.tokens_per_second)} tokens/s predicted"
    if one.speed_over_lru is not None and one.role != "lru":
        line += f", {ratio(one.speed_over_lru)} plain LRU's"
    if one.bytes_over_belady is not None:
        line += f"; {ratio(one.bytes_over_belady)} the bytes of Belady's bound on demand"
    other = next(iter(found.of("oracle")), None)
    if other is not None:
        line += f"; {other.title}, which knows the run: {rate(other.tokens_per_second)} tokens/s"
    return line


def setting_line(found: Simulated) -> str:
    """What fits, how large an expert is, how fast the link."""
    link = found.setting["link"]["bytes_per_second"]
    each = max(found.expert_bytes, default=None)
    return (
        f"{count(found.tokens)} tokens, {count(sum(found.slots))} of {count(found.experts)} "
        f"experts fit, {size(each)} an expert, {link / 1e9:g} GB/s; simulated, not measured"
    )


def facts_of(found: Simulated) -> dict[str, Any]:
    """Plain data: the setting in short and each contender, the fastest first."""
    one = best(found)
    names = (
        *("title", "role", "tokens_per_second", "hit_rate", "speed_over_lru"),
        *("bytes_over_belady", "resident", "in_time", "late", "missed", "read", "wasted"),
        *("stall_seconds", "state"),
    )
    return {
        "outcome": headline(found),
        "model": found.model_id,
        "tokens": found.tokens,
        "slots": list(found.slots),
        "experts": found.experts,
        "best": None if one is None else one.title,
        "contenders": [{name: getattr(row, name) for name in names} for row in ranked(found)],
        "left_out": [{"title": title, "why": why} for title, why in found.left_out],
    }


def cells(one: Contender) -> list[str]:
    """A contender's row of the table, without its title; as `TITLES`."""
    return [
        percent(one.hit_rate),
        *(count(value) for value in (one.resident, one.in_time, one.late, one.missed)),
        f"{one.stall_seconds:.2f} s",
        size(one.read),
        size(one.wasted),
        ratio(one.bytes_over_belady),
        rate(one.tokens_per_second),
        ratio(one.speed_over_lru),
    ]


TITLES = (
    *("hits", "resident", "in time", "late", "missed", "stalls", "read", "unused"),
    *("vs Belady", "tokens/s", "vs LRU"),
)
