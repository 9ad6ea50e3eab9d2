"""A simulation as one HTML page: what the template is given.

Does not know how figures are drawn nor how numbers were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from moe_runtime.report import simulated_figures as figures
from moe_runtime.report import simulated_words as words
from moe_runtime.report.layout import Figure, Tile, present, template
from moe_runtime.report.simulated import Contender, Simulated
from moe_runtime.report.summary import NONE, count, duration, percent, rate, size

__all__ = ["render_simulated"]

_CLASSES = {"ours": "run", "bound": "bound"}


def render_simulated(found: Simulated) -> str:
    """The whole page."""
    return template("simulation.html.j2").render(
        kind="simulation",
        title=found.model_id or "unnamed model",
        outcome=words.headline(found),
        setting=words.setting_line(found),
        tiles=_tiles(found),
        figures=present(
            Figure(
                title="Bytes and speed",
                note="the fastest above; Belady's bound holds for what loads on demand only",
                svg=figures.bytes_and_speed(found),
            ),
            Figure(
                title="Experts needed",
                note="share of the uses; only what was late or missed was waited for",
                svg=figures.outcomes(found),
            ),
        ),
        titles=words.TITLES,
        rows=[
            {"title": one.title, "kind": _CLASSES.get(one.role, ""), "cells": words.cells(one)}
            for one in words.ranked(found)
        ],
        summaries=[
            (one.title, _what(one, tried=found.setting.get("trial") is True))
            for one in words.ranked(found)
            if one.summary or one.predictor
        ],
        left_out=found.left_out,
        tables=_tables(found),
    )


def _tiles(found: Simulated) -> list[Tile]:
    tiles = []
    one = words.best(found)
    for label, rows in (
        ("This runtime's own, fastest", [] if one is None or one.role != "ours" else [one]),
        ("Plain LRU", found.of("lru")),
        ("Best that knows the run", found.of("oracle")),
        ("Belady's bound on demand", found.of("bound")),
    ):
        tiles += [
            Tile(
                label=label,
                value=f"{rate(row.tokens_per_second)} tok/s",
                note=f"{row.title}: {percent(row.hit_rate)} hits, {size(row.read)} read",
            )
            for row in rows[:1]
        ]
    link = found.setting["link"]
    fit = sum(found.slots)
    return [
        *tiles,
        Tile(
            label="Experts that fit",
            value=count(fit),
            note=f"{percent(fit / found.experts if found.experts else None)} of "
            f"{count(found.experts)}",
        ),
        Tile(
            label="Link",
            value=f"{link['bytes_per_second'] / 1e9:g} GB/s",
            note=f"an expert is {size(max(found.expert_bytes, default=None))}",
        ),
    ]


def _what(one: Contender, *, tried: bool) -> str:
    parts = [one.summary or f"policy {one.policy}"]
    if one.predictor is not None:
        parts.append(f"forecasts took {duration(one.predictor_seconds)} in all")
        parts += [f"its trial ended in state {one.state}"] if one.state and tried else []
    return "; ".join(parts)


def _tables(found: Simulated) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sections that are lists of names and values."""
    setting = found.setting
    plain = {
        name: value
        for name, value in setting.items()
        if name not in {"link", "compute", "slots", "experts", "expert_bytes"}
    }
    return [
        (
            "Replayed",
            [
                ("Tokens", count(found.tokens)),
                *(("Trace", PurePath(one).name) for one in found.traces),
                *(("Fitted to", PurePath(one).name) for one in found.fit),
            ],
        ),
        (
            "Cache",
            [
                ("Slots", ", ".join(map(count, found.slots))),
                ("Experts", count(found.experts)),
                ("Bytes an expert", ", ".join(map(size, sorted(set(found.expert_bytes))))),
                *((str(name), _plain(value)) for name, value in plain.items()),
            ],
        ),
        ("Link", _times(setting["link"])),
        ("Compute", _times(setting["compute"])),
    ]


def _times(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Seconds as durations, but for what is known to be something else."""
    rows = []
    for name, value in section.items():
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "bytes_per_second" and known:
            rows.append(("bandwidth", f"{value / 1e9:g} GB/s"))
        elif name == "parallel" or not known:
            rows.append((str(name), _plain(value)))
        else:
            rows.append((str(name).replace("_", " "), duration(value)))
    return rows


def _plain(value: Any) -> str:
    if value is None or value == "":
        return NONE
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
