"""What a placement sends from device to device, and which load it gives each: small enough to keep.

Measures; knows neither how a placement was found nor how it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from moe_runtime.placement.affinity import Affinity
from moe_runtime.placement.cost import replica_shares
from moe_runtime.placement.plan import BoolArray

from moe_runtime.core import FloatArray

__all__ = ["device_flows", "device_loads", "flow_summary"]

_MOST_BLOCKS = 32  # devices of a larger placement are put together, neighbours first


def device_flows(placement: Sequence[BoolArray], affinity: Affinity) -> list[FloatArray]:
    """For each pair of consecutive MoE layers float64 `[G, G]`, the share of its expert pairs that
    go from one device to another; sums to 1, or to 0 where there are no pairs.

    A token uses each replica of an expert equally often, and stays on a device where it can.
    """
    flows = []
    for at, hop in enumerate(affinity.hops[0] if affinity.hops else ()):
        first, second = placement[at], placement[at + 1]
        shares = replica_shares(first)
        stays = second.astype(np.float64)
        spread = replica_shares(second)
        leaving = shares.T @ hop  # [G, E']: pairs that set out from each device
        flow = (leaving * (1.0 - stays).T) @ spread
        # Where the device holds the next expert too, the pair stays.
        np.fill_diagonal(flow, (leaving * stays.T).sum(1))
        total = flow.sum()
        flows.append(flow / total if total > 0 else flow)
    return flows


def device_loads(placement: Sequence[BoolArray], affinity: Affinity) -> FloatArray:
    """float64 `[L, G]`: each device's share of the layer's load; 0 where the layer has none."""
    rows = []
    for held, uses in zip(placement, affinity.load, strict=True):
        total = uses.sum()
        loads = uses @ replica_shares(held)
        rows.append(loads / total if total > 0 else loads)
    return np.asarray(rows)


def flow_summary(
    placement: Sequence[BoolArray], affinity: Affinity, measured_on: str
) -> dict[str, Any]:
    """Both as plain data for a plan's `metrics["blocks"]`; `docs/formats.md` lists the fields.

    Args:
        measured_on: `"train"` or `"held_out"`: which tokens these are.
    """
    devices = placement[0].shape[1]
    block = np.arange(devices) * min(devices, _MOST_BLOCKS) // devices
    gather = (block[:, None] == np.arange(block[-1] + 1)).astype(np.float64)
    return {
        "measured_on": measured_on,
        "devices_a_block": np.bincount(block).tolist(),
        "load": np.round(device_loads(placement, affinity) @ gather, 5).tolist(),
        "flows": [
            np.round(gather.T @ flow @ gather, 5).tolist()
            for flow in device_flows(placement, affinity)
        ],
    }
