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

__all__ = [
    "HANDLE",
    "IMPLEMENTATION",
    "forget_previous",
    "previous_implementation",
    "register",
    "remember_previous",
]

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


# By configuration object: what its experts ran with before, and how many runtimes use it now. Two
# models can share one configuration.
_previous: dict[int, tuple[str, int]] = {}


def previous_implementation(config: Any) -> str | None:
    """What this configuration's experts ran with before any runtime, None if that is now."""
    known = _previous.get(id(config))
    return known[0] if known else None


def remember_previous(config: Any) -> None:
    """One more runtime uses this configuration."""
    name, users = _previous.get(id(config), (config._experts_implementation or "eager", 0))
    _previous[id(config)] = (name, users + 1)


def forget_previous(identity: int) -> str | None:
    """One runtime fewer uses the configuration of this `id`.

    Returns:
        The name to put back if that was the last, else None.
    """
    name, users = _previous[identity]
    if users > 1:
        _previous[identity] = (name, users - 1)
        return None
    del _previous[identity]
    return name


def _not_ours(module: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
    name = previous_implementation(module.config) or "grouped_mm"
    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    function = eager if name == "eager" else ALL_EXPERTS_FUNCTIONS.get(name, eager)
    return function(module, *arguments)  # type: ignore[no-any-return]


def register() -> None:
    """Make the executor known to transformers; doing it again changes nothing."""
    # The compiler must not look inside: the cache is state it cannot trace.
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _compiled_out)


_compiled_out = torch.compiler.disable(_experts_forward)
