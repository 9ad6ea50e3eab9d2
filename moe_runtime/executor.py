"""The experts' forward: computes each MoE layer with what is held, fetching what is not.

Residents compute while the missing experts are being read; when a layer needs more experts than
there are slots, slots are refilled as experts finish, and one expert's tokens are never split.
Contributions are stored by (choice, token) and summed at the end in a fixed order, so that results
do not depend on what was resident or on the order in which reads ended.

Knows the cache, the transfers and the kernels; not where weights come from, nor models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_runtime.access import Access
from moe_runtime.cache import ExpertCache
from moe_runtime.device import Device
from moe_runtime.eager import EagerExperts
from moe_runtime.errors import AttachError, UnsupportedModelError
from moe_runtime.kernels import (
    ExpertForm,
    decode_bags,
    decode_loop,
    expert_mlp,
    grouped_experts,
    recognise,
    rows_of_experts,
)
from moe_runtime.loader import ExpertLoader
from moe_runtime.model_spec import MoELayer
from moe_runtime.prefetch import Fetcher
from moe_runtime.profiler import Profiler
from moe_runtime.routing import LayerRouting, sort_routing, sort_single
from moe_runtime.rows import rows_of
from moe_runtime.slot_layers import SlotLayers
from moe_runtime.slot_transfers import SlotTransfers
from moe_runtime.slots import ALIGNMENT, SlotPool
from moe_runtime.steps import SequenceNumbers, Step

__all__ = ["Executor", "LayerHandle", "expert_form"]

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


def expert_form(module: nn.Module, layer: MoELayer, *, on_gpu: bool = False) -> ExpertForm:
    """Read off an experts module how it computes.

    Args:
        on_gpu: find out its gate too, for kernels that compute it inside.

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
    activation: Any = module._apply_gate if module.has_gate else module.act_fn
    gate = None
    if on_gpu:
        held = vars(module).values()
        # Limits and slopes of a gate; integers this small may be limits, larger ones are sizes.
        constants = [v for v in held if isinstance(v, float) or (type(v) is int and 0 < v < 64)]
        gate = recognise(activation, gated=bool(module.has_gate), constants=constants)
    finish = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return ExpertForm(
        up=names.index(up),
        down=names.index("down_proj"),
        up_bias=names.index(f"{up}_bias") if module.has_bias else None,
        down_bias=names.index("down_proj_bias") if module.has_bias else None,
        transposed=bool(module.is_transposed),
        activation=activation,
        finish=finish,  # type: ignore[arg-type]
        gate=gate,
    )


class Executor:
    """Computes MoE layers in a budget of slots. One call at a time: calls from several threads
    wait for each other, layer by layer.
    """

    def __init__(
        self,
        cache: ExpertCache,
        pools: list[SlotPool],
        fetcher: Fetcher,
        device: Device,
        profiler: Profiler,
        *,
        exact: bool,
        by_rows: bool = False,
    ) -> None:
        self.cache = cache
        self.fetcher = fetcher
        self.exact = exact
        self.listeners: list[RoutingListener] = []
        transfers = SlotTransfers(cache, pools, fetcher, device)
        self.loader = ExpertLoader(cache, transfers, profiler)
        self._numbers = SequenceNumbers()
        self._pools = pools
        # Where weights lie in blocks of rows, one token's experts are summed from tables of them.
        self._tables = [pool.tables() if by_rows else None for pool in pools]
        self._device = device
        self.slots = SlotLayers(cache, pools, self.loader, transfers, fetcher, device)
        self._lock = threading.RLock()
        self._steps = threading.local()
        self._calls: set[int] = set()
        self._changing = False  # within `_whole`

    # -- the forward call around the layers -----------------------------------------------------

    @property
    def profiler(self) -> Profiler:
        """Takes the counters."""
        return self.loader.profiler

    @profiler.setter
    def profiler(self, profiler: Profiler) -> None:
        self.loader.profiler = profiler

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
        loader = self.loader
        if loader.prediction is not None:
            with self._whole():
                # Numbers of sequences matter to a predictor only while it follows without a gap.
                told = loader.prediction.payoff.follows(decode=step.decode)
                rows = rows_of(step, self._numbers) if told else None
                loader.begin_call(rows, decode=step.decode)

    def end_call(self, seconds: float | None = None) -> None:
        """It ended, well after so many seconds, or not."""
        self.step = None
        self._calls.discard(threading.get_ident())
        if seconds is not None and self.loader.prediction is not None:
            with self._lock:
                self.loader.end_call(seconds)

    def try_stop(self, under_way: Callable[[int], bool]) -> bool:
        """Keep every layer step out until `resume`; False (and nothing kept) during a call.

        Args:
            under_way: whether a thread, by its number, is inside a forward call. Of a call that
                Ctrl-C ended outside this executor nobody has told it the end.
        """
        if not self._lock.acquire(blocking=False):
            return False
        for thread in list(self._calls):
            if not under_way(thread):
                self._calls.discard(thread)
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

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Hold the executor; what fails inside is undone, and the cache whole afterwards.

        By Ctrl-C too, which may come while a failure is being undone: then whoever comes next does
        that first.
        """
        with self._lock:
            if self._changing:
                self.loader.abandon()
            self._changing = True
            try:
                yield
            except BaseException:
                self.undo()
                self._changing = False
                raise
            self._changing = False

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
        with self._whole():
            began = time.perf_counter()
            try:
                for listener in self.listeners:
                    listener(handle.position, top_k_index, top_k_weights, step)
                alone = self._without_host(handle, real)
                by_slots = not self.exact and self.slots.take(handle.position, hidden, handle.form)
                if self.loader.follows and (alone or not by_slots):
                    self.tell(handle.position, hidden, top_k_index, step)
                if alone:
                    return self._on_device(handle, hidden, top_k_index, top_k_weights)
                if by_slots:
                    return self._arriving(handle, hidden, top_k_index, top_k_weights, real, step)
                return self._computed(handle, module, hidden, top_k_index, top_k_weights, real)
            finally:
                self.profiler.expert_seconds += time.perf_counter() - began

    def _computed(
        self,
        handle: LayerHandle,
        module: nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        real: torch.Tensor | None,
    ) -> torch.Tensor:
        position, count = handle.position, handle.layer.num_experts
        if len(hidden) == 1 and self._device.is_cpu and not self.exact and real is None:
            chosen = top_k_index[0].tolist()
            access = sort_single(position, chosen, count)
            if access is not None:
                single = self._single(handle, hidden, chosen, access)
                return _combine(single, hidden, top_k_weights)
        routing = sort_routing(position, top_k_index, count, real)
        if self.exact:
            return self._exact(handle, module, hidden, top_k_index, top_k_weights, routing)
        outputs = self._many(handle, hidden, top_k_index.shape[1], routing)
        return _combine(outputs, hidden, top_k_weights)

    def _arriving(
        self,
        handle: LayerHandle,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        real: torch.Tensor | None,
        step: Step | None,
    ) -> torch.Tensor:
        """By kernels over slots; a predictor is told once the choice is on the host anyway."""

        def told(chosen: torch.Tensor) -> None:
            self.tell(handle.position, hidden, chosen, step)

        return self.slots.arriving(
            handle.position,
            hidden,
            top_k_index,
            top_k_weights,
            handle.form,
            real,
            told if self.loader.follows else None,
        )

    def _single(
        self, handle: LayerHandle, hidden: torch.Tensor, chosen: list[int], access: Access
    ) -> torch.Tensor:
        """One token on the CPU: contributions `[K, D']` in the order of its choices."""
        slots = self.loader.take_hits(access, chosen)
        if slots is not None:
            return self._token_rows(handle, hidden, slots)
        outputs: torch.Tensor | None = None
        for experts in self.loader.in_ready_order(access):
            slots = self.cache.slots_of(handle.position, experts)
            rows = self._token_rows(handle, hidden, slots)
            if outputs is None:
                outputs = rows.new_empty(len(chosen), rows.shape[-1])
            outputs[[chosen.index(expert) for expert in experts]] = rows
        assert outputs is not None, "a token has at least one expert"
        return outputs

    def _token_rows(
        self, handle: LayerHandle, hidden: torch.Tensor, slots: list[int]
    ) -> torch.Tensor:
        """Outputs `[n, D']` of some experts on one token; a row's bits are its expert's alone."""
        group = self.cache.group(handle.position)
        pool, tables = self._pools[group], self._tables[group]
        if tables is None:
            return decode_loop(hidden, [pool.tensors(slot) for slot in slots], handle.form)
        return decode_bags(hidden, slots, tables, pool.stacked, handle.form)

    def _many(
        self, handle: LayerHandle, hidden: torch.Tensor, choices: int, routing: LayerRouting
    ) -> torch.Tensor | None:
        """Contributions `[K * T, D']` of every pair; None if there is no pair."""
        tokens = hidden.shape[0]
        outputs: torch.Tensor | None = None
        # A slice of a batch of rows must be aligned as a batch of its own would be.
        aligned = hidden.shape[1] * hidden.element_size() % ALIGNMENT == 0
        for group in self.loader.in_ready_order(routing.access):
            for experts in [group] if aligned else [[expert] for expert in group]:
                pairs, counts = routing.of(experts)
                pairs = pairs.to(hidden.device)
                rows = self._rows(handle, hidden[pairs % tokens], experts, counts)
                if outputs is None:
                    outputs = rows.new_zeros(choices * tokens, rows.shape[-1])
                outputs.index_copy_(0, pairs, rows)
        return outputs

    def _rows(
        self, handle: LayerHandle, inputs: torch.Tensor, experts: list[int], counts: list[int]
    ) -> torch.Tensor:
        """Outputs of some experts on their rows `inputs [n, D]`, `counts` rows each."""
        tables = self._tables[self.cache.group(handle.position)]
        if tables is not None:
            held = self.cache.slots_of(handle.position, experts)
            stacked = self._pool(handle).stacked
            return rows_of_experts(inputs, counts, held, tables, stacked, handle.form)
        if self._device.is_cpu:
            parts = zip(inputs.split(counts), self._held(handle, experts), strict=True)
            return torch.cat([expert_mlp(part, held, handle.form) for part, held in parts])
        slots = torch.tensor(self.cache.slots_of(handle.position, experts))
        slots = slots.repeat_interleave(torch.tensor(counts)).to(inputs.device)
        return grouped_experts(inputs, slots, self._pool(handle).stacked, handle.form)

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
        eager = EagerExperts(
            module,
            [param.name for param in handle.layer.params],
            lambda expert: self._held(handle, [expert])[0],
            self.loader.in_ascending_order(routing.access),
        )
        output = eager.forward(hidden, top_k_index, top_k_weights)
        eager.finish()
        return output

    # -- experts that are modules of their own; the caller is `exclusive` --------------------------

    def ascending(self, access: Access) -> Iterator[int]:
        """Every expert of one layer step in ascending order, while it is in its slot."""
        return self.loader.in_ascending_order(access)

    def held(self, position: int, expert: int | None) -> tuple[torch.Tensor, ...]:
        """The tensors of an expert that is in its slot; those of any slot for None."""
        pool = self._pools[self.cache.group(position)]
        return pool.tensors(0 if expert is None else self.cache.slot(position, expert))

    def undo(self) -> None:
        """After a failure: whatever was under way is undone, and the cache whole."""
        self.end_call()
        self.loader.abandon()

    # -- getting experts into slots -------------------------------------------------------------

    def preload(self, wanted: Sequence[Sequence[int]] | None = None) -> None:
        """Fill free slots with experts, layer by layer, in order, as far as they go.

        Args:
            wanted: experts of each layer position; None for all.
        """
        with self._whole():
            self.loader.preload(wanted)

    def keep(self, wanted: Sequence[Sequence[int]]) -> None:
        """Bring experts of each layer position into slots, and evict them no more until `let_go`.

        There have to be slots for them. If one cannot be read, none is kept.
        """
        kept: list[tuple[int, int]] = []
        with self._whole():
            pairs = [(at, expert) for at, experts in enumerate(wanted) for expert in experts]
            # Those that are there come first, so that none of them leaves for another.
            pairs.sort(key=lambda pair: not self.cache.is_resident(*pair))
            try:
                for position, expert in pairs:
                    self.loader.bring(position, expert)
                    self.cache.make_permanent(position, [expert])
                    kept.append((position, expert))
            except BaseException:
                for position, expert in kept:
                    self.cache.end_permanent(position, [expert])
                raise

    def let_go(self, wanted: Sequence[Sequence[int]]) -> None:
        """Undo one `keep`."""
        with self._lock:
            for position, experts in enumerate(wanted):
                self.cache.end_permanent(position, experts)

    def tell(
        self, position: int, hidden: torch.Tensor, top_k_index: torch.Tensor, step: Step | None
    ) -> None:
        """Tell the loader's predictor what the router chose for the rows that are no padding."""
        if step is None:
            return
        ids = top_k_index.detach()
        if step.real is not None:
            hidden = hidden[step.real.to(hidden.device)]
            ids = ids[step.real.to(ids.device)]
        chosen = ids.to("cpu").numpy().astype(np.int64)
        chosen[chosen >= self.cache.grid.experts[position]] = -1
        self.loader.observe(position, chosen, hidden.detach())

    def copy_expert(self, position: int, expert: int) -> tuple[torch.Tensor, ...]:
        """One expert's tensors in host memory, whether resident or not; residency stays."""
        with self._lock:
            pool = self._pools[self.cache.group(position)]
            if self.cache.is_resident(position, expert):
                return pool.copies(self.cache.slot(position, expert))
            return self.fetcher.read_now(position, expert, pool.params)

    # -- the device -----------------------------------------------------------------------------

    def _pool(self, handle: LayerHandle) -> SlotPool:
        return self._pools[self.cache.group(handle.position)]

    def _held(self, handle: LayerHandle, experts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        pool = self._pool(handle)
        return [pool.tensors(slot) for slot in self.cache.slots_of(handle.position, experts)]

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
        position, experts = handle.position, handle.layer.num_experts
        if self.slots.take(position, hidden, handle.form):
            return self.slots.resident(position, hidden, top_k_index, top_k_weights, handle.form)
        tokens, choices = top_k_index.shape
        table = self.cache.slot_table(position, self._device.to_device)
        flat = top_k_index.t().reshape(-1)
        held = table[flat.clamp_max(experts - 1)]
        rows = torch.arange(tokens, device=hidden.device).repeat(choices)
        outputs = grouped_experts(hidden[rows], held, self._pool(handle).stacked, handle.form)
        sentinel = (flat >= experts).unsqueeze(-1)
        outputs = outputs.masked_fill(sentinel, 0)
        return _combine(outputs, hidden, top_k_weights)


def _combine(
    outputs: torch.Tensor | None, hidden: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sum the weighted contributions `[K * T, D']`, choice by choice, in that fixed order."""
    if outputs is None:
        return torch.zeros_like(hidden)
    tokens, choices = top_k_weights.shape
    weighted = outputs.view(choices, tokens, -1) * top_k_weights.t().unsqueeze(-1)
    return weighted.sum(dim=0).to(hidden.dtype)
