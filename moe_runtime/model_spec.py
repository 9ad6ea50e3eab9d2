"""`MoESpec`: the MoE layers, experts and their bytes, read off a model by structure.

Knows transformers' experts interface; does not know checkpoints, caches or budgets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import UnsupportedModelError

__all__ = [
    "ExpertParam",
    "MoELayer",
    "MoESpec",
    "expert_parameter_names",
    "find_experts_modules",
    "read_spec",
]

# What `use_experts_implementation` leaves on a class and on its instances.
_CLASS_MARKS = ("_apply_gate",)
_INSTANCE_MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
_TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "num_experts_per_token",
    "top_k_experts",
    "experts_per_token",
    "k",
)
# Two lists of layers in one model (an encoder's and a decoder's) repeat layer indices; the
# repeated ones are told apart by this offset.
_REPEATED_LAYER_OFFSET = 1000


@dataclass(frozen=True, kw_only=True)
class ExpertParam:
    """One tensor of an expert: `shape` without the experts' dimension, dtype as computed with."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of this tensor for one expert."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of this tensor for one expert."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One experts module: its absolute layer index, module path, and what an expert consists of.

    `transposed` says that the model itself has its weights `[in, out]`.
    """

    layer: int
    path: str
    class_name: str
    num_experts: int
    top_k: int
    params: tuple[ExpertParam, ...]
    transposed: bool = False

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of this layer."""
        return sum(param.nbytes for param in self.params)


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A model's MoE layers in order of execution, and the bytes of everything else."""

    model_class: str
    model_id: str
    layers: tuple[MoELayer, ...]
    dense_bytes: int

    @cached_property
    def grid(self) -> ExpertGrid:
        """Dense numbering of all experts."""
        return ExpertGrid(
            layers=tuple(layer.layer for layer in self.layers),
            experts=tuple(layer.num_experts for layer in self.layers),
        )

    @property
    def total_expert_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(layer.num_experts * layer.expert_bytes for layer in self.layers)

    @cached_property
    def groups(self) -> tuple[tuple[ExpertParam, ...], ...]:
        """The distinct expert shapes; a pool of slots serves each."""
        return tuple(dict.fromkeys(layer.params for layer in self.layers))

    def group_of(self, position: int) -> int:
        """Index in `groups` of the layer at `position`."""
        return self.groups.index(self.layers[position].params)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell models of another routing structure apart (not their weights)."""
        structure = [
            [layer.layer, layer.path, layer.num_experts, layer.top_k]
            + [[param.name, list(param.shape)] for param in layer.params]
            for layer in self.layers
        ]
        text = json.dumps([self.model_class, structure], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`(path, module)` of every module that transformers' experts interface dispatches."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if all(hasattr(type(module), mark) for mark in _CLASS_MARKS)
        and all(hasattr(module, mark) for mark in _INSTANCE_MARKS)
        and hasattr(type(module).forward, "__wrapped__")
    ]


def expert_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's own parameters that hold one slice for each expert."""
    count = int(module.num_experts)  # type: ignore[arg-type]
    return tuple(
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2 and parameter.shape[0] == count
    )


def read_spec(model: PreTrainedModel, *, model_id: str = "") -> MoESpec:
    """Read the structure of a model (on any device, the meta device included).

    Raises:
        UnsupportedModelError: no MoE layer that the experts interface dispatches; the message
            names what was found instead.
    """
    found = find_experts_modules(model)
    if not found:
        raise UnsupportedModelError(_why_unsupported(model))
    modules = dict(model.named_modules())
    used: set[int] = set()
    layers = []
    expert_bytes = 0
    for path, module in found:
        params = tuple(
            ExpertParam(name=name, shape=tuple(tensor.shape[1:]), dtype=tensor.dtype)
            for name in expert_parameter_names(module)
            for tensor in [module._parameters[name]]
            if tensor is not None
        )
        if not params:
            raise UnsupportedModelError(
                f"experts module {path} ({type(module).__name__}) has no expert tensors"
            )
        layer = _layer_index(path)
        while layer in used:
            layer += _REPEATED_LAYER_OFFSET
        used.add(layer)
        entry = MoELayer(
            layer=layer,
            path=path,
            class_name=type(module).__name__,
            num_experts=int(module.num_experts),  # type: ignore[arg-type]
            top_k=_top_k(path, module, modules),
            params=params,
            transposed=bool(module.is_transposed),
        )
        layers.append(entry)
        expert_bytes += entry.num_experts * entry.expert_bytes
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in _distinct(model))
    return MoESpec(
        model_class=type(model).__name__,
        model_id=model_id or str(getattr(model.config, "name_or_path", "") or ""),
        layers=tuple(layers),
        dense_bytes=total - expert_bytes,
    )


def _distinct(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _layer_index(path: str) -> int:
    """The last number in a module path: `model.layers.3.mlp.experts` is layer 3."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[-1]) if numbers else 0


def _top_k(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> int:
    """Experts a token: from the block around the experts, its router, or the configuration."""
    parent_path = path.rpartition(".")[0]
    parent = modules.get(parent_path)
    places: list[Any] = [module]
    if parent is not None:
        places += [parent, *parent.children()]
    places.append(module.config)
    limit = int(module.num_experts)  # type: ignore[arg-type]
    for place in places:
        for name in _TOP_K_NAMES:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit:
                return value
    return limit


def _why_unsupported(model: nn.Module) -> str:
    """Say what looks like experts in a model without the interface."""
    suspects = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if re.search(r"(moe|experts|sparsemlp)", type(module).__name__, re.IGNORECASE)
        }
    )
    name = type(model).__name__
    if suspects:
        return (
            f"{name} holds its experts outside transformers' experts interface "
            f"(found {', '.join(suspects)}); the runtime cannot page them. "
            "Load it with plain transformers, or ask upstream for @use_experts_implementation."
        )
    return f"{name} has no MoE layer: nothing to page. Load it with plain transformers."
