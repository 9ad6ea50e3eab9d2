"""Experts in `state_dict` and `save_pretrained`: mapped from the checkpoint, never loaded.

A whole model's state dict names them as the checkpoint does (renamed, but not merged, by
transformers' conversion), each a view of the mapped file: saving streams them, under the very names
that they had. Knows no cache.
"""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import torch
from torch import nn

from moe_runtime.checkpoint import ExpertMap
from moe_runtime.model_spec import MoESpec
from moe_runtime.paged import PagedParameter
from moe_runtime.safetensors_index import StoredTensor

__all__ = ["ExpertStateDict"]

_HOOKS = "_moe_runtime_state_dict_hooks"


class ExpertSource(Protocol):
    """What can hand out single experts."""

    spec: MoESpec

    def expert_tensors(self, position: int, expert: int) -> tuple[torch.Tensor, ...]:
        """One expert's tensors."""
        ...


class ExpertStateDict:
    """Puts the experts into the state dicts of a model that does not hold them."""

    def __init__(self, source: ExpertSource, experts: ExpertMap) -> None:
        self._source = source
        self._experts = experts
        self._mapped: dict[int, mmap.mmap] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertStateDict:
        return self

    def install(self, model: nn.Module) -> None:
        """Hook into the experts modules' state dicts."""
        hooks = []
        for position, layer in enumerate(self._source.spec.layers):
            hook = _LayerHook(self, position)
            module = model.get_submodule(layer.path)
            hooks.append(module.register_state_dict_post_hook(hook))
        model.__dict__[_HOOKS] = hooks

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Undo `install`."""
        for hook in model.__dict__.pop(_HOOKS, ()):
            hook.remove()

    def fill(self, position: int, state: dict[str, Any], prefix: str) -> None:
        """Replace one layer's placeholders.

        In the state dict of the whole model by the checkpoint's own tensors, mapped; in that of a
        part of it by the whole tensors under the module's names (which loads them).
        """
        layer = self._source.spec.layers[position]
        names = {
            param: [key.removeprefix(f"{layer.path}.") for key in layer.keys(param)]
            for param in layer.params
        }
        for name in (name for one in names.values() for name in one):
            state.pop(f"{prefix}{name}", None)
        if prefix == f"{layer.path}.":
            for name, entry in self._experts.keys[position].items():
                state[name] = self._view(entry)
            return
        each = [
            self._source.expert_tensors(position, expert) for expert in range(layer.num_experts)
        ]
        for number, param in enumerate(layer.params):
            if not layer.modules:
                state[f"{prefix}{param.name}"] = torch.stack([tensors[number] for tensors in each])
                continue
            for name, tensors in zip(names[param], each, strict=True):
                state[f"{prefix}{name}"] = tensors[number]

    def _view(self, entry: StoredTensor) -> torch.Tensor:
        region = self._mapped.get(entry.file)
        if region is None:
            with open(self._experts.paths[entry.file], "rb") as file:
                # Private: nothing that is done to a tensor reaches the checkpoint.
                region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mapped[entry.file] = region
        count = entry.nbytes // entry.dtype.itemsize
        flat = torch.frombuffer(region, dtype=entry.dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)


class _LayerHook:
    """`state_dict` post hook of one experts module."""

    def __init__(self, owner: ExpertStateDict, position: int) -> None:
        self._owner = owner
        self._position = position

    def __deepcopy__(self, memo: dict[int, Any]) -> _LayerHook:
        return self

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        if any(isinstance(p, PagedParameter) for p in module.parameters()):
            self._owner.fill(self._position, state, prefix)
