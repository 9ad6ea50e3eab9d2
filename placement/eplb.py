"""DeepSeek's EPLB balance, written anew from its published description: the figure to beat.

Takes counts, gives physical slots. Does not know plans, traces or affinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError

__all__ = ["PhysicalMap", "eplb"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PhysicalMap:
    """Which expert each physical slot holds, in L layers of E experts and R slots.

    Args:
        physical_to_logical: int64 `[L, R]`, the expert of each slot; slot p lies on device
            p // (R / devices).
        logical_to_physical: int64 `[L, E, M]`, the slots of each expert in the order in which its
            replicas were made; -1 past their number. M is the largest number of replicas.
        logical_count: int64 `[L, E]`, how many slots each expert has.
    """

    physical_to_logical: IntArray
    logical_to_physical: IntArray
    logical_count: IntArray

    def copies(self, devices: int) -> IntArray:
        """int64 `[L, E, G]`: slots of each expert on each device; more than 1 is possible."""
        layers, slots = self.physical_to_logical.shape
        experts = self.logical_count.shape[1]
        device = np.arange(slots) // (slots // devices)
        found = np.zeros((layers, experts, devices), dtype=np.int64)
        np.add.at(found, (np.arange(layers)[:, None], self.physical_to_logical, device), 1)
        return found


def eplb(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> PhysicalMap:
    """Balance experts over devices with replicas, as DeepSeek's EPLB does.

    Where the groups can be divided among the nodes, the balance is hierarchical: (1) whole groups
    of experts go to nodes, (2) each node replicates its heaviest experts, (3) each node packs its
    replicas onto its devices. Otherwise all devices are balanced as one node, groups ignored.

    Args:
        weight: `[L, E]`, load of each expert (tokens).
        num_replicas: physical slots R of a layer, a multiple of `num_gpus`, E at least.
        num_groups: groups of experts that a token's experts are chosen from; divides E.
        num_nodes: nodes; divides `num_gpus`.
        num_gpus: devices.

    Raises:
        PlanError: numbers that do not divide, fewer slots than experts, or loads that are
            negative or not finite.
    """
    load = np.asarray(weight, dtype=np.float64)
    _check(load, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers, experts = load.shape
    by_node = _experts_by_node(load, num_groups, num_nodes)
    node_load = np.take_along_axis(load, by_node, axis=1).reshape(layers * num_nodes, -1)

    member, rank, count = _replicate(node_load, num_replicas // num_nodes)
    replica_load = np.take_along_axis(node_load / count, member, axis=1)
    device, place = _pack(replica_load, num_gpus // num_nodes)
    slot = device * (num_replicas // num_gpus) + place

    # From a node's own numbers to the numbers of the whole layer.
    nodes = np.tile(np.arange(num_nodes), layers)[:, None]
    shape = (layers, num_replicas)
    expert = np.take_along_axis(
        by_node, (member + nodes * (experts // num_nodes)).reshape(shape), axis=1
    )
    slot = (slot + nodes * (num_replicas // num_nodes)).reshape(shape)
    rank = rank.reshape(shape)
    row = np.arange(layers)[:, None]
    physical = np.empty(shape, dtype=np.int64)
    physical[row, slot] = expert
    logical = np.full((layers, experts, int(count.max())), -1, dtype=np.int64)
    logical[row, expert, rank] = slot
    return PhysicalMap(
        physical_to_logical=physical,
        logical_to_physical=logical,
        logical_count=(logical >= 0).sum(axis=2),
    )


def _check(load: FloatArray, slots: int, groups: int, nodes: int, devices: int) -> None:
    if load.ndim != 2 or not load.size:
        raise PlanError(f"loads must be an array [layers, experts], found shape {load.shape}")
    if not np.isfinite(load).all() or (load < 0).any():
        layer, expert = (int(i) for i in np.argwhere(~(np.isfinite(load) & (load >= 0)))[0])
        raise PlanError(
            f"row {layer}, expert {expert}: a load must be finite and not negative, found "
            f"{load[layer, expert]}"
        )
    experts = load.shape[1]
    if min(groups, nodes, devices) < 1:
        raise PlanError(
            f"groups, nodes and devices must be 1 at least, found {groups}, {nodes}, {devices}"
        )
    if slots < experts:
        raise PlanError(f"{slots} slots cannot hold {experts} experts; give {experts} at least")
    for number, by, what in (
        (experts, groups, "experts cannot be divided into groups"),
        (devices, nodes, "devices cannot be divided among nodes"),
        (slots, devices, "slots cannot be divided among devices"),
    ):
        if number % by:
            raise PlanError(f"{number} {what}: {by} does not divide it")


def _experts_by_node(load: FloatArray, groups: int, nodes: int) -> IntArray:
    """int64 `[L, E]`: the experts, the first node's first; a node's groups as they were packed."""
    layers, experts = load.shape
    size = experts // groups
    node, place = _pack(load.reshape(layers, groups, size).sum(axis=2), nodes)
    first = (node * (groups // nodes) + place) * size
    position = (first[:, :, None] + np.arange(size)).reshape(layers, experts)
    return np.argsort(position, axis=1)


def _pack(weight: FloatArray, packs: int) -> tuple[IntArray, IntArray]:
    """Pack the items of each row into packs of equal numbers: heaviest first, each into the
    lightest pack that has room, the first of equal ones.

    Args:
        weight: `[rows, items]`.
        packs: divides the number of items.

    Returns:
        Pack of each item and its place in there, int64 `[rows, items]` both.
    """
    rows, items = weight.shape
    room = items // packs
    if room == 1:  # one item a pack: nothing to balance, so each stays where it is
        pack = np.broadcast_to(np.arange(items), (rows, items)).copy()
        return pack, np.zeros_like(pack)
    order = np.argsort(-weight, axis=1, kind="stable")
    pack, place = np.empty((2, rows, items), dtype=np.int64)
    load, filled = np.zeros((rows, packs)), np.zeros((rows, packs), dtype=np.int64)
    row = np.arange(rows)
    for item in order.T:
        lightest = np.where(filled < room, load, np.inf).argmin(axis=1)
        pack[row, item], place[row, item] = lightest, filled[row, lightest]
        load[row, lightest] += weight[row, item]
        filled[row, lightest] += 1
    return pack, place


def _replicate(weight: FloatArray, slots: int) -> tuple[IntArray, IntArray, IntArray]:
    """One replica of each item, then each further one to the item of the highest load a replica.

    Args:
        weight: `[rows, items]`.
        slots: replicas in all, as many as items at least.

    Returns:
        Item of each replica and its number among that item's, int64 `[rows, slots]` both; number
        of replicas of each item, int64 `[rows, items]`.
    """
    rows, items = weight.shape
    item = np.broadcast_to(np.arange(slots), (rows, slots)).copy()
    rank = np.zeros_like(item)
    count = np.ones((rows, items), dtype=np.int64)
    row = np.arange(rows)
    for replica in range(items, slots):
        heaviest = (weight / count).argmax(axis=1)
        item[:, replica], rank[:, replica] = heaviest, count[row, heaviest]
        count[row, heaviest] += 1
    return item, rank, count
