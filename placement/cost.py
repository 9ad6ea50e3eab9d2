"""What a placement costs on given tokens: crossings, distinct devices, load, communication.

Measures; knows nothing of how a placement was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from moe_runtime.placement.affinity import Affinity, affinity_of
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.replicas import imbalance
from moe_runtime.placement.topology import Topology

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["Metrics", "crossing_of", "load_of", "measure", "replica_shares"]

_CHUNK_CELLS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """A placement's costs on some tokens. None where the recording cannot say.

    With replicas a token uses each replica of an expert equally often, and goes on to a replica of
    its next expert on the same device if there is one.

    Args:
        tokens: tokens measured on; 0 if unknown.
        crossing: share of consecutive-layer expert pairs on different devices, 0 to 1.
        node_crossing: the same for nodes.
        distinct_devices: mean devices that a token needs in a layer, 1 to top-k.
        load: highest load of a device over its share, mean of the layers; 1 is even.
        load_worst: the same of the worst layer.
        hop_cost: expected cost over the topology from a token's expert in each layer to that in
            the next, summed over layers (tokens that stay where their expert is).
        dispatch_cost: expected cost to reach all devices that a token needs from its home device
            and back, summed over layers, homes even (tokens that return home after each layer).
    """

    tokens: int
    crossing: float | None
    node_crossing: float | None
    distinct_devices: float | None
    load: float
    load_worst: float
    hop_cost: float | None
    dispatch_cost: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure(
    placement: Sequence[BoolArray],
    topology: Topology,
    recording: RoutingTrace | RoutingCounts,
    affinity: Affinity | None = None,
) -> Metrics:
    """The costs of a placement on a recording.

    Args:
        placement: for each MoE layer bool `[E, G]`, whether the device holds the expert.
        affinity: `affinity_of(recording)`, if it is at hand.

    Raises:
        PlanError: layers or experts that differ.
    """
    counts = affinity if affinity is not None else affinity_of(recording, within=False)
    for layer, experts, held in zip(counts.layer_ids, counts.experts, placement, strict=True):
        if held.shape != (experts, topology.devices):
            raise PlanError(
                f"layer {layer}: the placement is {held.shape[0]} experts x {held.shape[1]} "
                f"devices, the recording has {experts} and the topology {topology.devices}"
            )
    load = np.array(
        [load_of(held, uses, topology) for held, uses in zip(placement, counts.load, strict=True)]
    )
    crossing = node_crossing = hop_cost = distinct = dispatch = None
    if counts.hops:
        crossing = crossing_of(placement, counts)
        node_crossing = _node_crossing(placement, counts, topology)
        hop_cost = _hop_cost(placement, counts, topology)
    if isinstance(recording, RoutingTrace) and len(recording):
        needed = _devices_needed(placement, recording)
        distinct = float(needed.sum(1).mean())
        dispatch = float((needed @ (topology.costs + topology.costs.T).mean(0)).sum())
    return Metrics(
        tokens=counts.tokens,
        crossing=crossing,
        node_crossing=node_crossing,
        distinct_devices=distinct,
        load=float(load.mean()),
        load_worst=float(load.max()),
        hop_cost=hop_cost,
        dispatch_cost=dispatch,
    )


def load_of(held: BoolArray, uses: FloatArray, topology: Topology) -> float:
    """Highest load of a device over its share of the layer's load; 1 if there is no load."""
    return imbalance(uses, held, topology.load_shares)


def crossing_of(placement: Sequence[BoolArray], affinity: Affinity) -> float:
    """Share of consecutive-layer pairs on different devices; 0 if there are no pairs."""
    return _crossing(affinity, [replica_shares(held) for held in placement], placement)


def replica_shares(held: BoolArray) -> FloatArray:
    """float64 `[E, G]`: how often each device's replica of an expert is used; rows sum to 1."""
    shares: FloatArray = held / np.maximum(held.sum(1, keepdims=True), 1)
    return shares


def _crossing(
    affinity: Affinity, shares: Sequence[FloatArray], placement: Sequence[BoolArray]
) -> float:
    """Share of pairs that leave the place, device or node, where their first expert was used."""
    total = stays = 0.0
    for hop, first, second in zip(affinity.transitions, shares[:-1], placement[1:], strict=True):
        stays += float(((hop @ second) * first).sum())
        total += float(hop.sum())
    return 1.0 - stays / total if total > 0 else 0.0


def _node_crossing(placement: Sequence[BoolArray], affinity: Affinity, topology: Topology) -> float:
    # A node is used as often as its devices together, not once for each node of an expert.
    member = topology.node_of[:, None] == np.arange(topology.node_count)
    shares = [replica_shares(held) @ member for held in placement]
    return _crossing(affinity, shares, [held @ member for held in placement])


def _hop_cost(placement: Sequence[BoolArray], affinity: Affinity, topology: Topology) -> float:
    """Sum over hops of the mean cost of a pair, to the cheapest replica of the next expert."""
    cost = 0.0
    for hop, first, second in zip(affinity.transitions, placement[:-1], placement[1:], strict=True):
        total = hop.sum()
        if total <= 0:
            continue
        # [G, E']: from each device to the nearest holder of each next expert.
        reach = np.where(second.T[None], topology.costs[:, :, None], np.inf).min(1)
        cost += float(((replica_shares(first).T @ hop) * reach).sum() / total)
    return cost


def _devices_needed(placement: Sequence[BoolArray], trace: RoutingTrace) -> FloatArray:
    """float64 `[L, G]`: the share of tokens that need each device in each layer.

    Replicas are chosen independently and evenly.
    """
    needed = np.zeros((len(placement), placement[0].shape[1]))
    for position, held in enumerate(placement):
        count = _tokens_by_set if held.shape[1] <= 64 and held.sum() == len(held) else _expected
        step = max(1, _CHUNK_CELLS // (trace.topk_ids.shape[2] * held.shape[1]))
        for start in range(0, len(trace), step):
            ids = trace.topk_ids[start : start + step, position].astype(np.int64)
            ids[ids == UNUSED] = len(held)
            needed[position] += count(held, ids)
    return needed / len(trace)


def _expected(held: BoolArray, ids: IntArray) -> FloatArray:
    """float64 `[G]`: expected number of the tokens that need each device; ids `[N, K]`."""
    missing = np.concatenate(
        [1.0 - replica_shares(held), np.ones((1, held.shape[1]))]
    )  # last: no expert
    result: FloatArray = (1.0 - missing[ids].prod(1)).sum(0)
    return result


def _tokens_by_set(held: BoolArray, ids: IntArray) -> FloatArray:
    """The same without replicas and for 64 devices at most: a token's devices as bits."""
    bit = np.append(np.uint64(1) << held.argmax(1).astype(np.uint64), np.uint64(0))
    sets = np.bitwise_or.reduce(bit[ids], axis=1)
    devices = np.arange(held.shape[1], dtype=np.uint64)
    return np.array([float(((sets >> device) & np.uint64(1)).sum()) for device in devices])
