"""One call of experts that are modules of their own: what it needs is brought into slots.

Experts are asked for ahead where the call's tensors foretell who will be called; whoever else is
called is brought one by one. Knows the executor and tensors; not hooks, files or policies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_runtime.access import Access
from moe_runtime.executor import Executor
from moe_runtime.expert_modules import owner_of
from moe_runtime.model_spec import MoELayer
from moe_runtime.module_routing import Reading, readings
from moe_runtime.steps import Step

__all__ = ["Manners", "ModuleCall"]

_LOG = logging.getLogger("moe_runtime")


@dataclass(eq=False)
class Manners:
    """How the experts of one class of container are called, as far as calls have shown it.

    Attributes:
        ruled_out: names of readings that foretold other calls than came.
        ascending: whether experts are called in ascending order.
        warned: whether it has been said that routing cannot be recorded.
    """

    ruled_out: set[str] = field(default_factory=set)
    ascending: bool = True
    warned: bool = False


class ModuleCall:
    """A call under way; it has the executor's lock until `finish` or `undo`.

    Args:
        position: of the layer.
        tensors: the call's arguments; routing may be read off them and off what `learn` adds.
        alone: an expert was called by itself, not by the module that runs the layer's experts.

    Attributes:
        sources: arguments that wanted gradients; for whoever made the call.
    """

    def __init__(
        self,
        executor: Executor,
        position: int,
        layer: MoELayer,
        manners: Manners,
        tensors: list[torch.Tensor],
        *,
        alone: bool,
    ) -> None:
        self.position = position
        self.alone = alone
        self.thread = threading.get_ident()
        self.sources: list[torch.Tensor] = []
        self._executor = executor
        self._layer = layer
        self._manners = manners
        self._held = ExitStack()
        self._held.enter_context(executor.exclusive())
        self._began = time.perf_counter()
        self._tensors = [tensor.detach() for tensor in tensors]
        self._tokens = 0  # rows before they are dealt out to experts, once the first is called
        self._hint: Reading | None = None
        self._foretold: dict[int, int] = {}
        self._ahead: deque[int] = deque()  # asked for and not yet come to
        self._ready: Iterator[int] | None = None  # yields them, each while it is in its slot
        self._current = -1
        self._late = False  # whether a foretold expert was called after its turn
        self._rows: dict[int, int] = {}  # that each expert has been called with
        self._placed: list[tuple[dict[str, Any], str, Any]] = []

    def learn(self, tensors: list[torch.Tensor]) -> None:
        """A router's outputs."""
        self._tensors += [tensor.detach() for tensor in tensors]

    def place(self, number: int, expert: nn.Module, inputs: torch.Tensor | None) -> None:
        """Wait for expert `number` and put its slot's tensors in the place of its parameters.

        Args:
            inputs: what the expert is called with, `[..., width]`.
        """
        self.put_back()
        rows = 1 if inputs is None else inputs.numel() // max(inputs.shape[-1], 1)
        if not self._tokens:
            self._foresee(inputs)
        if rows:
            self._rows[number] = self._rows.get(number, 0) + rows
            self._bring(number, rows)
        # Without rows the values are of no use: any slot's tensors have the shapes.
        held = self._executor.held(self.position, number if rows else None)
        for param, tensor in zip(self._layer.params, held, strict=True):
            owner, leaf = owner_of(expert, param.name)
            self._placed.append((owner._parameters, leaf, owner._parameters[leaf]))
            owner._parameters[leaf] = tensor  # type: ignore[assignment]

    def put_back(self) -> None:
        """Give the expert that was called last the parameters that it had."""
        while self._placed:
            parameters, leaf, before = self._placed.pop()
            parameters[leaf] = before

    def finish(self) -> None:
        """The call went well: experts are released, manners learnt, recorders told."""
        executor = self._executor
        self.put_back()
        self._let_go()
        reading = self._confirmed()
        if executor.listeners:
            self._tell(reading)
        executor.profiler.expert_seconds += time.perf_counter() - self._began
        self._held.close()

    def undo(self) -> None:
        """It failed: parameters are back, the cache is whole, the executor free."""
        try:
            self.put_back()
            self._ready = None
            self._executor.undo()
        finally:
            self._held.close()

    # -- bringing experts -----------------------------------------------------------------------

    def _foresee(self, inputs: torch.Tensor | None) -> None:
        """At the first expert: ask for all that will be called, if the call's tensors tell."""
        width = 0 if inputs is None else inputs.shape[-1]
        hidden: torch.Tensor | None = None
        for place, tensor in enumerate(self._tensors):
            if tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] == width:
                self._tokens = tensor.numel() // max(width, 1)
                hidden = tensor.reshape(self._tokens, -1)
                del self._tensors[place]  # the hidden states: neither routing nor weights
                break
        self._tokens = self._tokens or 1
        self._hint = None if self.alone else next(self._readings(), None)
        if self._hint is None:
            return
        if self._executor.loader.follows and hidden is not None:
            index, _ = self._hint.top_k([])
            self._executor.tell(self.position, hidden, index, self._step())
        self._foretold = self._hint.counts()
        if self._manners.ascending and self._foretold:
            self._ahead = deque(self._foretold)
            access = self._hint.access(self.position, self._foretold)
            self._ready = self._executor.ascending(access)

    def _bring(self, number: int, rows: int) -> None:
        if self._current == number:
            return
        if number in self._ahead:
            assert self._ready is not None, "experts ahead have been asked for"
            while self._current != number:
                self._current = next(self._ready)
                self._ahead.popleft()
            return
        self._late |= number in self._foretold
        self._let_go()
        access = Access(
            position=self.position,
            experts=np.array([number], np.int64),
            tokens=np.array([rows], np.int64),
        )
        self._ready = self._executor.ascending(access)
        self._current = next(self._ready)

    def _let_go(self) -> None:
        """Release the experts asked for; reads for those that were not come to are dropped."""
        ready, self._ready, self._current = self._ready, None, -1
        if ready is None:
            return
        if self._ahead:
            self._ahead.clear()
            self._executor.loader.abandon()
            return
        for _ in ready:
            pass

    # -- what the call tells ----------------------------------------------------------------------

    def _readings(self) -> Iterator[Reading]:
        for reading in readings(
            self._tensors,
            tokens=self._tokens,
            experts=self._layer.num_experts,
            top_k=self._layer.top_k,
        ):
            if reading.name not in self._manners.ruled_out:
                yield reading

    def _confirmed(self) -> Reading | None:
        """The first reading that fits what was called; what does not fit is not tried again."""
        if self.alone or not self._tokens:
            return None
        if self._hint is not None and self._foretold == self._rows:
            self._manners.ascending &= not self._late
            return self._hint
        for reading in list(self._readings()):
            if reading.counts() == self._rows:
                return reading
            self._manners.ruled_out.add(reading.name)
        return None

    def _tell(self, reading: Reading | None) -> None:
        """Let recorders know; of calls whose routing cannot be told they learn nothing."""
        if reading is None:
            if self._rows and not self._manners.warned:
                self._manners.warned = True
                _LOG.warning(
                    "%s: nothing in its calls tells which token goes to which expert; the routing "
                    "of such layers is not recorded",
                    self._layer.path,
                )
            return
        floats = [tensor for tensor in self._tensors if tensor.is_floating_point()]
        index, weights = reading.top_k(floats)
        for listener in self._executor.listeners:
            listener(self.position, index, weights, self._step())

    def _step(self) -> Step | None:
        """The forward call around this one, if its rows are this one's."""
        step = self._executor.step
        return None if step is None or step.rows != self._tokens else step
