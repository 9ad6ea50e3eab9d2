"""What engines make of placement files, in our own words: small stand-ins for their parsers.

They take a file's name and answer by the rules in the engines' sources, without our exporters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

Hosts = dict[int, list[set[int]]]


def load_tensors(path: Path) -> Any:
    """As the engines load a `.pt` file."""
    return torch.load(path, weights_only=True)  # noqa: TID251  the engines' own form


def on_devices(row: list[int], experts: int, devices: int) -> list[set[int]]:
    """Slot p lies on device p // (P / devices)."""
    assert len(row) % devices == 0
    room = len(row) // devices
    return [{p // room for p, e in enumerate(row) if e == expert} for expert in range(experts)]


def sglang(path: Path, *, hidden_layers: int, experts: int, redundant: int, ep_size: int) -> Hosts:
    """All hidden layers; the dictionary's items become keyword arguments, so one key only."""
    if path.suffix == ".pt":
        data = load_tensors(path)
    else:
        data = {key: torch.tensor(value) for key, value in json.loads(path.read_text()).items()}

    def init_by_mapping(*, physical_to_logical_map: torch.Tensor) -> torch.Tensor:
        return physical_to_logical_map

    table = init_by_mapping(**data)
    assert table.dtype == torch.int64
    assert table.shape == (hidden_layers, experts + redundant)
    for row in table:
        assert set(row.tolist()) == set(range(experts))
    return {layer: on_devices(row.tolist(), experts, ep_size) for layer, row in enumerate(table)}


def trtllm(path: Path, *, layers: list[int], experts: int, ep_size: int) -> Hosts:
    """Strict model with three fields, layers by absolute index."""
    data = yaml.safe_load(path.read_text())
    assert set(data) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert data["num_slots"] % ep_size == 0
    found: Hosts = {}
    for layer in layers:
        row = data["initial_global_assignments"][layer]
        assert len(row) == data["num_slots"]
        assert set(row) == set(range(experts))
        found[layer] = on_devices(row, experts, ep_size)
    return found


def vllm_ascend(path: Path, ordinal: int, rank: int) -> tuple[list[int], list[int], int]:
    """Of one MoE layer, by its place in the list, as one rank sees it.

    Returns:
        Local slot of each expert (-1: not here), physical slot of each expert (its own if it has
        one), number of redundant experts.
    """
    data: Any = json.loads(path.read_text())
    assert ordinal < data["moe_layer_count"]
    held = torch.tensor(
        [device["device_expert"] for device in data["layer_list"][ordinal]["device_list"]],
        dtype=torch.int32,
    )
    flat = held.flatten().tolist()
    experts = max(flat) + 1
    local = [-1] * experts
    for slot, expert in enumerate(held[rank].tolist()):
        local[expert] = slot
    width = held.shape[1]
    physical = []
    for expert in range(experts):
        places = [slot for slot, found in enumerate(flat) if found == expert]
        own = [slot for slot in places if slot // width == rank]
        physical.append(own[-1] if own else places[rank % len(places)])
    return local, physical, len(flat) - experts


def ktransformers(path: Path, number: int) -> torch.Tensor:
    """Bool over all hidden layers: the `number` highest counts of all layers together."""
    counts = load_tensors(path)["logical_count"]
    assert counts.dim() == 3
    summed = counts.sum(dim=0).float()
    mask = torch.zeros(summed.numel(), dtype=torch.bool)
    mask[torch.topk(summed.flatten(), number).indices] = True
    return mask.view(summed.shape)
