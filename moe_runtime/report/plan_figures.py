"""The figures of a plan's page.

Does not know the page around them. Every function gives "" where there is nothing to draw.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.core import FloatArray
from moe_runtime.placement.plan import Plan
from moe_runtime.report.drawing import (
    ACCENT,
    FULL,
    MUTED,
    TEXT,
    drawing_of,
    heat_map,
    heat_size,
    layer_ticks,
    whole_ticks,
)
from moe_runtime.report.plan_facts import comparison, section, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["affinity_maps", "flow_maps", "loads", "picture", "rivals"]

_MOST_NAMED = 16  # devices that a legend names one by one
_BARS = {
    "crossing": "pairs that cross devices, %",
    "distinct_devices": "devices a token and layer",
    "load": "highest load over the mean",
}


def _device_colours(devices: int) -> FloatArray:
    """float64 `[G, 3]`: hues around the circle, every second one lighter, for light and dark."""
    return np.array(
        [
            colorsys.hls_to_rgb((0.58 + at / devices) % 1.0, 0.46 + 0.16 * (at % 2), 0.45)
            for at in range(devices)
        ]
    )


def picture(plan: Plan) -> str:
    """Layers by experts, each coloured by its device; a replicated expert by all of its own."""
    colours = _device_colours(plan.devices)
    fine = max(max(map(len, layer.hosts)) for layer in plan.layers)
    pixels = np.zeros((len(plan.layers), max(plan.experts) * fine, 4))
    for row, layer in enumerate(plan.layers):
        for expert, hosts in enumerate(layer.hosts):
            for part in range(fine):
                host = hosts[part * len(hosts) // fine]
                shown = 1.0 if layer.tiers[expert] == "device" else 0.25
                pixels[row, expert * fine + part] = (*colours[host], shown)
    width, height = heat_size(len(plan.layers))
    with drawing_of((width, height + 26)) as drawing:
        axes = drawing.figure.add_subplot()
        axes.imshow(
            pixels,
            aspect="auto",
            interpolation="none",
            origin="upper",
            extent=(-0.5, max(plan.experts) - 0.5, len(plan.layers) - 0.5, -0.5),
        )
        layer_ticks(axes, plan.layer_ids)
        whole_ticks(axes.xaxis)
        axes.set_xlabel("expert")
        if 1 < plan.devices <= _MOST_NAMED:
            _name_devices(drawing.figure, colours)
    return drawing.svg


def _name_devices(figure: Any, colours: FloatArray) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=tuple(colour)) for colour in colours],
        labels=[str(device) for device in range(len(colours))],
        title="device",
        title_fontsize=11,
        alignment="left",
        loc="outside upper left",
        ncols=len(colours),
        handlelength=1.0,
        columnspacing=1.2,
        borderaxespad=0,
    )


def loads(plan: Plan) -> tuple[str, float]:
    """Layers by devices: each device's load over the mean; the second value is the full colour's.

    Devices of very large plans are shown in blocks.
    """
    blocks = section(plan.metrics, "blocks")
    sizes = np.asarray(blocks.get("devices_a_block") or [1], dtype=np.float64)
    values = _numbers(blocks.get("load"), (len(plan.layers), len(sizes)))
    if values is None or values.shape[1] < 2:
        return "", 0.0
    over = values * sizes.sum() / sizes
    most = max(2.0, float(over.max()))  # an even load is half the colour at most
    with drawing_of(heat_size(len(over))) as drawing:
        axes = drawing.figure.add_subplot()
        heat_map(axes, over / most)
        layer_ticks(axes, plan.layer_ids)
        whole_ticks(axes.xaxis)
        axes.set_xlabel("device" if sizes.max() == 1 else "block of devices")
        if len(plan.layers) <= 32 and len(sizes) <= 16:
            for row, column in np.ndindex(*over.shape):
                axes.text(
                    column,
                    row,
                    f"{over[row, column]:.2f}",
                    ha="center",
                    va="center",
                    color=TEXT,
                    fontsize=10,
                )
    return drawing.svg, most


def flow_maps(plan: Plan) -> str:
    """Devices by devices for the first, middle and last pair of layers: where tokens go on."""
    blocks = section(plan.metrics, "blocks")
    flows = blocks.get("flows")
    sizes = blocks.get("devices_a_block") or []
    if not isinstance(flows, list) or len(flows) != len(plan.layers) - 1 or len(sizes) < 2:
        return ""
    shown = chosen_pairs(len(flows))
    maps = [_numbers(flows[at], (len(sizes), len(sizes))) for at in shown]
    if any(one is None for one in maps):
        return ""
    with drawing_of((FULL[0], 330)) as drawing:
        for place, (at, one) in enumerate(zip(shown, maps, strict=True)):
            assert one is not None
            axes = drawing.figure.add_subplot(1, len(shown), place + 1)
            # Rows as shares of what sets out from the device.
            _square(axes, one / np.maximum(one.sum(1, keepdims=True), 1e-12), plan, at)
            axes.set_ylabel(f"device of layer {plan.layer_ids[at]}")
            axes.set_xlabel(f"device of layer {plan.layer_ids[at + 1]}")
            whole_ticks(axes.xaxis)
            whole_ticks(axes.yaxis)
    return drawing.svg


def affinity_maps(plan: Plan, transitions: Sequence[FloatArray]) -> str:
    """Experts by experts, ordered by their numbers above and by their devices below.

    Args:
        transitions: for each pair of consecutive MoE layers float64 `[E, E']`, pairs of experts.
    """
    if not transitions:
        return ""
    shown = chosen_pairs(len(transitions))
    orders = [
        np.argsort([hosts[0] for hosts in layer.hosts], kind="stable") for layer in plan.layers
    ]
    with drawing_of((FULL[0], 620)) as drawing:
        for place, at in enumerate(shown):
            hop = transitions[at]
            share = hop / np.maximum(hop.sum(1, keepdims=True), 1e-12)
            # The root shows the many small cells beside the few large ones.
            share = np.sqrt(share / (share.max() or 1.0))
            planned = share[orders[at]][:, orders[at + 1]]
            for row, (matrix, words) in enumerate(
                ((share, "by expert number"), (planned, "by device"))
            ):
                axes = drawing.figure.add_subplot(2, len(shown), row * len(shown) + place + 1)
                _square(axes, matrix, plan, at)
                axes.set_xlabel(words)
                axes.set_xticks([])
                axes.set_yticks([])
                if row:
                    _edges(axes, plan, at, orders)
    return drawing.svg


def _edges(axes: Axes, plan: Plan, at: int, orders: Sequence[np.ndarray]) -> None:
    """Lines between the devices' blocks."""
    for layer, line in ((at, axes.axhline), (at + 1, axes.axvline)):
        first = np.array([plan.layers[layer].hosts[expert][0] for expert in orders[layer]])
        for edge in np.flatnonzero(np.diff(first)):
            line(edge + 0.5, color=MUTED, linewidth=0.6)


def _square(axes: Axes, shares: FloatArray, plan: Plan, at: int) -> None:
    heat_map(axes, shares)
    axes.set_aspect("equal" if shares.shape[0] == shares.shape[1] else "auto")
    axes.set_title(f"{plan.layer_ids[at]} → {plan.layer_ids[at + 1]}", fontsize=11, color=TEXT)


def rivals(plan: Plan) -> str:
    """Bars of the plan and its rivals, training tokens above held-out ones."""
    rows = comparison(plan)
    held = bool(section(plan.metrics, "held_out"))
    kinds = ("train", "held_out") if held else ("train",)
    measures = [name for name in _BARS if value_of(rows[0][1].get("train"), name) is not None]
    if not measures or len(rows) < 2:
        return ""
    places: FloatArray = np.arange(len(rows), dtype=np.float64)[::-1]
    with drawing_of((FULL[0], 74 + 40 * len(rows))) as drawing:
        first: Axes | None = None
        for column, measure in enumerate(measures):
            axes = drawing.figure.add_subplot(1, len(measures), column + 1, sharey=first)
            for number, kind in enumerate(kinds):
                at: FloatArray = places + (0.19 * (1 - 2 * number) if held else 0.0)
                _bars(axes, at, [row.get(kind) for _, row in rows], measure, kind)
            axes.set_title(_BARS[measure], fontsize=11, color=TEXT, loc="left")
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_yticks(places, [name for name, _ in rows] if first is None else None)
            axes.tick_params(axis="y", labelleft=first is None)
            first = first or axes
        assert first is not None
        handles, labels = first.get_legend_handles_labels()
        drawing.figure.legend(
            handles, labels, loc="outside lower left", ncols=2, handlelength=1.2, borderaxespad=0
        )
    return drawing.svg


def _bars(axes: Axes, places: FloatArray, measured: Sequence[Any], measure: str, kind: str) -> None:
    scale = 100 if measure == "crossing" else 1
    values = [(value_of(one, measure) or 0.0) * scale for one in measured]
    colour, alpha = (MUTED, 0.45) if kind == "train" else (ACCENT, 1.0)
    words = "training tokens" if kind == "train" else "held-out tokens"
    axes.barh(places, values, 0.36, label=words, color=colour, alpha=alpha)
    most = max((*values, axes.get_xlim()[1] / 1.2))
    axes.set_xlim(0, most * 1.2)
    for place, value in zip(places, values, strict=True):
        axes.text(
            value + 0.015 * most,
            float(place),
            f"{value:.1f}" if scale == 100 else f"{value:.2f}",
            va="center",
            color=MUTED if kind == "train" else TEXT,
            fontsize=10,
        )


def chosen_pairs(count: int) -> list[int]:
    """The first, the middle and the last of so many."""
    return sorted({0, count // 2, count - 1})


def _numbers(data: Any, shape: tuple[int, ...]) -> FloatArray | None:
    """Plain lists as an array, if they have this shape; a plan file may hold anything there."""
    try:
        values = np.asarray(data, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return values if values.shape == shape and np.isfinite(values).all() else None
