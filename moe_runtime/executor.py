"""The experts' forward: computes each MoE layer with what is held, fetching what is not.

Registered with transformers' `ExpertsInterface` under `IMPLEMENTATION`. Residents compute while
the missing experts are being read; when a layer needs more experts than there are slots, slots are
refilled as experts finish, and one expert's tokens are never split. Contributions are stored by
(choice, token) and summed at the end in a fixed order, so that results do not depend on what was
resident or on the order in which reads ended.

Knows the cache, the transfers and the kernels; not where weights come from, nor models.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.access import Access
from moe_runtime.cache import ExpertCache
from moe_runtime.device import Device
from moe_runtime.eager import EagerExperts
from moe_runtime.errors import AttachError, UnsupportedModelError
from moe_runtime.kernels import ExpertForm, decode_experts, expert_mlp, grouped_experts
from moe_runtime.model_spec import MoELayer
from moe_runtime.prefetch import Fetcher
from moe_runtime.profiler import Profiler
from moe_runtime.routing import LayerRouting, sort_routing
from moe_runtime.slots import SlotPool
from moe_runtime.steps import Step

__all__ = ["HANDLE", "IMPLEMENTATION", "Executor", "LayerHandle", "expert_form", "register"]

IMPLEMENTATION = "moe_runtime"
# Attribute of an experts module that this executor owns. Kept in `__dict__`, away from the
# module's parameters and children.
HANDLE = "_moe_runtime_handle"

RoutingListener = Callable[[int, torch.Tensor, torch.Tensor, Step | None], None]


@dataclass(eq=False)
class LayerHandle:
    """What ties one experts module to its executor. A deep copy of a model shares the executor."""

    executor: Executor
    position: int
    layer: MoELayer
    form: ExpertForm

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise AttachError(
            "a model in an expert budget cannot be pickled: save_pretrained it, or detach it first"
        )


def expert_form(module: nn.Module, layer: MoELayer) -> ExpertForm:
    """Read off an experts module how it computes.

    Raises:
        UnsupportedModelError: tensors that the declared layout does not explain.
    """
    names = [param.name for param in layer.params]
    up = "gate_up_proj" if module.has_gate else "up_proj"
    expected = {up, "down_proj"}
    if module.has_bias:
        expected |= {f"{up}_bias", "down_proj_bias"}
    if set(names) != expected:
        raise UnsupportedModelError(
            f"{layer.path} ({layer.class_name}) holds the expert tensors {sorted(names)}; "
            f"its declared layout needs {sorted(expected)}"
        )
    finish = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return ExpertForm(
        up=names.index(up),
        down=names.index("down_proj"),
        up_bias=names.index(f"{up}_bias") if module.has_bias else None,
        down_bias=names.index("down_proj_bias") if module.has_bias else None,
        transposed=bool(module.is_transposed),
        activation=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
        finish=finish,  # type: ignore[arg-type]
    )


@dataclass(eq=False)
class _LayerStep:
    """Bookkeeping of one layer step under way."""

    position: int
    waiting: deque[int]
    nbytes: int = 0
    host_bytes: int = 0
    stall: float = 0.0


class Executor:
    """Computes MoE layers in a budget of slots. One call at a time: calls from several threads
    wait for each other, layer by layer."""

    def __init__(
        self,
        cache: ExpertCache,
        pools: list[SlotPool],
        fetcher: Fetcher,
        device: Device,
        profiler: Profiler,
        *,
        exact: bool,
    ) -> None:
        self.cache = cache
        self.fetcher = fetcher
        self.profiler = profiler
        self.exact = exact
        self.listeners: list[RoutingListener] = []
        self._pools = pools
        self._device = device
        self._lock = threading.RLock()
        self._steps = threading.local()
        self._calls: set[int] = set()

    # -- the forward call around the layers -----------------------------------------------------

    @property
    def step(self) -> Step | None:
        """The forward call under way on this thread."""
        return getattr(self._steps, "current", None)

    @step.setter
    def step(self, step: Step | None) -> None:
        self._steps.current = step

    def begin_call(self, step: Step) -> None:
        """A forward call of the model begins on this thread."""
        self.step = step
        self._calls.add(threading.get_ident())

    def end_call(self) -> None:
        """It ended, well or not."""
        self.step = None
        self._calls.discard(threading.get_ident())

    def try_stop(self) -> bool:
        """Keep every layer step out until `resume`; False (and nothing kept) during a call."""
        if not self._lock.acquire(blocking=False):
            return False
        if self._calls:
            self._lock.release()
            return False
        return True

    def resume(self) -> None:
        """Undo `try_stop`."""
        self._lock.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold off layer steps while the cache is looked at or changed."""
        with self._lock:
            yield

    # -- one layer ------------------------------------------------------------------------------

    def forward(
        self,
        handle: LayerHandle,
        module: nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """One MoE layer: `hidden [T, D]`, `top_k_index [T, K]`, `top_k_weights [T, K]`."""
        step = self.step
        if step is not None and step.rows != hidden.shape[0]:
            step = None
        real = None if step is None or self.exact else step.real
        with self._lock:
            began = time.perf_counter()
            try:
                for listener in self.listeners:
                    listener(handle.position, top_k_index, top_k_weights, step)
                if self._without_host(handle, real):
                    return self._on_device(handle, hidden, top_k_index, top_k_weights)
                routing = sort_routing(top_k_index, handle.layer.num_experts, real)
                if self.exact:
                    return self._exact(handle, module, hidden, top_k_index, top_k_weights, routing)
                return self._fast(handle, hidden, top_k_index, top_k_weights, routing)
            except BaseException:
                # Also for KeyboardInterrupt: whatever was under way is undone, the cache stays
                # whole and the model usable.
                self.end_call()
                self.fetcher.cancel()
                self.cache.abandon()
                raise
            finally:
                self.profiler.expert_seconds += time.perf_counter() - began

    def _fast(
        self,
        handle: LayerHandle,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        routing: LayerRouting,
    ) -> torch.Tensor:
        choices = top_k_index.shape[1]
        tokens = hidden.shape[0]
        numbers = {expert: at for at, expert in enumerate(routing.experts)}
        outputs: torch.Tensor | None = None
        for experts in self._in_ready_order(handle.position, routing):
            if tokens == 1 and self._device.is_cpu:
                rows = decode_experts(hidden, [self._tensors(handle, e) for e in experts], handle.form)
                where = torch.cat([routing.of(numbers[e]) for e in experts])
                if len(where) != len(experts):  # an expert chosen twice by one token
                    counts = torch.tensor([routing.counts[numbers[e]] for e in experts])
                    rows = rows.repeat_interleave(counts, dim=0)
                outputs = self._store(outputs, where, rows, choices, tokens)
            elif self._device.is_cpu:
                for expert in experts:
                    where = routing.of(numbers[expert])
                    rows = expert_mlp(
                        hidden[where % tokens], self._tensors(handle, expert), handle.form
                    )
                    outputs = self._store(outputs, where, rows, choices, tokens)
            else:
                where = torch.cat([routing.of(numbers[e]) for e in experts])
                slots = torch.cat([self._slot_rows(handle, e, routing, numbers) for e in experts])
                device = hidden.device
                rows = grouped_experts(
                    hidden[(where % tokens).to(device)],
                    slots.to(device),
                    self._pool(handle).stacked,
                    handle.form,
                )
                outputs = self._store(outputs, where.to(device), rows, choices, tokens)
        return _combine(outputs, hidden, top_k_weights, choices)

    @staticmethod
    def _store(
        outputs: torch.Tensor | None,
        where: torch.Tensor,
        rows: torch.Tensor,
        choices: int,
        tokens: int,
    ) -> torch.Tensor:
        if outputs is None:
            if len(where) == choices * tokens and choices * tokens == len(rows) and tokens == 1:
                # All experts of a single token at once, the common case of decode.
                outputs = torch.empty_like(rows)
            else:
                outputs = rows.new_zeros(choices * tokens, rows.shape[-1])
        outputs[where] = rows
        return outputs

    def _exact(
        self,
        handle: LayerHandle,
        module: nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        routing: LayerRouting,
    ) -> torch.Tensor:
        """Run the class's own eager forward over experts that appear as it asks for them."""
        ready = self._in_ascending_order(handle.position, routing)
        names = [param.name for param in handle.layer.params]
        eager = EagerExperts(
            module, names, lambda expert: self._tensors(handle, expert), ready
        )
        output = eager.forward(hidden, top_k_index, top_k_weights)
        eager.finish()
        return output

    # -- getting experts into slots -------------------------------------------------------------

    def _in_ready_order(self, position: int, routing: LayerRouting) -> Iterator[list[int]]:
        """Groups of experts, each yielded once, while they are in their slots.

        First what is resident, with the reads of the rest under way; then as reads end.
        """
        step, hits = self._begin(position, routing)
        self._request_more(step)
        # While some experts wait for a slot, each slot is handed on as soon as it is done with.
        for group in [[hit] for hit in hits] if step.waiting else [hits] if hits else []:
            yield group
            self._release(position, group)
            self._request_more(step)
        while step.waiting or self.fetcher.in_flight:
            ready = [self._take(step)]
            while not step.waiting and self.fetcher.in_flight and self.fetcher.has_finished():
                ready.append(self._take(step))
            yield ready
            self._release(position, ready)
            self._request_more(step)
        self._end(step, routing)

    def _in_ascending_order(self, position: int, routing: LayerRouting) -> Iterator[int]:
        """Every expert in ascending order, one at a time, while it is in its slot."""
        step, hits = self._begin(position, routing)
        # With all of this layer's hits pinned there might be no slot for an earlier miss; those
        # that get evicted before their turn are read again.
        self._release(position, hits)
        arrived: set[int] = set()
        ahead = deque(routing.experts)
        for expert in routing.experts:
            while ahead:
                if self.cache.is_resident(position, ahead[0]):
                    self.cache.pin(position, ahead[0])
                    arrived.add(ahead[0])
                elif not self._ask(position, ahead[0]):
                    break
                ahead.popleft()
            while expert not in arrived:
                arrived.add(self._take(step))
            yield expert
            self.cache.release(position, expert)
        self._end(step, routing)

    def _begin(self, position: int, routing: LayerRouting) -> tuple[_LayerStep, list[int]]:
        hits, misses = self.cache.request(position, routing.experts, routing.counts)
        return _LayerStep(position, deque(misses)), hits

    def _request_more(self, step: _LayerStep) -> None:
        if step.waiting:
            granted = self.cache.grant(step.position, list(step.waiting))
            self._submit(step.position, granted)
            for _ in granted:
                step.waiting.popleft()

    def _ask(self, position: int, expert: int) -> bool:
        granted = self.cache.grant(position, [expert])
        self._submit(position, granted)
        return bool(granted)

    def _submit(self, position: int, experts: list[int]) -> None:
        if not experts:
            return
        after = self._device.fence()
        pool = self._pools[self.cache.group(position)]
        for expert in experts:
            target = pool.tensors(self.cache.slot(position, expert))
            self.fetcher.submit(position, expert, target, after=after)

    def _take(self, step: _LayerStep) -> int:
        fetch, waited = self.fetcher.next_finished()
        self._device.wait(fetch.token)
        self.cache.commit(fetch.position, fetch.expert)
        step.stall += waited
        if fetch.from_host:
            step.host_bytes += fetch.nbytes
        else:
            step.nbytes += fetch.nbytes
        return fetch.expert

    def _release(self, position: int, experts: list[int]) -> None:
        for expert in experts:
            self.cache.release(position, expert)

    def _end(self, step: _LayerStep, routing: LayerRouting) -> None:
        position = step.position
        self.profiler.bytes_read[position] += step.nbytes
        self.profiler.host_bytes[position] += step.host_bytes
        self.profiler.stall_seconds[position] += step.stall
        access = Access(
            position=position,
            experts=np.asarray(routing.experts, np.int64),
            tokens=np.asarray(routing.counts, np.int64),
        )
        self.profiler.layer_step(access, self.cache.last_misses, step.nbytes, step.stall)

    def preload(self, progress: Callable[[int], None] | None = None) -> None:
        """Fill free slots with experts in order, layer by layer, as far as they go."""
        with self._lock:
            try:
                for position, count in enumerate(self.cache.grid.experts):
                    absent = [e for e in range(count) if self.cache.slot(position, e) < 0]
                    absent = absent[: self.cache.free_slots(position)]
                    self._submit(position, self.cache.grant(position, absent))
                    step = _LayerStep(position, deque())
                    for _ in absent:
                        expert = self._take(step)
                        self.cache.release(position, expert)
                        if progress is not None:
                            progress(1)
                    self.profiler.bytes_read[position] += step.nbytes
                    self.profiler.host_bytes[position] += step.host_bytes
            except BaseException:
                self.fetcher.cancel()
                self.cache.abandon()
                raise

    def copy_expert(self, position: int, expert: int) -> tuple[torch.Tensor, ...]:
        """One expert's tensors in host memory, whether resident or not; residency stays."""
        with self._lock:
            pool = self._pools[self.cache.group(position)]
            if self.cache.is_resident(position, expert):
                held = pool.tensors(self.cache.slot(position, expert))
                return tuple(tensor.to("cpu", copy=True) for tensor in held)
            return self.fetcher.read_now(position, expert, pool.params)

    # -- the device -----------------------------------------------------------------------------

    def _pool(self, handle: LayerHandle) -> SlotPool:
        return self._pools[self.cache.group(handle.position)]

    def _tensors(self, handle: LayerHandle, expert: int) -> tuple[torch.Tensor, ...]:
        return self._pool(handle).tensors(self.cache.slot(handle.position, expert))

    def _slot_rows(
        self, handle: LayerHandle, expert: int, routing: LayerRouting, numbers: dict[int, int]
    ) -> torch.Tensor:
        slot = self.cache.slot(handle.position, expert)
        return torch.full((routing.counts[numbers[expert]],), slot, dtype=torch.int64)

    def _without_host(self, handle: LayerHandle, real: torch.Tensor | None) -> bool:
        """Whether this layer can run on the device without the host knowing the routing.

        Then hits are not counted and no policy learns: where everything is resident neither
        matters, and asking would cost a synchronisation for each layer.
        """
        return (
            not self._device.is_cpu
            and not self.exact
            and real is None
            and not self.listeners
            and self.cache.all_resident(handle.position)
        )

    def _on_device(
        self,
        handle: LayerHandle,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens, choices = top_k_index.shape
        table = self.cache.slot_table(handle.position, hidden.device)
        flat = top_k_index.t().reshape(-1)
        held = table[flat.clamp_max(handle.layer.num_experts - 1)]
        rows = torch.arange(tokens, device=hidden.device).repeat(choices)
        outputs = grouped_experts(hidden[rows], held, self._pool(handle).stacked, handle.form)
        sentinel = (flat >= handle.layer.num_experts).unsqueeze(-1)
        outputs = outputs.masked_fill(sentinel, 0)
        return _combine(outputs, hidden, top_k_weights, choices)


def _combine(
    outputs: torch.Tensor | None, hidden: torch.Tensor, top_k_weights: torch.Tensor, choices: int
) -> torch.Tensor:
    """Sum the weighted contributions `[K * T, D']`, choice by choice, in that fixed order."""
    if outputs is None:
        return torch.zeros_like(hidden)
    shaped = outputs.view(choices, hidden.shape[0], -1)
    weighted = shaped * top_k_weights.t().unsqueeze(-1)
    return weighted.sum(dim=0).to(hidden.dtype)


class _NoGradient(torch.autograd.Function):
    """Lets a forward call under autograd succeed and its backward fail with the reason."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # noqa: D102
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
        output = handle.executor.forward(
            handle, module, hidden_states, top_k_index, top_k_weights
        )
    if wants_gradient:
        return _NoGradient.apply(output, hidden_states, top_k_weights)  # type: ignore[no-untyped-call,no-any-return]
    return output


# -- modules that are not ours ----------------------------------------------------------------------

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
