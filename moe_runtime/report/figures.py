"""The figures of a report as inline SVG, coloured by the page's own variables.

Knows matplotlib; does not know the page around them. Every function gives None where the run has
nothing to draw.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.report.run import DECODE, PREFILL, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "bytes_over_time",
    "hit_rate_by_layer",
    "latency_over_time",
    "misses_over_time",
    "pinned_by_layer",
    "residency_over_time",
    "residency_share",
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
_TEXT, _MUTED, _RULE, _ACCENT, _SECOND, _PAGE = _INK
_HEAT = (0.16, 0.45, 0.74)  # the accent, as pixels; the share is its opacity
_HALF, _FULL = (440, 210), (920, 300)
_MOST_POINTS = 360
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe-runtime",
    "font.size": 11,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 11,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "text.color": _MUTED,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "image.interpolation": "none",
}


class _Drawing:
    """A figure in the making; `svg` is there once the `with` block is left."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""


@contextmanager
def _drawing(size: tuple[float, float]) -> Iterator[_Drawing]:
    """A new figure of `size` page pixels, outside pyplot's global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        figure.set_layout_engine("constrained", w_pad=2 / 72, h_pad=2 / 72)
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        drawing = _Drawing(figure)
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


def _bins(length: int) -> IntArray:
    """Starts of at most `_MOST_POINTS` runs of steps that are drawn as one point each."""
    return np.unique(np.linspace(0, length, min(length, _MOST_POINTS), endpoint=False).astype(int))


def _means(values: FloatArray | IntArray, starts: IntArray) -> FloatArray:
    sizes = np.diff(np.append(starts, len(values)))
    result: FloatArray = np.add.reduceat(values.astype(np.float64), starts) / sizes
    return result


def _step_axes(drawing: _Drawing) -> Axes:
    axes: Axes = drawing.figure.add_subplot()
    axes.set_xlabel("step (forward call)")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.01)
    _whole_ticks(axes.xaxis)
    return axes


def _whole_ticks(axis: Axis) -> None:
    """Label whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


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
            color=_SECOND,
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


def _legend(drawing: _Drawing, axes: Axes) -> None:
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


def hit_rate_by_layer(run: Run) -> str | None:
    """Hit rate of each MoE layer as bars, the rate of the whole run as a line."""
    rated = [layer for layer in run.layers if layer.hit_rate is not None]
    overall = run.counters.hit_rate
    if not rated or overall is None:
        return None
    with _drawing(_HALF) as drawing:
        axes = drawing.figure.add_subplot()
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        places = np.arange(len(rated))
        axes.bar(places, [100 * (layer.hit_rate or 0) for layer in rated], 0.7, color=_ACCENT)
        axes.axhline(100 * overall, color=_TEXT, linewidth=1, linestyle=(0, (4, 3)))
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
    with _drawing(_FULL) as drawing:
        axes = drawing.figure.add_subplot()
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        places = np.arange(len(layers))
        heights = [100 * (value or 0) for value in observed]
        axes.bar(places, heights, 0.7, color=_ACCENT, label="observed")
        known = [at for at, value in enumerate(predicted) if value is not None]
        marks = [100 * (predicted[at] or 0) for at in known]
        axes.hlines(
            marks,
            [at - 0.42 for at in known],
            [at + 0.42 for at in known],
            color=_TEXT,
            linewidth=1.8,
            label="predicted",
        )
        stride = max(1, -(-len(layers) // 32))
        axes.set_xticks(places[::stride], [str(layer.layer) for layer in layers][::stride])
        axes.set_xlim(-0.6, max(len(layers), 4) - 0.4)
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel("layer")
        _legend(drawing, axes)
    return drawing.svg


def misses_over_time(run: Run) -> str | None:
    """Misses and uses of each recorded step."""
    steps = run.steps
    if not steps.count:
        return None
    starts = _bins(steps.count)
    with _drawing(_HALF) as drawing:
        axes = _step_axes(drawing)
        uses = (steps.hits + steps.misses).astype(np.float64)
        _curve(axes, starts, _means(uses, starts), _RULE, "experts needed", fill=True)
        _curve(axes, starts, _means(steps.misses, starts), _ACCENT, "misses", fill=True)
        _fit_decode(axes, uses, run)
        _whole_ticks(axes.yaxis)
        _mark_prefill(axes, run)
        _legend(drawing, axes)
    return drawing.svg


def _curve(
    axes: Axes, at: IntArray, values: FloatArray, colour: str, label: str, *, fill: bool
) -> None:
    """A line over steps, filled down to 0; a single step is a dot."""
    if len(at) == 1:
        axes.plot(at, values, "o", color=colour, markersize=5, label=label)
        return
    if fill:
        alpha = 0.7 if colour == _RULE else 0.45
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
    with _drawing(_HALF) as drawing:
        axes = _step_axes(drawing)
        _curve(axes, ends, total[ends] / unit, _ACCENT, "bytes", fill=True)
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
    with _drawing(_HALF) as drawing:
        axes = _step_axes(drawing)
        _curve(axes, starts, _means(1e3 * steps.seconds, starts), _TEXT, "whole step", fill=False)
        stalls = _means(1e3 * steps.stall_seconds, starts)
        _curve(axes, starts, stalls, _ACCENT, "waiting for experts", fill=True)
        axes.set_ylabel("ms")
        _fit_decode(axes, 1e3 * steps.seconds, run)
        _mark_prefill(axes, run)
        _legend(drawing, axes)
    return drawing.svg


def _heat(axes: Axes, shares: FloatArray) -> None:
    """A matrix of shares 0 to 1 (NaN: no such cell) as opacity of one colour."""
    pixels = np.empty((*shares.shape, 4))
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.nan_to_num(shares, nan=0.0)
    axes.imshow(pixels, aspect="auto", interpolation="none", origin="upper")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(True)


def _layer_ticks(axes: Axes, layers: tuple[int, ...]) -> None:
    stride = max(1, -(-len(layers) // 12))
    axes.set_yticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
    axes.set_ylabel("layer")


def _heat_size(layers: int) -> tuple[float, float]:
    """A height that gives few layers thick rows and many layers a row of some pixels."""
    return _FULL[0], 90 + min(max(22 * layers, 60), 420)


def residency_share(run: Run) -> str | None:
    """Layers by experts: the share of the snapshots in which each expert was held."""
    if run.residency is None or not run.grid.size:
        return None
    held = run.residency.held.mean(axis=0)
    shares = np.full((len(run.grid.layers), max(run.grid.experts)), np.nan)
    for at, (offset, experts) in enumerate(zip(run.grid.offsets, run.grid.experts, strict=True)):
        shares[at, :experts] = held[offset : offset + experts]
    with _drawing(_heat_size(len(shares))) as drawing:
        axes = drawing.figure.add_subplot()
        _heat(axes, shares)
        _layer_ticks(axes, run.grid.layers)
        _whole_ticks(axes.xaxis)
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
    with _drawing(_heat_size(len(shares))) as drawing:
        axes = drawing.figure.add_subplot()
        _heat(axes, shares / most)
        _layer_ticks(axes, run.grid.layers)
        stride = max(1, -(-len(numbers) // 12))
        axes.set_xticks(range(0, len(numbers), stride), [f"{n:,}" for n in numbers[::stride]])
        axes.set_xlabel("step (forward call)")
    return drawing.svg, most
