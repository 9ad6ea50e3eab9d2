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

_BLANK = "#e9e9e6"  # experts without a score
_MARK = "#111111"


def save_picture(found: Identification, path: str | os.PathLike[str]) -> Path:
    """Write the heat map, whole or not at all; gives its path.

    Red experts go with the markers of positive coefficient, blue ones with the others; grey ones
    have too few events for a score. The chosen ones are ringed and named.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = found.score_map()
    layers, experts = scores.shape
    most = float(np.nanmax(np.abs(scores))) if np.isfinite(scores).any() else 1.0
    colours = mpl.colormaps["RdBu_r"].copy()
    colours.set_bad(_BLANK)
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
        at = found.layer_ids.index(layer)
        axes.plot(
            expert, at, "o", markersize=11, markerfacecolor="none", markeredgecolor=_MARK,
            markeredgewidth=1.6,
        )  # fmt: skip
        left = expert > 0.85 * experts
        axes.annotate(
            f"{rank}: layer {layer} expert {expert}",
            (expert, at),
            xytext=(-9 if left else 9, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"},
        )
    stride = max(1, -(-layers // 24))
    axes.set_yticks(range(0, layers, stride), [str(one) for one in found.layer_ids[::stride]])
    axes.set_ylabel("layer")
    axes.set_xlabel("expert")
    words = " ".join(
        f"{'+' if one.coefficient > 0 else '-'} {abs(one.coefficient):g} nPMI({one.text})"
        for one in found.tokens
    ).removeprefix("+ ")
    axes.set_title(
        f"{words}\n{found.rows:,} rows of {found.sequences:,} sequences", fontsize=10, loc="left"
    )
    figure.colorbar(image, ax=axes, label="score", pad=0.01)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return Path(path)
