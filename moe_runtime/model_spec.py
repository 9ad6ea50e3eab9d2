"""`MoESpec`: the MoE layers, experts and their bytes, read off a model by structure.

Knows transformers' experts interface, and experts that are modules of their own; does not know
checkpoints, caches or budgets.
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
from moe_runtime.expert_modules import ExpertModules, find_expert_modules, parameter_shapes

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

    `transposed` says that the model itself has its weights `[in, out]`. `modules` are the experts'
    names in the module at `path`, by expert number, where each is a module of its own; `router` is
    then the path of their router, empty if none was found, and `scope` that of the module whose
    forward runs them. Where experts are slices of tensors, all three are empty.
    """

    layer: int
    path: str
    class_name: str
    num_experts: int
    top_k: int
    params: tuple[ExpertParam, ...]
    transposed: bool = False
    modules: tuple[str, ...] = ()
    router: str = ""
    scope: str = ""

    def keys(self, param: ExpertParam) -> tuple[str, ...]:
        """The model's names of one tensor: `[experts, ...]`, or one for each expert."""
        if not self.modules:
            return (f"{self.path}.{param.name}",)
        return tuple(f"{self.path}.{module}.{param.name}" for module in self.modules)

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
        UnsupportedModelError: no MoE layer that the experts interface dispatches and no list of
            expert modules; the message names what was found instead.
    """
    stacked = find_experts_modules(model)
    apart = find_expert_modules(model, apart_from=[path for path, _ in stacked])
    if not stacked and not apart:
        raise UnsupportedModelError(_why_unsupported(model))
    modules = dict(model.named_modules())
    used: set[int] = set()
    layers = []
    for path, module in stacked:
        layers.append(_stacked_layer(path, module, modules, _free_index(_layer_index(path), used)))
    stacks: dict[str, int] = {}
    for found in apart:
        stack, index = _stack_and_index(found.path)
        index += _REPEATED_LAYER_OFFSET * stacks.setdefault(stack, len(stacks))
        layers.append(_modules_layer(found, modules, _free_index(index, used), model.config))
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in _distinct(model))
    return MoESpec(
        model_class=type(model).__name__,
        model_id=model_id or str(getattr(model.config, "name_or_path", "") or ""),
        layers=tuple(layers),
        dense_bytes=total - sum(entry.num_experts * entry.expert_bytes for entry in layers),
    )


def _stacked_layer(
    path: str, module: nn.Module, modules: dict[str, nn.Module], layer: int
) -> MoELayer:
    """A layer whose experts are slices of tensors."""
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
    count = int(module.num_experts)  # type: ignore[arg-type]
    return MoELayer(
        layer=layer,
        path=path,
        class_name=type(module).__name__,
        num_experts=count,
        top_k=_top_k(path, module, modules, module.config) or count,
        params=params,
        transposed=bool(module.is_transposed),
    )


def _modules_layer(
    found: ExpertModules, modules: dict[str, nn.Module], layer: int, config: Any
) -> MoELayer:
    """A layer whose experts are modules; where nothing says how many a token has, it is one."""
    expert = found.container.get_submodule(found.experts[0])
    return MoELayer(
        layer=layer,
        path=found.path,
        class_name=type(found.container).__name__,
        num_experts=len(found.experts),
        top_k=_top_k(found.path, found.container, modules, config, len(found.experts)) or 1,
        params=tuple(
            ExpertParam(name=name, shape=shape, dtype=dtype)
            for name, shape, dtype in parameter_shapes(expert)
        ),
        modules=found.experts,
        router=found.router,
        scope=found.scope,
    )


def _free_index(layer: int, used: set[int]) -> int:
    """A layer index that no earlier layer has."""
    while layer in used:
        layer += _REPEATED_LAYER_OFFSET
    used.add(layer)
    return layer


def _distinct(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _layer_index(path: str) -> int:
    """The last number in a module path: `model.layers.3.mlp.experts` is layer 3."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[-1]) if numbers else 0


def _stack_and_index(path: str) -> tuple[str, int]:
    """The list of layers that a path leads through, and the place in it.

    `encoder.block.3.layer.1.mlp.experts` is layer 3 of `encoder.block`: the outermost list counts.
    """
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return (path[: number.start()], int(number[1])) if number else (path, 0)


def _top_k(
    path: str, module: nn.Module, modules: dict[str, nn.Module], config: Any, count: int = 0
) -> int:
    """Experts a token: from the block around the experts, its router, or the configuration.

    0 if none of them says it.
    """
    parent_path = path.rpartition(".")[0]
    parent = modules.get(parent_path)
    places: list[Any] = [module]
    if parent is not None:
        places += [parent, *parent.children()]
    places.append(config)
    limit = count or int(module.num_experts)  # type: ignore[arg-type]
    for place in places:
        for name in _TOP_K_NAMES:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit:
                return value
    return 0


def _why_unsupported(model: nn.Module) -> str:
    """Say what looks like experts in a model without any that can be paged."""
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
            f"{name} holds its experts outside transformers' experts interface, and not as a list "
            "of equal modules beside a router that says how many there are "
            f"(found {', '.join(suspects)}); the runtime cannot page them. "
            "Load it with plain transformers, or ask upstream for @use_experts_implementation."
        )
    return f"{name} has no MoE layer: nothing to page. Load it with plain transformers."
