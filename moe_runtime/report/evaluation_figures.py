"""The figures of an evaluation's page.

Does not know the page around them. Every function gives "" where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.core import FloatArray
from moe_runtime.report import evaluation_facts as facts
from moe_runtime.report.drawing import (
    ACCENT,
    FULL,
    HALF,
    LINES,
    MUTED,
    PAGE,
    SECOND,
    TEXT,
    add_legend,
    drawing_of,
)
from moe_runtime.report.summary import NONE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_runtime.predictors.evaluation import Evaluation, Score

__all__ = [
    "DRAWN_DOMAINS",
    "DRAWN_PREDICTORS",
    "LEAST_IN_BIN",
    "by_ahead",
    "by_batch",
    "by_layer",
    "by_predictor",
    "cost",
    "entropy",
    "reliability",
]

LEAST_IN_BIN = 20  # forecasts that a point of the reliability curve stands for
DRAWN_PREDICTORS, DRAWN_DOMAINS = len(LINES), 3  # curves in a panel, panels beside each other
_BARS: tuple[dict[str, Any], ...] = (
    {"facecolor": ACCENT},
    {"facecolor": PAGE, "edgecolor": SECOND, "hatch": "////"},
    {"facecolor": PAGE, "edgecolor": TEXT, "hatch": "...."},
    {"facecolor": MUTED},
)


def by_predictor(found: Evaluation) -> str:
    """Recall and precision at k and 2k: a panel each, a bar for each predictor and domain."""
    return _bars(
        found,
        {column: f"{title}, %" for column, title in facts.COLUMNS.items()},
        {column: 100 * _means(found, column) for column in facts.COLUMNS},
        dict.fromkeys(facts.COLUMNS, "{:.1f}"),
    )


def cost(found: Evaluation) -> str:
    """Microseconds a token of each predictor, and its calibration error."""
    titles = {
        "microseconds": "µs a token, all layers",
        "calibration_error_top": "calibration error, 2k likeliest",
        "calibration_error": "calibration error, all experts",
    }
    forms = dict(zip(titles, ("{:,.0f}", "{:.3f}", "{:.4f}"), strict=True))
    values, names = {}, facts.predictors(found)
    for field in titles:
        table = [
            [getattr(facts.figures_of(found, name, domain.name), field, None) for name in names]
            for domain in found.domains
        ]
        values[field] = np.array(table, np.float64)
    return _bars(found, titles, values, forms)


def _means(found: Evaluation, column: str) -> FloatArray:
    """float64 `[domains, predictors]`; NaN where there is nothing."""
    names = facts.predictors(found)
    rows = [
        [facts.mean_of(facts.score_of(found, name, domain.name), column) for name in names]
        for domain in found.domains
    ]
    return np.array(rows, np.float64)


def _bars(
    found: Evaluation,
    titles: Mapping[str, str],
    values: Mapping[str, FloatArray],
    forms: Mapping[str, str],
) -> str:
    """A panel for each of `titles` that has a number; predictors below each other."""
    panels = [name for name in titles if np.isfinite(values[name]).any()]
    names = facts.predictors(found)
    if not panels or not names:
        return ""
    count = len(found.domains)
    height = 0.8 / count
    places: FloatArray = np.arange(len(names), dtype=np.float64)
    with drawing_of((FULL[0], 64 + len(names) * (12 + 13 * count))) as drawing:
        first: Axes | None = None
        for column, name in enumerate(panels):
            axes = drawing.figure.add_subplot(1, len(panels), column + 1, sharey=first)
            most = float(np.nanmax(values[name])) or 1.0
            for number, domain in enumerate(found.domains):
                row = values[name][number]
                at = places + height * (number - (count - 1) / 2)
                look = _BARS[number % len(_BARS)]
                axes.barh(
                    at, np.nan_to_num(row), height * 0.86, label=domain.name, linewidth=0.8, **look
                )
                for place, one in zip(at, row, strict=True):
                    text = forms[name].format(one) if np.isfinite(one) else NONE
                    start = (one if np.isfinite(one) else 0.0) + 0.02 * most
                    axes.text(start, float(place), text, va="center", color=TEXT, fontsize=9)
            axes.set_xlim(0, most * 1.3)
            axes.set_title(titles[name], fontsize=11, color=TEXT, loc="left")
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_yticks(places, names if first is None else None)
            axes.tick_params(axis="y", labelleft=first is None)
            first = first or axes
        assert first is not None
        first.invert_yaxis()
        add_legend(drawing, first)
    return drawing.svg


def _percent_axis(axes: Axes, side: str = "y") -> None:
    getattr(axes, f"set_{side}lim")(0, 102)
    words = ["0", "25", "50", "75", "100 %"]
    getattr(axes, f"set_{side}ticks")([0, 25, 50, 75, 100], words)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def _curve(axes: Axes, number: int, x: Any, y: Any, label: str) -> None:
    colour, line, marker = LINES[number % len(LINES)]
    axes.plot(
        x, y, color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.4, label=label
    )


def _panels(
    titles: Sequence[str],
    names: Sequence[str],
    draw: Callable[[Axes, int, str, str], None],
    height: float = 250,
) -> str:
    """Panels beside each other with a percentage axis; `draw(axes, number, name, title)`."""
    if not names or not titles:
        return ""
    drawn = False
    with drawing_of((FULL[0], height)) as drawing:
        first: Axes | None = None
        for column, title in enumerate(titles):
            axes = drawing.figure.add_subplot(1, len(titles), column + 1, sharey=first)
            axes.set_title(title, fontsize=11, color=TEXT, loc="left")
            _percent_axis(axes)
            for number, name in enumerate(names):
                draw(axes, number, name, title)
            axes.tick_params(axis="y", labelleft=first is None)
            drawn = drawn or bool(axes.lines)
            first = first or axes
        assert first is not None
        add_legend(drawing, first)
    return drawing.svg if drawn else ""


def _shown(found: Evaluation) -> tuple[list[str], list[str]]:
    """Domains and predictors that curves are drawn of."""
    domains = [one.name for one in found.domains[:DRAWN_DOMAINS]]
    return domains, facts.predictors(found)[:DRAWN_PREDICTORS]


def _hundred(values: Sequence[float | None]) -> FloatArray:
    return 100 * np.array(values, np.float64)


def by_layer(found: Evaluation) -> str:
    """Recall at 2k of each layer, next layer, a panel for each domain."""
    domains, names = _shown(found)
    if len(found.layer_ids) < 2:
        return ""
    stride = max(1, -(-len(found.layer_ids) // 12))

    def draw(axes: Axes, number: int, name: str, domain: str) -> None:
        score = facts.score_of(found, name, domain)
        axes.set_xticks(
            range(0, len(found.layer_ids), stride), [str(one) for one in found.layer_ids[::stride]]
        )
        axes.set_xlabel("layer")
        if score is not None:
            _curve(axes, number, range(len(found.layer_ids)), _hundred(score.recall_2k), name)

    return _panels(domains, names, draw)


def by_ahead(found: Evaluation) -> str:
    """Recall at 2k by layers ahead, a panel for each domain; means over the layers."""
    domains, names = _shown(found)
    ahead = facts.distances(found)
    if len(ahead) < 2:
        return ""

    def draw(axes: Axes, number: int, name: str, domain: str) -> None:
        means = [
            facts.mean_of(facts.score_of(found, name, domain, distance=at), "recall_2k")
            for at in ahead
        ]
        axes.set_xticks(ahead)
        axes.set_xlabel("layers ahead")
        if any(value is not None for value in means):
            _curve(axes, number, ahead, _hundred(means), name)

    return _panels(domains, names, draw)


def by_batch(found: Evaluation) -> str:
    """Recall and precision at k by batch size in the first domain, beside knowing nothing."""
    names = facts.predictors(found)[:DRAWN_PREDICTORS]
    domain = found.domains[0].name if found.domains else ""
    sizes = [
        size
        for size in facts.batch_sizes(found)
        if any(facts.score_of(found, name, domain, batch_size=size) for name in names)
    ]
    if len(sizes) < 2:
        return ""
    places = range(len(sizes))

    def scores(name: str) -> list[Score | None]:
        return [facts.score_of(found, name, domain, batch_size=size) for size in sizes]

    def draw(axes: Axes, number: int, name: str, title: str) -> None:
        column = next(one for one, words in facts.COLUMNS.items() if words == title)
        means = [facts.mean_of(score, column) for score in scores(name)]
        axes.set_xticks(places, [str(size) for size in sizes])
        axes.set_xlabel("sequences in a batch")
        if any(value is not None for value in means):
            _curve(axes, number, places, _hundred(means), name)
        if title.startswith("precision") and number == len(names) - 1:
            needed = [facts.needed_share(found, score) for score in scores(names[0])]
            axes.plot(places, _hundred(needed), color=MUTED, linewidth=5, alpha=0.35, zorder=0)

    return _panels([facts.COLUMNS["recall_k"], facts.COLUMNS["precision_k"]], names, draw)


def reliability(found: Evaluation) -> str:
    """What was said against what came true, a panel for each domain; larger: more forecasts."""
    domains, names = _shown(found)

    def draw(axes: Axes, number: int, name: str, domain: str) -> None:
        if not number:
            axes.plot([0, 100], [0, 100], color=MUTED, linewidth=5, alpha=0.35, zorder=0)
            _percent_axis(axes, "x")
            axes.set_xlabel("probability forecast")
        one = facts.figures_of(found, name, domain)
        if one is None or not one.said:
            return
        colour, line, marker = LINES[number % len(LINES)]
        kept = np.array(one.count) >= LEAST_IN_BIN
        if not kept.any():
            return
        said, true = _hundred(one.said)[kept], _hundred(one.came_true)[kept]
        # The root shows bins of few forecasts beside that of all the unlikely experts.
        sizes = 5 + 45 * np.sqrt(np.array(one.count, np.float64)[kept] / max(one.count))
        axes.plot(said, true, color=colour, linestyle=line, linewidth=1.0)
        axes.scatter(said, true, sizes, color=colour, marker=marker, linewidths=0, label=name)

    return _panels(domains, names, draw, 300)


def entropy(found: Evaluation) -> str:
    """Evenness of routing by layer, a curve for each domain."""
    layers = found.layer_ids
    if not found.domains or len(layers) < 2:
        return ""
    stride = max(1, -(-len(layers) // 12))
    with drawing_of(HALF) as drawing:
        axes = drawing.figure.add_subplot()
        for number, domain in enumerate(found.domains[: len(LINES)]):
            _curve(axes, number, range(len(layers)), domain.entropy, domain.name)
        axes.set_xticks(range(0, len(layers), stride), [str(one) for one in layers[::stride]])
        least = min(value for domain in found.domains for value in domain.entropy)
        axes.set_ylim(min(0.5, least) - 0.02, 1.02)
        axes.set_xlabel("layer")
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        add_legend(drawing, axes)
    return drawing.svg
