"""A plan's predicted time of a decode step in both modes, in words.

Does not know how it was predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_runtime.placement.plan import Plan
from moe_runtime.report.plan_facts import section, value_of
from moe_runtime.report.summary import NONE, count, size

__all__ = ["crossover_line", "mode_line", "prefill_line", "step_time_lines"]

_MODES = ("vanilla", "coherent")


def step_time_lines(plan: Plan) -> list[str]:
    """What `metrics["step_time"]` says, a line each, `name: text`; nothing where it is missing."""
    known = section(plan.metrics, "step_time")
    mine = section(known, "plan")
    if not mine:
        return []
    rows, tokens = count(value_of(known, "rows")), known.get("measured_on")
    which = {"train": " on training tokens", "held_out": " on held-out tokens"}.get(str(tokens), "")
    lines = [f"step time: predicted for {rows} rows{which}; use {use_of(mine)}"]
    lines += [f"{mode}: {mode_line(section(mine, mode))}" for mode in _MODES]
    lines += [f"prefill: {line}"] if (line := prefill_line(known)) else []
    change = crossover_line(mine)
    lines += [f"changes: {change}"] if change else []
    rival = section(known, "contiguous")
    times = ", ".join(f"{mode} {_milliseconds(section(rival, mode))}" for mode in _MODES)
    return lines + ([f"contiguous: {times}"] if rival else [])


def use_of(compared: Mapping[str, Any]) -> str:
    """`coherent, 1.53 times as fast as vanilla`."""
    use, speedup = str(compared.get("use", NONE)), value_of(compared, "speedup")
    if not speedup:
        return use
    other, times = (_MODES[0], speedup) if use == _MODES[1] else (_MODES[1], 1.0 / speedup)
    return f"{use}, {times:.2f} times as fast as {other}"


def mode_line(mode: Mapping[str, Any]) -> str:
    """`1.234 ms a step: 13 collectives, 1.2 MiB between devices (dispatch 0.6 MiB, ...)`."""
    kinds = section(mode, "bytes_by_kind")
    parts = ", ".join(
        f"{kind.replace('_', ' ')} {size(round(amount))}"
        for kind in kinds
        if (amount := value_of(kinds, kind))
    )
    sent, calls = value_of(mode, "cross_bytes"), value_of(mode, "collectives")
    return (
        f"{_milliseconds(mode)} a step: {NONE if calls is None else f'{calls:.3g}'} collectives, "
        f"{NONE if sent is None else size(round(sent))} between devices"
        + f" ({parts})"
        * bool(parts)
    )


def prefill_line(timed: Mapping[str, Any]) -> str:
    """`4,096 tokens of prompts: vanilla 1.2 ms (3 MiB between devices), ...`; empty if unknown."""
    modes = section(section(timed, "plan"), "prefill")
    told = []
    for mode in _MODES:
        found = section(modes, mode)
        sent = value_of(found, "cross_bytes")
        if sent is not None:
            told.append(f"{mode} {_milliseconds(found)} ({size(round(sent))} between devices)")
    tokens = value_of(section(modes, _MODES[0]), "rows")
    return f"{count(round(tokens))} tokens of prompts: {', '.join(told)}" if told and tokens else ""


def crossover_line(compared: Mapping[str, Any]) -> str:
    """Where the better mode changes; empty if it does not."""
    found = compared.get("bandwidth_factors")
    factors = [value for value in found if isinstance(value, int | float)] if found else []
    parts = [f"at {factor:.3g} times the bandwidth" for factor in factors]
    rows = value_of(compared, "rows")
    if rows is not None:
        better = _MODES[compared.get("rows_coherent_above") is True]
        parts.append(f"with the rows, {better} above about {rows:.3g}")
    return "; ".join(parts)


def _milliseconds(mode: Mapping[str, Any]) -> str:
    seconds = value_of(mode, "seconds")
    return NONE if seconds is None else f"{1e3 * seconds:.3f} ms"
