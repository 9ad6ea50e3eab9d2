"""The figures of an evaluation of steering: accuracy, thinking and format errors against beta.

Does not know the page around them. Every function gives "" where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.report.drawing import (
    ACCENT,
    FULL,
    MUTED,
    PAGE,
    SECOND,
    TEXT,
    Drawing,
    add_legend,
    drawing_of,
)
from moe_runtime.report.steering_words import beta_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_runtime.steering.evaluation import Arm, Estimate, SteeringEvaluation

__all__ = ["accuracy", "outcomes", "thinking"]

_CONTROLS: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("random", "random experts", {"color": SECOND, "marker": "s"}, 0.16),
    ("frequency", "equally frequent experts", {"color": MUTED, "marker": "D"}, 0.30),
)
_ASIDE = {"prompt": "prompt only", "tip": "TIP"}  # controls that have no beta


def accuracy(found: SteeringEvaluation) -> str:
    """Share of right answers against beta on a log axis, beside the controls, with intervals."""
    return _against_beta(found, lambda arm: arm.accuracy, scale=100.0, form="{x:g} %")


def thinking(found: SteeringEvaluation) -> str:
    """Median thinking tokens against beta, beside the controls, with intervals."""
    if not found.settings.thinking_end:
        return ""
    return _against_beta(found, lambda arm: arm.thinking_median, scale=1.0, form="{x:g}")


def _places(found: SteeringEvaluation) -> dict[float, float]:
    """Beta -> place on the axis: its logarithm to base 2; 0 stands a step left of the least."""
    betas = {arm.beta for arm in found.arms if arm.kind not in _ASIDE} | {1.0}
    logs = {beta: float(np.log2(beta)) for beta in betas if beta > 0}
    if 0.0 in betas:
        logs[0.0] = min(logs.values()) - 1.0
    return dict(sorted(logs.items()))


def _against_beta(
    found: SteeringEvaluation, figure: Callable[[Arm], Estimate], *, scale: float, form: str
) -> str:
    if len(found.arms) < 2:
        return ""
    places = _places(found)
    aside = {kind: n for n, kind in enumerate(k for k in _ASIDE if any(found.of_kind(k)))}  # type: ignore[arg-type]
    right = max(places.values())
    with drawing_of(FULL) as drawing:
        axes = drawing.figure.add_subplot()
        plain = figure(found.unsteered)
        axes.axhspan(scale * plain.low, scale * plain.high, color=MUTED, alpha=0.13, linewidth=0)
        axes.axhline(
            scale * plain.value, color=TEXT, linewidth=1.1, linestyle=(0, (4, 3)), label="unsteered"
        )
        axes.scatter([places[1.0]], [scale * plain.value], 40, color=TEXT, zorder=3)
        steered = sorted(found.of_kind("steered"), key=lambda arm: places[arm.beta])
        if steered:
            x = [places[arm.beta] for arm in steered]
            values = [figure(arm) for arm in steered]
            line = "-" if len(steered) > 1 else "none"
            look = {"color": ACCENT, "marker": "o", "linestyle": line, "linewidth": 1.8}
            _estimates(axes, x, values, scale, "steered", **look)
        for kind, name, look, offset in _CONTROLS:
            arms = list(found.of_kind(kind))  # type: ignore[arg-type]
            if arms:
                x = [
                    places[arm.beta] + offset + 0.05 * (arm.draw - 1 if kind == "random" else 0)
                    for arm in arms
                ]
                small = {"markersize": 4.5, "elinewidth": 0.9, "linestyle": "none", **look}
                _estimates(axes, x, [figure(arm) for arm in arms], scale, name, **small)
        for kind, number in aside.items():
            for arm in found.of_kind(kind):  # type: ignore[arg-type]
                look = {"color": TEXT, "marker": "^", "linestyle": "none"}
                _estimates(axes, [right + 1.2 + number], [figure(arm)], scale, None, **look)
        _label(axes, places, {_ASIDE[kind]: right + 1.2 + n for kind, n in aside.items()}, form)
        add_legend(drawing, axes)
    return drawing.svg


def _estimates(
    axes: Axes,
    x: list[float],
    values: list[Estimate],
    scale: float,
    label: str | None,
    **look: Any,
) -> None:
    """Points with their intervals."""
    middle = np.array([one.value for one in values])
    around = np.array([[one.value - one.low, one.high - one.value] for one in values]).T
    axes.errorbar(
        x,
        scale * middle,
        scale * np.maximum(around, 0.0),
        label=label,
        **{"markersize": 6, "elinewidth": 1.4, **look},
    )


def _label(axes: Axes, places: dict[float, float], aside: dict[str, float], form: str) -> None:
    """Ticks: betas, then the controls that have none behind a gap."""
    ticks = {beta_text(beta): place for beta, place in places.items()} | aside
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.set_xlim(min(ticks.values()) - 0.5, max(ticks.values()) + 0.7)
    axes.set_xlabel("beta, log axis; 1 is unsteered")
    axes.margins(y=0.08)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.yaxis.set_major_formatter(form)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def outcomes(found: SteeringEvaluation, arms: tuple[Arm, ...]) -> str:
    """What became of these arms' samples: right, wrong, and the three format errors; shares."""
    total = found.settings.samples * len(found.problem_ids)
    if not total:
        return ""
    with drawing_of((FULL[0], 58 + 19 * len(arms))) as drawing:
        axes = drawing.figure.add_subplot()
        _bars(drawing, axes, arms, total)
        axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.spines["left"].set_visible(False)
    return drawing.svg


def _bars(drawing: Drawing, axes: Axes, arms: tuple[Arm, ...], total: int) -> None:
    looks: dict[str, dict[str, Any]] = {
        "right": {"facecolor": ACCENT},
        "wrong": {"facecolor": PAGE, "edgecolor": MUTED},
        "no answer": {"facecolor": PAGE, "edgecolor": SECOND, "hatch": "||||"},
        "thinking without end": {"facecolor": PAGE, "edgecolor": SECOND, "hatch": "////"},
        "cut at the length limit": {"facecolor": SECOND},
    }
    left = np.zeros(len(arms))
    for name, look in looks.items():
        width = 100 * np.array([_samples(arm, name, total) for arm in arms]) / total
        some = np.flatnonzero(width)  # a bar of no width would still have an edge
        axes.barh(some, width[some], 0.66, left[some], linewidth=0.8, **look)
        axes.barh([-9], [1], label=name, linewidth=0.8, **look)  # for the legend, out of sight
        left += width
    add_legend(drawing, axes)


def _samples(arm: Arm, outcome: str, total: int) -> int:
    columns = {
        "right": arm.right,
        "no answer": arm.no_answer,
        "thinking without end": arm.no_end,
        "cut at the length limit": arm.cut,
    }
    if outcome in columns:
        return sum(columns[outcome])
    return total - sum(map(sum, columns.values()))
