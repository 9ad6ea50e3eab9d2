"""Experts that are modules of their own, run out of slots by forward hooks on them.

A hook before each expert brings it into a slot and puts the slot's tensors in the place of its
parameters, one after it takes them away; a hook around the module that calls the experts holds the
executor for that long. The model's own code computes, so results are the plain model's.

Knows the executor and a call's tensors; not how experts are read, nor what is evicted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_runtime.access import Access
from moe_runtime.errors import AttachError
from moe_runtime.executor import Executor
from moe_runtime.expert_modules import owner_of
from moe_runtime.interface import refuse_gradients
from moe_runtime.model_spec import MoELayer
from moe_runtime.module_routing import Reading, readings

__all__ = ["ModuleCalls"]

_LOG = logging.getLogger("moe_runtime")


@dataclass(eq=False)
class _Manners:
    """How the experts of one class of container are called, as far as calls have shown it.

    Args:
        ruled_out: readings that foretold other calls than came.
        ascending: whether experts are called in ascending order.
    """

    ruled_out: set[str] = field(default_factory=set)
    ascending: bool = True


@dataclass(eq=False)
class _Call:
    """One call of the module that runs the experts, while it is under way.

    Args:
        alone: an expert was called by itself.
        held: what to let go of at the end; the executor's lock.
        tensors: arguments and the router's outputs.
        floats: those of `tensors` that may hold weights.
        hint: the reading by which experts are asked for ahead.
        foretold: rows of each expert by that reading.
        ahead: experts asked for and not yet come to.
        ready: yields them while each is in its slot.
        current: the expert that is in its slot.
        late: whether an expert was called after its turn.
        rows: rows that each expert has been called with so far.
        placed: parameters to put back: their owner's dictionary, name, and what was there.
    """

    layer: _Layer
    thread: int
    alone: bool
    held: ExitStack
    began: float
    tensors: list[torch.Tensor]
    sources: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    hint: Reading | None = None
    foretold: dict[int, int] = field(default_factory=dict)
    ahead: deque[int] = field(default_factory=deque)
    ready: Iterator[int] | None = None
    current: int = -1
    late: bool = False
    rows: dict[int, int] = field(default_factory=dict)
    placed: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)


class _Shared:
    """A hook's owner: deep copies of a model share it, as they share slots and counters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise AttachError(
            "a model in an expert budget cannot be pickled: save_pretrained it, or detach it first"
        )


class ModuleCalls(_Shared):
    """All layers of one model whose experts are modules of their own."""

    def __init__(self, executor: Executor, layers: Sequence[MoELayer]) -> None:
        self.executor = executor
        self.open: _Call | None = None
        manners: dict[str, _Manners] = {}
        self._layers = [
            _Layer(self, position, layer, manners.setdefault(layer.class_name, _Manners()))
            for position, layer in enumerate(layers)
            if layer.modules
        ]

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook into the experts, what calls them, and routers; the hooks' handles."""
        handles: list[RemovableHandle] = []
        for one in self._layers:
            handles += one.install(model)
        return handles

    def begin(self, call: _Call) -> None:
        """A call has the executor now."""
        if self.open is not None:
            # Interrupted where no hook could run (Ctrl-C in an expert's own code). One call has
            # the executor at a time, so this one cannot be under way any more.
            step = self.executor.step
            self.undo()
            if step is not None:
                self.executor.begin_call(step)
        self.open = call

    def undo(self) -> None:
        """After a failed call: parameters are back, the cache is whole, the executor free."""
        call, self.open = self.open, None
        if call is None:
            return
        try:
            _put_back(call)
            call.ready = None
            self.executor.undo()
        finally:
            call.held.close()


class _Layer(_Shared):
    """The hooks of one layer."""

    def __init__(
        self, owner: ModuleCalls, position: int, layer: MoELayer, manners: _Manners
    ) -> None:
        self._owner = owner
        self._position = position
        self._layer = layer
        self._manners = manners
        self._warned = False

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
            hooks = _Expert(self, number)
            handles += [
                expert.register_forward_pre_hook(hooks.before, with_kwargs=True),
                expert.register_forward_hook(hooks.after, always_call=True),
            ]
        return handles

    # -- around the experts ---------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        call = self._begin(tensors, alone=False)
        call.sources = [t for t in tensors if torch.is_grad_enabled() and t.requires_grad]
        if not call.sources:
            return None
        if module.training:
            self._owner.undo()
            raise AttachError(
                f"{self._layer.path} is in training mode with gradients, but experts in a budget "
                "cannot be trained: call model.eval(), or moe_runtime.detach(model) to train"
            )
        # No graph may hold on to a slot, whose contents change.
        return tuple(_detached(a) for a in args), {k: _detached(v) for k, v in kwargs.items()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call = self._mine()
        if call is None:
            return None
        if output is None:  # the call failed
            self._owner.undo()
            return None
        sources = call.sources
        self._end(call)
        return refuse_gradients(output, *sources) if sources else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _routed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._mine()
        if call is not None:
            found = output if isinstance(output, tuple | list) else [output]
            call.tensors += [t.detach() for t in found if isinstance(t, torch.Tensor)]

    def _mine(self) -> _Call | None:
        """The call of this layer under way on this thread."""
        call = self._owner.open
        if call is None or call.layer is not self or call.thread != threading.get_ident():
            return None
        return call

    def _begin(self, tensors: list[torch.Tensor], *, alone: bool) -> _Call:
        with ExitStack() as stack:
            stack.enter_context(self._owner.executor.exclusive())
            call = _Call(
                layer=self,
                thread=threading.get_ident(),
                alone=alone,
                held=ExitStack(),
                began=time.perf_counter(),
                tensors=[tensor.detach() for tensor in tensors],
            )
            self._owner.begin(call)
            call.held = stack.pop_all()
        return call

    def _end(self, call: _Call) -> None:
        executor = self._owner.executor
        try:
            self._let_go(call)
            reading = self._confirmed(call)
            if executor.listeners:
                self._tell(call, reading)
            executor.profiler.expert_seconds += time.perf_counter() - call.began
        except BaseException:
            self._owner.undo()
            raise
        self._owner.open = None
        call.held.close()

    # -- one expert -----------------------------------------------------------------------------

    def before_expert(self, number: int, module: nn.Module, inputs: torch.Tensor | None) -> None:
        """Put the tensors of expert `number` in the place of `module`'s parameters."""
        call = self._mine()
        if call is None:
            call = self._begin([] if inputs is None else [inputs], alone=True)
        try:
            rows = 1 if inputs is None else inputs.numel() // max(inputs.shape[-1], 1)
            _put_back(call)
            call.rows[number] = call.rows.get(number, 0) + rows
            if rows:
                self._bring(call, number, rows, inputs)
            # No row, no use of the values: any slot's do.
            held = self._owner.executor.held(self._position, number if rows else None)
            for param, tensor in zip(self._layer.params, held, strict=True):
                owner, leaf = owner_of(module, param.name)
                call.placed.append((owner._parameters, leaf, owner._parameters[leaf]))
                owner._parameters[leaf] = tensor  # type: ignore[assignment]
        except BaseException:
            self._owner.undo()
            raise

    def after_expert(self, output: Any) -> None:
        """Take them away again."""
        call = self._mine()
        if call is None:
            return
        _put_back(call)
        if call.alone:
            if output is None:  # it failed
                self._owner.undo()
            else:
                self._end(call)

    def _bring(self, call: _Call, number: int, rows: int, inputs: torch.Tensor | None) -> None:
        """Wait until an expert is in its slot."""
        if not call.tokens:
            self._foresee(call, inputs)
        if call.current == number:
            return
        if number in call.ahead:
            assert call.ready is not None, "experts ahead have been asked for"
            while call.current != number:
                call.current = next(call.ready)
                call.ahead.popleft()
            return
        call.late |= number in call.foretold
        self._let_go(call)
        access = Access(
            position=self._position,
            experts=np.array([number], np.int64),
            tokens=np.array([rows], np.int64),
        )
        call.ready = self._owner.executor.ascending(access)
        call.current = next(call.ready)

    def _foresee(self, call: _Call, inputs: torch.Tensor | None) -> None:
        """At the first expert: ask for all that will be called, if the call's tensors tell."""
        width = 0 if inputs is None else inputs.shape[-1]
        for place, tensor in enumerate(call.tensors):
            if tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] == width:
                call.tokens = tensor.numel() // width
                del call.tensors[place]  # the hidden states: neither routing nor weights
                break
        call.tokens = call.tokens or 1
        if call.alone:
            return
        call.hint = next(self._readings(call), None)
        if call.hint is None:
            return
        call.foretold = call.hint.counts()
        if self._manners.ascending:
            call.ahead = deque(call.foretold)
            access = call.hint.access(self._position, call.foretold)
            call.ready = self._owner.executor.ascending(access)

    def _readings(self, call: _Call) -> Iterator[Reading]:
        for reading in readings(
            call.tensors,
            tokens=call.tokens,
            experts=self._layer.num_experts,
            top_k=self._layer.top_k,
        ):
            if reading.name not in self._manners.ruled_out:
                yield reading

    def _let_go(self, call: _Call) -> None:
        """Release the experts asked for; reads for those that were not come to are dropped."""
        ready, call.ready, call.current = call.ready, None, -1
        if ready is None:
            return
        if call.ahead:
            call.ahead.clear()
            executor = self._owner.executor
            executor.fetcher.cancel()
            executor.cache.abandon()
            return
        for _ in ready:
            pass

    def _confirmed(self, call: _Call) -> Reading | None:
        """The first reading that fits what was called; what does not fit is not tried again."""
        if call.alone or not call.tokens:
            return None
        called = {expert: rows for expert, rows in call.rows.items() if rows}
        if call.hint is not None and call.foretold == called:
            self._manners.ascending &= not call.late
            return call.hint
        for reading in list(self._readings(call)):
            if reading.counts() == called:
                return reading
            self._manners.ruled_out.add(reading.name)
        return None

    def _tell(self, call: _Call, reading: Reading | None) -> None:
        """Let recorders know; of calls whose routing cannot be told they learn nothing."""
        executor = self._owner.executor
        if reading is None:
            if call.rows and not self._warned:
                self._warned = True
                _LOG.warning(
                    "%s: nothing in its calls tells which token goes to which expert; "
                    "its routing is not recorded",
                    self._layer.path,
                )
            return
        step = executor.step
        if step is not None and step.rows != call.tokens:
            step = None
        floats = [tensor for tensor in call.tensors if tensor.is_floating_point()]
        index, weights = reading.top_k(floats)
        for listener in executor.listeners:
            listener(self._position, index, weights, step)


class _Expert(_Shared):
    """The hooks of one expert; which model's it is they learn from the call."""

    def __init__(self, layer: _Layer, number: int) -> None:
        self._layer = layer
        self._number = number

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        inputs = next((one for one in given if isinstance(one, torch.Tensor)), None)
        self._layer.before_expert(self._number, module, inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._layer.after_expert(output)


def _put_back(call: _Call) -> None:
    """Give the expert that was called last the parameters that it had."""
    while call.placed:
        parameters, leaf, before = call.placed.pop()
        parameters[leaf] = before


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
