"""The figures of prediction in a run.

Does not know the page around them. Every function gives "" where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.report.drawing import (
    ACCENT,
    FULL,
    LINES,
    MUTED,
    OUTCOMES,
    add_legend,
    drawing_of,
)
from moe_runtime.report.predicted import Predicted
from moe_runtime.report.predicted_words import FATES, loaded_bytes
from moe_runtime.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bytes_and_misses", "outcomes_by_layer", "recall_by_layer"]


def _layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    stride = max(1, -(-len(layers) // 32))
    axes.set_xticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
    axes.set_xlim(-0.6, max(len(layers), 4) - 0.4)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def outcomes_by_layer(found: Predicted) -> str:
    """Each layer's uses by outcome, shares of 100 %, stacked."""
    layers = [layer for layer in found.layers if layer.uses]
    if not layers:
        return ""
    uses = np.array([layer.uses for layer in layers], np.float64)
    with drawing_of(FULL) as drawing:
        axes = drawing.figure.add_subplot()
        _layer_axis(axes, [layer.layer for layer in layers])
        foot = np.zeros(len(layers))
        for name, label in FATES.items():
            height = 100 * np.array([getattr(layer, name) for layer in layers]) / uses
            axes.bar(
                range(len(layers)), height, 0.7, foot, label=label, linewidth=0.8, **OUTCOMES[name]
            )
            foot += height
        add_legend(drawing, axes)
    return drawing.svg


def recall_by_layer(found: Predicted) -> str:
    """Recall of each layer, a line for each number of layers ahead."""
    most = max((len(layer.recall) for layer in found.layers), default=0)
    values = np.full((most, len(found.layers)), np.nan)
    for at, layer in enumerate(found.layers):
        for ahead, value in enumerate(layer.recall):
            values[ahead, at] = np.nan if value is None else 100 * value
    if np.isnan(values).all():
        return ""
    with drawing_of(FULL) as drawing:
        axes = drawing.figure.add_subplot()
        _layer_axis(axes, [layer.layer for layer in found.layers])
        for ahead, row in enumerate(values):
            if np.isnan(row).all():
                continue
            colour, line, marker = LINES[ahead % len(LINES)]
            axes.plot(
                range(len(row)),
                row,
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                label=f"{ahead + 1} layer{'s' if ahead else ''} ahead",
            )
        add_legend(drawing, axes)
    return drawing.svg


def bytes_and_misses(run: Run, found: Predicted) -> str:
    """Bytes and misses of this run beside the policies simulated on demand on its routing."""
    each = run.mean_expert_bytes
    if not run.simulated or each is None:
        return ""
    rows: list[tuple[str, float, float, int]] = [
        ("this run, measured", loaded_bytes(run, found), found.nbytes.wasted, run.counters.misses)
    ]
    rows += [
        (
            "Belady's optimum, simulated" if one.name == "belady" else f"{one.name}, simulated",
            one.misses * each,
            0.0,
            one.misses,
        )
        for one in sorted(run.simulated, key=lambda one: -one.misses)
    ]
    scale, unit = next(
        (scale, unit)
        for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
        if max(row[1] for row in rows) >= scale or scale == 1
    )
    places = range(len(rows))
    with drawing_of((FULL[0], 84 + 26 * len(rows))) as drawing:
        left, right = drawing.figure.subplots(1, 2, sharey=True)
        useful = [(row[1] - min(row[2], row[1])) / scale for row in rows]
        wasted = [min(row[2], row[1]) / scale for row in rows]
        left.barh(places, useful, 0.6, color=ACCENT, label="experts loaded")
        look = {"label": "of them never used", "linewidth": 0.8, **OUTCOMES["late"]}
        left.barh([0], wasted[:1], 0.6, useful[:1], **look)
        right.barh(places, [row[3] for row in rows], 0.6, color=MUTED)
        left.set_yticks(places, [row[0] for row in rows])
        left.invert_yaxis()
        left.set_xlabel(unit)
        right.set_xlabel("misses (loads that a layer waited for)")
        for axes in (left, right):
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
        add_legend(drawing, left)
    return drawing.svg
