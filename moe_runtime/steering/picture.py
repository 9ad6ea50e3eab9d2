"""The picture of an identification: scores of all experts, layers x experts, as a PNG file.

Knows matplotlib; does not know how scores come about.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from moe_runtime.files import replacing
from moe_runtime.steering.identification import Identification

__all__ = ["save_picture"]

_BLANK = "#c6c6c0"  # experts without a score
_MARK = "#111111"
_NAMED = 5  # experts named in the title, at most


def save_picture(found: Identification, path: str | os.PathLike[str]) -> Path:
    """Write the heat map, whole or not at all; gives its path.

    Red experts go with the markers of positive coefficient, blue ones with the others; grey ones
    have too few events for a score. The chosen ones are ringed, with their rank.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    scores = found.score_map()
    layers = len(scores)
    most = float(np.nanmax(np.abs(scores))) if np.isfinite(scores).any() else 1.0
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad=_BLANK)
    height = min(max(2.4, 1.7 + 0.16 * layers), 14.0)
    figure = Figure(figsize=(11.0, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        np.ma.masked_invalid(scores),
        cmap=colours,
        vmin=-most or -1.0,
        vmax=most or 1.0,
        aspect="auto",
        interpolation="none",
    )
    for rank, (layer, expert) in enumerate(found.chosen, 1):
        place = (expert, found.layer_ids.index(layer))
        for colour, width in (("white", 3.2), (_MARK, 1.4)):  # seen on light and dark
            axes.plot(
                *place, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour,
                markeredgewidth=width,
            )  # fmt: skip
        label = axes.annotate(
            str(rank), place, xytext=(7, 6), textcoords="offset points", fontsize=9, color=_MARK
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    stride = max(1, -(-layers // 24))
    axes.set_yticks(range(0, layers, stride), [str(one) for one in found.layer_ids[::stride]])
    axes.set_ylabel("layer")
    axes.set_xlabel("expert")
    axes.set_title(_title(found), fontsize=9, loc="left")
    figure.colorbar(image, ax=axes, label="score", pad=0.01)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return Path(path)


def _title(found: Identification) -> str:
    """What is drawn, of what, and which experts are ringed."""
    words = " ".join(
        f"{'+' if one.coefficient > 0 else '-'} "
        f"{'' if abs(one.coefficient) == 1 else f'{abs(one.coefficient):g} '}nPMI({one.text})"
        for one in found.tokens
    ).removeprefix("+ ")
    named = [
        f"{rank}: layer {layer} expert {expert}"
        for rank, (layer, expert) in enumerate(found.chosen[:_NAMED], 1)
    ]
    named += ["..."] * (len(found.chosen) > _NAMED)
    return (
        f"{words}   ({found.rows:,} rows of {found.sequences:,} sequences; grey: too few events)\n"
        + "   ".join(named)
    )
