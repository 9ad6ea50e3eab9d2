"""The experts function registered with transformers, and what it does with modules not ours.

Knows which experts modules the executor owns; computes nothing itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.errors import AttachError
from moe_runtime.executor import LayerHandle

__all__ = ["HANDLE", "IMPLEMENTATION", "forget_previous", "register", "remember_previous"]

IMPLEMENTATION = "moe_runtime"
# Attribute of an experts module that an executor owns. It stands in the module's `__dict__`, away
# from its parameters and children.
HANDLE = "_moe_runtime_handle"


class _NoGradient(torch.autograd.Function):
    """Lets a forward call under autograd succeed and its backward fail with the reason."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *_sources: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:  # noqa: ARG004
        raise AttachError(
            "experts in a budget have no gradients: call moe_runtime.detach(model) to train"
        )


def _experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    handle: LayerHandle | None = module.__dict__.get(HANDLE)
    if handle is None:
        return _not_ours(module, hidden_states, top_k_index, top_k_weights)
    wants_gradient = torch.is_grad_enabled() and (
        hidden_states.requires_grad or top_k_weights.requires_grad
    )
    if wants_gradient and module.training:
        raise AttachError(
            f"{handle.layer.path} is in training mode with gradients, but experts in a budget "
            "cannot be trained: call model.eval(), or moe_runtime.detach(model) to train"
        )
    with torch.no_grad():
        output = handle.executor.forward(handle, module, hidden_states, top_k_index, top_k_weights)
    if wants_gradient:
        return _NoGradient.apply(output, hidden_states, top_k_weights)  # type: ignore[no-untyped-call,no-any-return]
    return output


# What each configuration's experts ran with before; two models can share one configuration object.
_previous: dict[int, str] = {}


def remember_previous(config: object, name: str) -> None:
    """Note what the modules of this configuration that are not ours go on running with."""
    _previous[id(config)] = name


def forget_previous(config: object) -> None:
    """The configuration is back to what it was."""
    _previous.pop(id(config), None)


def _not_ours(module: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
    name = _previous.get(id(module.config), "grouped_mm")
    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    function = eager if name == "eager" else ALL_EXPERTS_FUNCTIONS.get(name, eager)
    return function(module, *arguments)  # type: ignore[no-any-return]


def register() -> None:
    """Make the executor known to transformers; doing it again changes nothing."""
    # The compiler must not look inside: the cache is state it cannot trace.
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _compiled_out)


_compiled_out = torch.compiler.disable(_experts_forward)
