"""The figures of identification and cost on the steering page.

Does not know the page around them. Every function gives "" where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.core import FloatArray
from moe_runtime.report.drawing import (
    ACCENT,
    FULL,
    HALF,
    MUTED,
    PAGE,
    RULE,
    SECOND,
    TEXT,
    add_legend,
    drawing_of,
    heat_size,
    layer_ticks,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_runtime.steering.cost import ArmName, CostRun, SteeringCost
    from moe_runtime.steering.identification import Identification

__all__ = ["DRAWN_EXPERTS", "costs", "ranked", "score_map", "shift"]

DRAWN_EXPERTS = 20  # of the ranking
# Positive and negative scores, as pixels with the score as their opacity: the page's two colours.
_ABOVE, _BELOW = (0.16, 0.45, 0.74), (0.71, 0.33, 0.06)
_ARM_TITLES: dict[ArmName, str] = {
    "unsteered": "unsteered",
    "steered": "steered",
    "pinned": "… pinned slots",
    "own": "… its own text",
}


def score_map(found: Identification, chosen: Iterable[tuple[int, int]]) -> tuple[str, float]:
    """Scores of all experts, layers x experts, with the chosen ones framed.

    Returns:
        The drawing, and the absolute score of full colour.
    """
    scores = found.score_map()
    most = float(np.nanmax(np.abs(scores))) if np.isfinite(scores).any() else 0.0
    if not most:
        return "", 0.0
    pixels = np.empty((*scores.shape, 4))
    pixels[..., :3] = np.where((scores < 0)[..., None], _BELOW, _ABOVE)
    pixels[..., 3] = np.nan_to_num(np.abs(scores) / most)
    with drawing_of(heat_size(len(found.layer_ids))) as drawing:
        axes = drawing.figure.add_subplot()
        axes.imshow(pixels, aspect="auto", interpolation="none", origin="upper")
        for side in axes.spines.values():
            side.set_visible(True)
        _hatch_unranked(axes, scores, found.experts)
        layer_ticks(axes, found.layer_ids)
        axes.set_xlabel("expert")
        whole_ticks(axes.xaxis)
        places = {layer: at for at, layer in enumerate(found.layer_ids)}
        for layer, expert in chosen:
            if layer in places:
                _frame(axes, places[layer], expert)
    return drawing.svg, most


def _frame(axes: Axes, row: int, expert: int) -> None:
    """Two outlines, so that the frame shows on full colour and on none."""
    from matplotlib.patches import Rectangle

    for colour, width in ((PAGE, 4.0), (TEXT, 1.8)):
        axes.add_patch(
            Rectangle(
                (expert - 0.5, row - 0.5),
                1,
                1,
                fill=False,
                edgecolor=colour,
                linewidth=width,
                clip_on=False,
                zorder=3,
            )
        )


def _hatch_unranked(axes: Axes, scores: FloatArray, experts: tuple[int, ...]) -> None:
    """A dot where an expert had too few events; nothing where a layer has no such expert."""
    exists = np.arange(scores.shape[1])[None, :] < np.array(experts)[:, None]
    rows, columns = np.nonzero(exists & ~np.isfinite(scores))
    axes.scatter(columns, rows, s=3, color=MUTED, linewidths=0)


def ranked(found: Identification) -> str:
    """The best experts with the bootstrap intervals of their scores; the chosen ones filled."""
    shown = found.ranked[:DRAWN_EXPERTS]
    if not shown:
        return ""
    with drawing_of((FULL[0], 62 + 20 * len(shown))) as drawing:
        axes = drawing.figure.add_subplot()
        places = np.arange(len(shown))
        for place, one in zip(places, shown, strict=True):
            if one.interval is not None:
                axes.plot(one.interval, (place, place), color=MUTED, linewidth=2.2, zorder=1)
        for chosen, face, name in ((True, ACCENT, "chosen"), (False, PAGE, "behind them")):
            at = [n for n in places if (n < found.top) == chosen]
            if at:
                axes.scatter(
                    [shown[n].score for n in at],
                    at,
                    46,
                    facecolor=face,
                    edgecolor=ACCENT,
                    linewidths=1.4,
                    label=name,
                    zorder=2,
                )
        axes.set_yticks(places, [f"layer {one.layer} expert {one.expert}" for one in shown])
        for place, one in zip(places, shown, strict=True):
            if one.stability is not None:
                axes.text(
                    1.01,
                    float(place),
                    f"{100 * one.stability:.0f} %",
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    color=TEXT,
                )
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("score")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        add_legend(drawing, axes)
    return drawing.svg


def shift(found: SteeringCost) -> str:
    """Share of choices that steering changed, by layer; steered layers are marked."""
    layers = found.shift.layers
    if not layers:
        return ""
    steered = {one.layer for one in found.experts}
    places = np.arange(len(layers))
    most = max(100 * max(one.changed, one.total_variation) for one in layers)
    with drawing_of(HALF) as drawing:
        axes = drawing.figure.add_subplot()
        axes.bar(
            places,
            [100 * one.changed for one in layers],
            0.7,
            color=ACCENT,
            label="choices changed",
        )
        axes.hlines(
            [100 * one.total_variation for one in layers],
            places - 0.42,
            places + 0.42,
            color=TEXT,
            linewidth=1.8,
            label="load moved",
        )
        at = [n for n, one in enumerate(layers) if one.layer in steered]
        axes.plot(
            at,
            [0.0] * len(at),
            marker="^",
            markersize=8,
            linestyle="none",
            color=SECOND,
            clip_on=False,
            zorder=3,
            label="steered here",
        )
        stride = max(1, -(-len(layers) // 16))
        axes.set_xticks(places[::stride], [str(one.layer) for one in layers][::stride])
        axes.set_xlim(-0.6, max(len(layers), 4) - 0.4)
        axes.set_ylim(0, most * 1.1 or 1.0)
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.set_xlabel("layer")
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        add_legend(drawing, axes)
    return drawing.svg


def costs(found: SteeringCost) -> str:
    """Tokens/s, hit rate and bytes a token of each arm: medians as bars, rounds as dots."""
    panels: tuple[tuple[str, Callable[[CostRun], float | None], float, str], ...] = (
        ("tokens/s, decoding", lambda one: one.tokens_per_second, 1.0, "{:,.1f}"),
        ("hit rate, %", lambda one: one.hit_rate, 100.0, "{:.1f}"),
        ("KiB read a token", lambda one: one.bytes_per_token, 1 / 1024, "{:,.1f}"),
    )
    drawn = [
        panel for panel in panels if all(arm.median(panel[1]) is not None for arm in found.arms)
    ]
    if not drawn:
        return ""
    places = np.arange(len(found.arms))
    with drawing_of((FULL[0], 50 + 28 * len(found.arms))) as drawing:
        first: Axes | None = None
        for column, (title, figure, scale, form) in enumerate(drawn):
            axes = drawing.figure.add_subplot(1, len(drawn), column + 1, sharey=first)
            most = 0.0
            for place, arm in zip(places, found.arms, strict=True):
                value = scale * (arm.median(figure) or 0.0)
                rounds = [scale * (figure(one) or 0.0) for one in arm.rounds]
                plain = arm.name == "unsteered"
                axes.barh(place, value, 0.62, color=RULE if plain else ACCENT)
                axes.scatter(rounds, [place] * len(rounds), 7, color=TEXT, linewidths=0, zorder=3)
                most = max(most, *rounds)
            for place, arm in zip(places, found.arms, strict=True):
                value = scale * (arm.median(figure) or 0.0)
                end = max(scale * (figure(one) or 0.0) for one in arm.rounds)
                at = end + 0.03 * most
                axes.text(at, float(place), form.format(value), va="center", color=TEXT)
            axes.set_xlim(0, most * 1.32 or 1.0)
            axes.set_title(title, fontsize=11, color=TEXT, loc="left")
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            titles = [_ARM_TITLES[arm.name] for arm in found.arms]
            axes.set_yticks(places, titles if first is None else None)
            axes.tick_params(axis="y", labelleft=first is None)
            first = first or axes
        assert first is not None
        first.invert_yaxis()
    return drawing.svg
