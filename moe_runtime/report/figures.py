"""The figures of a run's report.

Does not know the page around them, nor how a drawing gets its colours. Every function gives None
where the run has nothing to draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.report.drawing import (
    ACCENT,
    FULL,
    HALF,
    RULE,
    SECOND,
    TEXT,
    Drawing,
    add_legend,
    drawing_of,
    heat_map,
    heat_size,
    layer_ticks,
    whole_ticks,
)
from moe_runtime.report.run import DECODE, PREFILL, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "bytes_over_time",
    "hit_rate_by_layer",
    "latency_over_time",
    "misses_over_time",
    "pinned_by_layer",
    "residency_over_time",
    "residency_share",
]
_MOST_POINTS = 360


def _bins(length: int) -> IntArray:
    """Starts of at most `_MOST_POINTS` runs of steps that are drawn as one point each."""
    return np.unique(np.linspace(0, length, min(length, _MOST_POINTS), endpoint=False).astype(int))


def _means(values: FloatArray | IntArray, starts: IntArray) -> FloatArray:
    sizes = np.diff(np.append(starts, len(values)))
    result: FloatArray = np.add.reduceat(values.astype(np.float64), starts) / sizes
    return result


def _step_axes(drawing: Drawing) -> Axes:
    axes: Axes = drawing.figure.add_subplot()
    axes.set_xlabel("step (forward call)")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.01)
    whole_ticks(axes.xaxis)
    return axes


def _mark_prefill(axes: Axes, run: Run) -> None:
    """A short tick under the axis for each prefill step; left out where they are the rule."""
    at = np.flatnonzero(run.steps.phase == PREFILL)
    if 0 < len(at) <= run.steps.count // 4:
        axes.plot(
            at,
            np.zeros(len(at)),
            marker="|",
            markersize=9,
            markeredgewidth=1.4,
            linestyle="none",
            color=SECOND,
            clip_on=False,
            label="prefill step",
        )


def _fit_decode(axes: Axes, values: FloatArray, run: Run) -> bool:
    """Fit the height to decode steps where prefill steps would flatten them; whether it did."""
    decode = values[run.steps.phase == DECODE]
    if not len(decode) or decode.max() <= 0 or values.max() <= 2 * decode.max():
        axes.set_ylim(bottom=0)
        return False
    axes.set_ylim(0, float(decode.max()) * 1.12)
    return True


def hit_rate_by_layer(run: Run) -> str | None:
    """Hit rate of each MoE layer as bars, the rate of the whole run as a line."""
    rated = [layer for layer in run.layers if layer.hit_rate is not None]
    overall = run.counters.hit_rate
    if not rated or overall is None:
        return None
    with drawing_of(HALF) as drawing:
        axes = drawing.figure.add_subplot()
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        places = np.arange(len(rated))
        axes.bar(places, [100 * (layer.hit_rate or 0) for layer in rated], 0.7, color=ACCENT)
        axes.axhline(100 * overall, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
        stride = max(1, -(-len(rated) // 16))
        axes.set_xticks(places[::stride], [str(layer.layer) for layer in rated][::stride])
        axes.set_xlim(-0.6, max(len(rated), 4) - 0.4)
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel("layer")
    return drawing.svg


def pinned_by_layer(run: Run) -> str | None:
    """Share of each layer's uses that the plan's experts served as bars, predicted as marks."""
    layers = run.pinned.layers if run.pinned is not None else ()
    observed = [layer.observed for layer in layers]
    predicted = [layer.predicted for layer in layers]
    if all(value is None for value in (*observed, *predicted)):
        return None
    with drawing_of(FULL) as drawing:
        axes = drawing.figure.add_subplot()
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        places = np.arange(len(layers))
        heights = [100 * (value or 0) for value in observed]
        axes.bar(places, heights, 0.7, color=ACCENT, label="observed")
        known = [at for at, value in enumerate(predicted) if value is not None]
        marks = [100 * (predicted[at] or 0) for at in known]
        axes.hlines(
            marks,
            [at - 0.42 for at in known],
            [at + 0.42 for at in known],
            color=TEXT,
            linewidth=1.8,
            label="predicted",
        )
        stride = max(1, -(-len(layers) // 32))
        axes.set_xticks(places[::stride], [str(layer.layer) for layer in layers][::stride])
        axes.set_xlim(-0.6, max(len(layers), 4) - 0.4)
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel("layer")
        add_legend(drawing, axes)
    return drawing.svg


def misses_over_time(run: Run) -> str | None:
    """Misses and uses of each recorded step."""
    steps = run.steps
    if not steps.count:
        return None
    starts = _bins(steps.count)
    with drawing_of(HALF) as drawing:
        axes = _step_axes(drawing)
        uses = (steps.hits + steps.misses).astype(np.float64)
        _curve(axes, starts, _means(uses, starts), RULE, "experts needed", fill=True)
        _curve(axes, starts, _means(steps.misses, starts), ACCENT, "misses", fill=True)
        _fit_decode(axes, uses, run)
        whole_ticks(axes.yaxis)
        _mark_prefill(axes, run)
        add_legend(drawing, axes)
    return drawing.svg


def _curve(
    axes: Axes, at: IntArray, values: FloatArray, colour: str, label: str, *, fill: bool
) -> None:
    """A line over steps, filled down to 0; a single step is a dot."""
    if len(at) == 1:
        axes.plot(at, values, "o", color=colour, markersize=5, label=label)
        return
    if fill:
        alpha = 0.7 if colour == RULE else 0.45
        axes.fill_between(at, values, color=colour, alpha=alpha, linewidth=0, label=label)
    axes.plot(at, values, color=colour, linewidth=1.4, label=None if fill else label)


def bytes_over_time(run: Run) -> str | None:
    """Bytes read since the first recorded step."""
    steps = run.steps
    if not steps.count:
        return None
    total = np.cumsum(steps.bytes).astype(np.float64)
    unit, name = next(
        (unit, name)
        for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
        if total[-1] >= unit or unit == 1
    )
    ends = np.append(_bins(steps.count)[1:] - 1, steps.count - 1)
    with drawing_of(HALF) as drawing:
        axes = _step_axes(drawing)
        _curve(axes, ends, total[ends] / unit, ACCENT, "bytes", fill=True)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(name)
        _mark_prefill(axes, run)
    return drawing.svg


def latency_over_time(run: Run) -> str | None:
    """Milliseconds of each recorded step, and how many of them it waited for experts."""
    steps = run.steps
    if not steps.count:
        return None
    starts = _bins(steps.count)
    with drawing_of(HALF) as drawing:
        axes = _step_axes(drawing)
        _curve(axes, starts, _means(1e3 * steps.seconds, starts), TEXT, "whole step", fill=False)
        stalls = _means(1e3 * steps.stall_seconds, starts)
        _curve(axes, starts, stalls, ACCENT, "waiting for experts", fill=True)
        axes.set_ylabel("ms")
        _fit_decode(axes, 1e3 * steps.seconds, run)
        _mark_prefill(axes, run)
        add_legend(drawing, axes)
    return drawing.svg


def residency_share(run: Run) -> str | None:
    """Layers by experts: the share of the snapshots in which each expert was held."""
    if run.residency is None or not run.grid.size:
        return None
    held = run.residency.held.mean(axis=0)
    shares = np.full((len(run.grid.layers), max(run.grid.experts)), np.nan)
    for at, (offset, experts) in enumerate(zip(run.grid.offsets, run.grid.experts, strict=True)):
        shares[at, :experts] = held[offset : offset + experts]
    with drawing_of(heat_size(len(shares))) as drawing:
        axes = drawing.figure.add_subplot()
        heat_map(axes, shares)
        layer_ticks(axes, run.grid.layers)
        whole_ticks(axes.xaxis)
        axes.set_xlabel("expert")
    return drawing.svg


def residency_over_time(run: Run) -> tuple[str, float] | None:
    """Layers by snapshots: the share of each layer's experts that was held.

    The second value is the share that is drawn in full colour.
    """
    if run.residency is None or not run.grid.size:
        return None
    held = run.residency.held
    shares = (
        np.add.reduceat(held, run.grid.offsets, axis=1, dtype=np.int64).T
        / np.asarray(run.grid.experts)[:, None]
    )
    starts = _bins(shares.shape[1])
    shares = shares[:, starts]
    numbers = run.residency.steps[starts]
    most = float(shares.max()) or 1.0
    with drawing_of(heat_size(len(shares))) as drawing:
        axes = drawing.figure.add_subplot()
        heat_map(axes, shares / most)
        layer_ticks(axes, run.grid.layers)
        stride = max(1, -(-len(numbers) // 12))
        axes.set_xticks(range(0, len(numbers), stride), [f"{n:,}" for n in numbers[::stride]])
        axes.set_xlabel("step (forward call)")
    return drawing.svg, most
