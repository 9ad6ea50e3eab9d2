"""The experts function registered with transformers, and what it does with modules not ours.

Knows which experts modules the executor owns; computes nothing itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.errors import AttachError
from moe_runtime.executor import LayerHandle

__all__ = [
    "HANDLE",
    "IMPLEMENTATION",
    "Previous",
    "forget_previous",
    "hand_back",
    "previous_implementation",
    "refuse_gradients",
    "register",
    "remember_previous",
    "take_over",
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
    return refuse_gradients(output, hidden_states, top_k_weights) if wants_gradient else output


def refuse_gradients(output: Any, *sources: torch.Tensor) -> Any:
    """The same output, or tuple of outputs, whose backward is an error that says why.

    Args:
        sources: inputs of which one at least requires gradients.
    """
    if isinstance(output, tuple):
        return tuple(refuse_gradients(one, *sources) for one in output)
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return output
    return _NoGradient.apply(output, *sources)  # type: ignore[no-untyped-call]


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Previous:
    """What a model's experts ran with before a runtime took them over.

    Args:
        names: by sub-configuration, as `get_experts_implementation` gives them; None of a model
            with no experts behind the interface.
        finalizers: one for each configuration. A model that is dropped without `hand_back` leaves
            no trace of its configuration's `id`.
    """

    names: dict[str, Any] | None
    finalizers: tuple[weakref.finalize[Any, Any], ...] = ()


def take_over(model: PreTrainedModel, handles: Sequence[tuple[nn.Module, LayerHandle]]) -> Previous:
    """Let these experts modules of a model run by their handles' executor."""
    if not handles:
        return Previous(names=None)
    register()
    configs: dict[int, Any] = {id(module.config): module.config for module, _ in handles}
    finalizers = []
    for config in configs.values():
        remember_previous(config)
        finalizers.append(weakref.finalize(model, forget_previous, id(config)))
    names = {}
    for key, name in model.get_experts_implementation().items():
        inner = getattr(model.config, key) if key else model.config
        names[key] = previous_implementation(inner) or name or "eager"
    model.set_experts_implementation(IMPLEMENTATION)
    for module, handle in handles:
        config = configs[id(module.config)]
        if config._experts_implementation != IMPLEMENTATION:
            # A composite model that transformers does not switch as a whole.
            config._experts_implementation = IMPLEMENTATION
        module.__dict__[HANDLE] = handle
    return Previous(names=names, finalizers=tuple(finalizers))


def hand_back(
    model: PreTrainedModel, modules: Sequence[nn.Module], previous: Previous, *, original: bool
) -> None:
    """Undo `take_over` on a model or on a deep copy of it.

    Args:
        modules: all that hold experts; those that had no handle are left alone.
        original: whether it is the model that `take_over` was called with.
    """
    if previous.names is None:
        return
    configs: dict[int, Any] = {}
    for module in modules:
        if module.__dict__.pop(HANDLE, None) is not None:
            configs[id(module.config)] = module.config
    names: list[str | None] = [previous.names[""]] * len(configs)
    if original:
        for finalizer in previous.finalizers:
            finalizer.detach()
        names = [forget_previous(identity) for identity in configs]
    if None in names:  # another model may still run by a configuration of this one
        return
    model.set_experts_implementation(previous.names)
    for config, name in zip(configs.values(), names, strict=True):
        if config._experts_implementation == IMPLEMENTATION:
            config._experts_implementation = name


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
