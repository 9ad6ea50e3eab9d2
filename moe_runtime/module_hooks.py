"""Forward hooks on experts that are modules of their own, and on what calls them.

A hook before each expert puts a slot's tensors in the place of its parameters, one after it takes
them away; hooks around the module whose forward runs a layer's experts hold the executor for that
long. The model's own code computes, so results are the plain model's, bit for bit.

Knows PyTorch's hooks; how an expert gets into a slot is `module_calls`' business.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_runtime.errors import AttachError
from moe_runtime.executor import Executor
from moe_runtime.interface import refuse_gradients
from moe_runtime.model_spec import MoELayer
from moe_runtime.module_calls import Manners, ModuleCall

__all__ = ["ModuleHooks"]


class _Shared:
    """A hook's owner: deep copies of a model share it, as they share slots and counters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise AttachError(
            "a model in an expert budget cannot be pickled: save_pretrained it, or detach it first"
        )


class ModuleHooks(_Shared):
    """The hooks of all layers of one model whose experts are modules of their own."""

    def __init__(self, executor: Executor, layers: Sequence[MoELayer]) -> None:
        self._executor = executor
        self._open: ModuleCall | None = None
        manners: dict[str, Manners] = {}
        self._layers = [
            _LayerHooks(self, position, layer, manners.setdefault(layer.class_name, Manners()))
            for position, layer in enumerate(layers)
            if layer.modules
        ]

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook into the experts, what calls them, and routers; the hooks' handles."""
        return [handle for layer in self._layers for handle in layer.install(model)]

    def begin(
        self,
        position: int,
        layer: MoELayer,
        manners: Manners,
        tensors: list[torch.Tensor],
        *,
        alone: bool,
    ) -> ModuleCall:
        """A call that has the executor from now on; waits for those of other threads."""
        call = ModuleCall(self._executor, position, layer, manners, tensors, alone=alone)
        interrupted, self._open = self._open, call
        if interrupted is not None:
            # Where no hook could run (Ctrl-C in an expert's own code). One call has the executor
            # at a time, so that one cannot be under way any more.
            step = self._executor.step
            interrupted.undo()
            if step is not None:
                self._executor.begin_call(step)
        return call

    def under_way(self, position: int) -> ModuleCall | None:
        """This thread's call of the layer at `position`."""
        call = self._open
        if call is None or call.position != position or call.thread != threading.get_ident():
            return None
        return call

    def finish(self, call: ModuleCall) -> None:
        """It went well."""
        try:
            # Before the executor is free: the next call begins at once.
            self._open = None
            call.finish()
        except BaseException:
            call.undo()
            raise

    def undo(self) -> None:
        """It failed."""
        call, self._open = self._open, None
        if call is not None:
            call.undo()


class _LayerHooks(_Shared):
    """The hooks of one layer."""

    def __init__(
        self, owner: ModuleHooks, position: int, layer: MoELayer, manners: Manners
    ) -> None:
        self._owner = owner
        self._position = position
        self._layer = layer
        self._manners = manners

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook into one model's modules; the hooks' handles."""
        layer = self._layer
        scope = model.get_submodule(layer.scope)
        handles = [
            scope.register_forward_pre_hook(self._enter, with_kwargs=True),
            scope.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        if layer.router and layer.scope != layer.path:
            router = model.get_submodule(layer.router)
            handles.append(router.register_forward_hook(self._routed))
        for number, name in enumerate(layer.modules):
            expert = model.get_submodule(f"{layer.path}.{name}")
            hooks = _ExpertHooks(self, number)
            handles += [
                expert.register_forward_pre_hook(hooks.before, with_kwargs=True),
                expert.register_forward_hook(hooks.after, with_kwargs=True, always_call=True),
            ]
        return handles

    def begin(self, module: nn.Module, tensors: list[torch.Tensor], *, alone: bool) -> ModuleCall:
        """A call of the layer, or of one of its experts alone.

        Raises:
            AttachError: it is to be trained.
        """
        if module.training and any(_wants_gradient(tensor) for tensor in tensors):
            raise AttachError(
                f"{self._layer.path} is in training mode with gradients, but experts in a budget "
                "cannot be trained: call model.eval(), or moe_runtime.detach(model) to train"
            )
        call = self._owner.begin(self._position, self._layer, self._manners, tensors, alone=alone)
        call.sources = [tensor for tensor in tensors if _wants_gradient(tensor)]
        return call

    def under_way(self) -> ModuleCall | None:
        """This thread's call of the layer."""
        return self._owner.under_way(self._position)

    def end(self, call: ModuleCall, output: Any) -> Any:
        """The call has ended; what to return in the place of its output, None for no change.

        Args:
            output: None if the call failed.
        """
        if output is None:
            self._owner.undo()
            return None
        self._owner.finish(call)
        return refuse_gradients(output, *call.sources) if torch.is_grad_enabled() else None

    def undo(self) -> None:
        """A hook failed."""
        self._owner.undo()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.begin(module, _tensors(args, kwargs), alone=False)
        return _without_graph(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call = self.under_way()
        return None if call is None else self.end(call, output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _routed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.under_way()
        if call is not None:
            found = output if isinstance(output, tuple | list) else [output]
            call.learn([one for one in found if isinstance(one, torch.Tensor)])


class _ExpertHooks(_Shared):
    """The hooks of one expert; which model's it is they learn from the call."""

    def __init__(self, layer: _LayerHooks, number: int) -> None:
        self._layer = layer
        self._number = number

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the slot's tensors in place."""
        tensors = _tensors(args, kwargs)
        call = self._layer.under_way() or self._layer.begin(module, tensors, alone=True)
        try:
            call.place(self._number, module, next(iter(tensors), None))
        except BaseException:
            self._layer.undo()
            raise
        return _without_graph(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Take them away again."""
        call = self._layer.under_way()
        if call is None:
            return None
        call.put_back()
        return self._layer.end(call, output) if call.alone else None


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]


def _wants_gradient(tensor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _without_graph(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The same arguments cut from autograd, None if they are already.

    No graph may hold on to a slot, whose contents change.
    """
    if not any(_wants_gradient(tensor) for tensor in _tensors(args, kwargs)):
        return None
    return tuple(map(_detached, args)), {name: _detached(one) for name, one in kwargs.items()}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
