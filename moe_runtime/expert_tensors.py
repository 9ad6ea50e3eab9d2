"""Where a model holds its experts' tensors: taken out, stood in for, moved and put back.

Knows models and specs; not slots, files or budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moe_runtime.expert_modules import owner_of
from moe_runtime.model_spec import MoELayer, MoESpec
from moe_runtime.paged import PagedParameter

__all__ = [
    "Indexed",
    "drop_expert_tensors",
    "held_tensors",
    "keep_experts",
    "move_dense",
    "place_placeholders",
]

# For each tensor of a layer's experts one that is indexed by expert: `[experts, ...]`, or one
# tensor for each expert.
Indexed = torch.Tensor | tuple[torch.Tensor, ...]


def held_tensors(model: nn.Module, layer: MoELayer) -> tuple[Indexed, ...]:
    """The layer's tensors in the order of its params, each indexed by expert number."""
    found: list[Indexed] = []
    for param in layer.params:
        each = tuple(model.get_parameter(key).data for key in layer.keys(param))
        found.append(each if layer.modules else each[0])
    return tuple(found)


def drop_expert_tensors(model: nn.Module, spec: MoESpec) -> list[nn.Module]:
    """Leave None in the place of every expert tensor.

    Returns:
        The modules whose initialisation might look for them: those that held them, and those
        around.
    """
    owners: dict[int, nn.Module] = {}
    for layer in spec.layers:
        around = [layer.path, layer.path.rpartition(".")[0]]
        around += [f"{layer.path}.{name}" for name in layer.modules]
        for module in map(model.get_submodule, around):
            owners[id(module)] = module
        for param in layer.params:
            for key in layer.keys(param):
                owner, leaf = owner_of(model, key)
                owner._parameters[leaf] = None
                owners[id(owner)] = owner
    return list(owners.values())


def place_placeholders(model: nn.Module, spec: MoESpec, device: torch.device) -> None:
    """Put a `PagedParameter` into the place of every expert tensor."""
    for layer in spec.layers:
        for param in layer.params:
            shape = param.shape if layer.modules else (layer.num_experts, *param.shape)
            for key in layer.keys(param):
                owner, leaf = owner_of(model, key)
                owner._parameters[leaf] = PagedParameter(shape, param.dtype, device, key)


def move_dense(model: nn.Module, spec: MoESpec, device: torch.device) -> None:
    """Move everything but the experts' own tensors."""
    experts = {key for layer in spec.layers for param in layer.params for key in layer.keys(param)}
    for name, parameter in model.named_parameters():
        if name not in experts:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def keep_experts(
    model: nn.Module,
    spec: MoESpec,
    tensors: Callable[[int, int], Sequence[torch.Tensor]],
    device: torch.device,
) -> None:
    """Give every expert its Parameters back.

    Args:
        tensors: one expert's tensors, by layer position and expert number.
    """
    for position, layer in enumerate(spec.layers):
        whole = [
            torch.empty((layer.num_experts, *param.shape), dtype=param.dtype, device=device)
            for param in (() if layer.modules else layer.params)
        ]
        for expert in range(layer.num_experts):
            held = tensors(position, expert)
            for target, source in zip(whole, held, strict=not layer.modules):
                target[expert].copy_(source)
            if layer.modules:
                for param, tensor in zip(layer.params, held, strict=True):
                    owner, leaf = owner_of(model, layer.keys(param)[expert])
                    owner._parameters[leaf] = nn.Parameter(tensor.to(device))
        for param, tensor in zip(layer.params, whole, strict=not layer.modules):
            owner, leaf = owner_of(model, layer.keys(param)[0])
            owner._parameters[leaf] = nn.Parameter(tensor)
