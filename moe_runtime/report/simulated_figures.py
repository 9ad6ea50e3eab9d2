"""The figures of a simulation's page.

Does not know the page around them. Every function gives "" where there is nothing to draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.report.drawing import (
    ACCENT,
    FULL,
    MUTED,
    OUTCOMES,
    PAGE,
    SECOND,
    TEXT,
    add_legend,
    drawing_of,
)
from moe_runtime.report.predicted_words import FATES
from moe_runtime.report.simulated import Simulated
from moe_runtime.report.simulated_words import ranked, ratio
from moe_runtime.report.summary import rate, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bytes_and_speed", "outcomes"]

# What each role is called and how its bar looks; hatching tells them apart in grey too.
_ROLES: dict[str, tuple[str, dict[str, Any]]] = {
    "lru": ("plain LRU", {"facecolor": TEXT}),
    "ours": ("this runtime's own", {"facecolor": ACCENT}),
    "oracle": (
        "knows the run",
        {"facecolor": PAGE, "edgecolor": ACCENT, "hatch": "////"},
    ),
    "bound": ("Belady's bound on demand", {"facecolor": SECOND}),
    "": ("others", {"facecolor": MUTED, "alpha": 0.5}),
}
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def bytes_and_speed(found: Simulated) -> str:
    """Bytes read and simulated tokens/s of each contender, the fastest above."""
    rows = ranked(found)
    if not rows:
        return ""
    places = np.arange(len(rows))
    most = max(one.read for one in rows)
    scale, unit = next(pair for pair in _UNITS if most >= pair[0] or pair[0] == 1)
    with drawing_of((FULL[0], 96 + 24 * len(rows))) as drawing:
        left, right = drawing.figure.subplots(1, 2, sharey=True)
        for place, one in enumerate(rows):
            look = {"linewidth": 0.8, **_ROLES[one.role][1]}
            left.barh(place, (one.read - one.wasted) / scale, 0.66, **look)
            if one.wasted:
                useful = (one.read - one.wasted) / scale
                left.barh(place, one.wasted / scale, 0.66, useful, **_wasted())
            right.barh(place, one.tokens_per_second, 0.66, **look)
        _values(left, [one.read / scale for one in rows], [_read(one) for one in rows])
        speeds = [
            f"{rate(one.tokens_per_second)}  {ratio(one.speed_over_lru)}".rstrip() for one in rows
        ]
        _values(right, [one.tokens_per_second for one in rows], speeds)
        left.set_yticks(places, [one.title for one in rows])
        left.invert_yaxis()
        left.set_xlabel(f"{unit} read; times Belady's bound")
        right.set_xlabel("tokens/s predicted; times plain LRU's")
        dashed: dict[str, Any] = {"linewidth": 1, "linestyle": "--"}
        for one in found.of("bound")[:1]:
            left.axvline(one.read / scale, color=SECOND, **dashed)
        for one in found.of("lru")[:1]:
            right.axvline(one.tokens_per_second, color=TEXT, **dashed)
        _name_roles(drawing.figure, {one.role for one in rows}, any(one.wasted for one in rows))
    return drawing.svg


def _wasted() -> dict[str, Any]:
    return {"linewidth": 0.8, **OUTCOMES["late"]}


def _read(one: Any) -> str:
    return f"{size(one.read)}  {ratio(one.bytes_over_belady)}".rstrip()


def _values(axes: Axes, values: list[float], texts: list[str]) -> None:
    """Numbers at the ends of the bars, and room for them."""
    most = max(values) or 1.0
    behind = {"facecolor": PAGE, "edgecolor": "none", "pad": 1}  # no line goes through a number
    words: dict[str, Any] = {"va": "center", "color": TEXT, "fontsize": 10, "bbox": behind}
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.text(value + 0.015 * most, place, text, **words)
    axes.set_xlim(0, most * 1.42)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _name_roles(figure: Figure, roles: set[str], wasted: bool) -> None:
    from matplotlib.patches import Patch

    named = [(words, look) for role, (words, look) in _ROLES.items() if role in roles]
    named += [("read and never used", _wasted())] * wasted
    figure.legend(
        handles=[Patch(**{"linewidth": 0.8, **look}) for _, look in named],
        labels=[words for words, _ in named],
        loc="outside upper left",
        ncols=len(named),
        handlelength=1.2,
        columnspacing=1.4,
        borderaxespad=0,
    )


def outcomes(found: Simulated) -> str:
    """Each contender's uses by outcome, shares of 100 %, the fastest above."""
    rows = [one for one in ranked(found) if one.uses]
    if not rows:
        return ""
    uses = np.array([one.uses for one in rows], np.float64)
    with drawing_of((FULL[0], 84 + 24 * len(rows))) as drawing:
        axes = drawing.figure.add_subplot()
        foot = np.zeros(len(rows))
        for name, label in FATES.items():
            width = 100 * np.array([getattr(one, name) for one in rows]) / uses
            some = np.flatnonzero(width) if width.any() else np.arange(1)  # or its name is lost
            look = {"label": label, "linewidth": 0.8, **OUTCOMES[name]}
            axes.barh(some, width[some], 0.66, foot[some], **look)
            foot += width
        axes.set_yticks(range(len(rows)), [one.title for one in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        add_legend(drawing, axes)
    return drawing.svg
