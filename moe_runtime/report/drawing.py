"""Drawings as inline SVG in the page's own colours: size, style, ticks, legends, heat maps.

Knows matplotlib; does not know what is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.core import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "FULL",
    "HALF",
    "LINES",
    "MUTED",
    "OUTCOMES",
    "PAGE",
    "RULE",
    "SECOND",
    "TEXT",
    "Drawing",
    "add_legend",
    "drawing_of",
    "heat_map",
    "heat_size",
    "layer_ticks",
    "whole_ticks",
]

# Colours are drawn as these and written as the page's variables, so that one drawing serves light
# and dark.
_INK = {
    "#010a01": "var(--text)",
    "#010a02": "var(--muted)",
    "#010a03": "var(--rule)",
    "#010a04": "var(--accent)",
    "#010a05": "var(--second)",
    "#010a06": "var(--page)",
}
TEXT, MUTED, RULE, ACCENT, SECOND, PAGE = _INK
_HEAT = (0.16, 0.45, 0.74)  # the accent, as pixels; the share is its opacity
HALF, FULL = (440, 210), (920, 300)
# Curves: colour, line and marker. Bars of what became of an expert that was needed: colour and
# hatching, so that the parts are told apart in black and white too.
LINES: tuple[tuple[str, str, str], ...] = (
    *((ACCENT, "-", "o"), (SECOND, "--", "s"), (TEXT, "-.", "^"), (MUTED, ":", "D")),
    *((ACCENT, ":", "v"), (SECOND, "-", "P")),
)
OUTCOMES: dict[str, dict[str, Any]] = {
    "resident": {"facecolor": ACCENT},
    "in_time": {"facecolor": PAGE, "edgecolor": ACCENT, "hatch": "////"},
    "late": {"facecolor": PAGE, "edgecolor": SECOND, "hatch": "...."},
    "missed": {"facecolor": PAGE, "edgecolor": TEXT},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe-runtime",
    "font.size": 11,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": MUTED,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "image.interpolation": "none",
}


class Drawing:
    """A figure in the making; `svg` is there once the `with` block is left."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""


@contextmanager
def drawing_of(size: tuple[float, float]) -> Iterator[Drawing]:
    """A new figure of `size` page pixels, outside pyplot's global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        figure.set_layout_engine("constrained", w_pad=2 / 72, h_pad=2 / 72)
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        drawing = Drawing(figure)
        yield drawing
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    drawing.svg = _inline(stream.getvalue(), size)


def _inline(document: str, size: tuple[float, float]) -> str:
    """An SVG document as an element of a page."""
    text = document[document.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    attributes = f'viewBox="0 0 {size[0]:g} {size[1]:g}" style="max-width:{size[0]:g}px"'
    opening = f'<svg class="figure" {attributes} aria-hidden="true">'
    text = re.sub(r"<svg[^>]*>", opening, text, count=1)
    for colour, variable in _INK.items():
        text = text.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", text).strip()


def add_legend(drawing: Drawing, axes: Axes) -> None:
    """Name the curves above the drawing, where there are several."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        drawing.figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=len(labels),
            handlelength=1.2,
            columnspacing=1.4,
            borderaxespad=0,
        )


def whole_ticks(axis: Axis) -> None:
    """Label whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


def heat_map(axes: Axes, shares: FloatArray) -> None:
    """A matrix of shares 0 to 1 (NaN: no such cell) as opacity of one colour."""
    pixels = np.empty((*shares.shape, 4))
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.nan_to_num(shares, nan=0.0)
    axes.imshow(pixels, aspect="auto", interpolation="none", origin="upper")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(True)


def layer_ticks(axes: Axes, layers: tuple[int, ...]) -> None:
    """Label the rows of a heat map by absolute layer index, twelve at most."""
    stride = max(1, -(-len(layers) // 12))
    axes.set_yticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
    axes.set_ylabel("layer")


def heat_size(layers: int) -> tuple[float, float]:
    """A height that gives few layers thick rows and many layers a row of some pixels."""
    return FULL[0], 90 + min(max(22 * layers, 60), 420)
