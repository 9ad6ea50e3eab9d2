"""Steering experts that are modules of their own: a hook after each scales what it returns.

Such an expert is called with the tokens that chose it. Which these are is read off the tensors that
its layer is called with, where it matters, and checked against what the expert gets.

Knows PyTorch's hooks; not how a layer calls its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.model_spec import MoELayer
from moe_runtime.module_routing import Reading, readings
from moe_runtime.steering.factors import UseCounter
from moe_runtime.steering.router_hook import RouterHook
from moe_runtime.steering.rows import CallRows
from moe_runtime.steering.values import Beta

__all__ = ["SeparateExperts"]


class SeparateExperts:
    """The hooks of one layer.

    Args:
        layer: whose experts are modules.
        betas: of its steered experts; none if outputs are not to be scaled.
        counted: experts whose uses are counted.
        rows: of the call under way.
        uses: takes them.
        router: has to have run before an expert; None if it need not.
    """

    def __init__(
        self,
        layer: MoELayer,
        betas: Mapping[int, Beta],
        *,
        counted: Mapping[int, Beta],
        rows: CallRows,
        uses: UseCounter,
        router: RouterHook | None,
    ) -> None:
        self._layer = layer
        self._betas = {expert: _tensor(beta) for expert, beta in betas.items()}
        self._counted = counted
        self._rows = rows
        self._uses = uses
        self._router = router
        self._tensors: list[torch.Tensor] = []

    def install(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """The hooks, each as soon as it is in."""
        layer = self._layer
        scope = model.get_submodule(layer.scope)
        yield scope.register_forward_pre_hook(self._enter, with_kwargs=True)
        if layer.router and layer.scope != layer.path:
            yield model.get_submodule(layer.router).register_forward_hook(self._routed)
        for expert in self._counted:
            module = model.get_submodule(f"{layer.path}.{layer.modules[expert]}")
            after = _After(self, expert)
            yield module.register_forward_hook(after, with_kwargs=True)

    def scaled(self, expert: int, inputs: torch.Tensor, output: Any) -> Any:
        """An expert's output times its beta; None for no change.

        Args:
            inputs: what the expert was called with, `[..., width]`.
        """
        if self._router is not None:
            self._router.require_ran(forget=False)
        if self._rows.active is False or not inputs.numel():
            return None
        flat = inputs.reshape(-1, inputs.shape[-1])
        alike = self._rows.owner is None and self._rows.active is None
        tokens = None if alike else self._tokens(expert, flat)
        active = None if tokens is None else self._active(tokens)
        count = len(flat) if active is None else int(active.sum())
        self._uses.add_count(expert, count)
        if expert not in self._betas:
            return None
        if not isinstance(output, torch.Tensor) or output.shape[:-1] != inputs.shape[:-1]:
            raise UnsupportedModelError(
                f"expert {expert} of {self._layer.path} does not return one tensor with a row for "
                "each token; its share cannot be scaled"
            )
        factor = self._betas[expert].to(output.device)
        if tokens is not None and self._rows.owner is not None and factor.dim():
            factor = factor[self._rows.owner.to(output.device)[tokens]]
        if active is not None:
            factor = torch.where(active.to(output.device), factor, 1.0)
        if factor.dim():
            factor = factor.reshape(*output.shape[:-1], 1)
        return (output * factor).to(output.dtype)

    def _active(self, tokens: torch.Tensor) -> torch.Tensor | None:
        active = self._rows.active
        return active.to(tokens.device)[tokens] if isinstance(active, torch.Tensor) else None

    def _tokens(self, expert: int, inputs: torch.Tensor) -> torch.Tensor | None:
        """Numbers, among the layer's tokens, of those that an expert is called with.

        None where that cannot be told and only padding depends on it.

        Raises:
            UnsupportedModelError: it cannot be told, and it matters.
        """
        hidden, others = _hidden_and_others(self._tensors, inputs.shape[-1])
        if hidden is not None:
            for reading in readings(
                others,
                tokens=len(hidden),
                experts=self._layer.num_experts,
                top_k=self._layer.top_k,
            ):
                tokens = _tokens_of(reading, expert)
                if len(tokens) == len(inputs) and torch.equal(hidden[tokens], inputs):
                    active = self._rows.steered(len(hidden), self._layer.path)
                    return None if active is None and self._rows.owner is None else tokens
        if self._rows.only_padding:
            return None
        raise UnsupportedModelError(
            f"{self._layer.path} ({self._layer.class_name}): nothing in its calls tells which "
            "tokens an expert gets, so that they cannot be steered differently; give one beta for "
            "all rows, without thinking="
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        self._tensors = [one.detach() for one in given if isinstance(one, torch.Tensor)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _routed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = output if isinstance(output, tuple | list) else [output]
        self._tensors += [one.detach() for one in found if isinstance(one, torch.Tensor)]


class _After:
    """The hook after one expert."""

    def __init__(self, layer: SeparateExperts, expert: int) -> None:
        self._layer = layer
        self._expert = expert

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        given = (*args, *kwargs.values())
        inputs = next(one for one in given if isinstance(one, torch.Tensor))
        return self._layer.scaled(self._expert, inputs, output)


def _tensor(beta: Beta) -> torch.Tensor:
    return torch.tensor(beta, dtype=torch.float32)


def _hidden_and_others(
    tensors: list[torch.Tensor], width: int
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The layer's tokens `[tokens, width]`, and the other tensors of its call."""
    for place, tensor in enumerate(tensors):
        if tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] == width:
            return tensor.reshape(-1, width), tensors[:place] + tensors[place + 1 :]
    return None, tensors


def _tokens_of(reading: Reading, expert: int) -> torch.Tensor:
    """Numbers of the tokens that go to an expert, choice by choice where choices are known."""
    if reading.chosen is not None:
        return (reading.chosen == expert).t().nonzero()[:, 1]
    return reading.pairs[:, expert].nonzero()[:, 0]
