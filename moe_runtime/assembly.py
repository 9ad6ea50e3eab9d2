"""Makes a runtime's parts out of its options: memory, slots, cache, slow tier, executor.

Knows the order in which they are made; how each works is its owner's. Knows no hooks and no verbs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.budget import (
    BudgetPlan,
    least_slots,
    plan_budget,
    resolve_budget,
    working_room,
)
from moe_runtime.cache import ExpertCache
from moe_runtime.checkpoint import ExpertMap
from moe_runtime.config import RuntimeConfig
from moe_runtime.device import Device
from moe_runtime.eviction import make_policy
from moe_runtime.executor import Executor, expert_form
from moe_runtime.expert_tensors import Indexed
from moe_runtime.hardware.cache import known_profile
from moe_runtime.hardware.values import HardwareProfile
from moe_runtime.host_experts import HostBatch
from moe_runtime.hosting import make_hosting
from moe_runtime.kernels import ExpertForm
from moe_runtime.layout import largest_whole_row, lies_by_rows, row_blocks
from moe_runtime.memory import mapped_bytes
from moe_runtime.model_spec import MoESpec
from moe_runtime.pinning import Pinning
from moe_runtime.prediction import predict
from moe_runtime.predictors.base import Predictor
from moe_runtime.prefetch import Fetcher
from moe_runtime.profiler import Profiler
from moe_runtime.slot_memory import allocate_host_tier, allocate_pools
from moe_runtime.slots import RowBlocks, SlotPool, slot_bytes
from moe_runtime.store import DiskStore, HostTier, ParameterStore, Store

__all__ = ["Parts", "assemble"]

_LOG = logging.getLogger("moe_runtime")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a runtime is made of.

    Args:
        budget: what the budget holds.
        forms: of each MoE layer, how its experts compute; None where they are modules.
        fetcher: its threads, like those of the slots of `executor`, end with the runtime.
    """

    budget: BudgetPlan
    cache: ExpertCache
    fetcher: Fetcher
    executor: Executor
    profiler: Profiler
    forms: tuple[ExpertForm | None, ...]


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What the parts are made for."""

    model: PreTrainedModel
    spec: MoESpec
    config: RuntimeConfig
    device: Device
    pinned: tuple[int, ...]  # experts of each layer that a plan keeps resident; () without one
    profile: HardwareProfile | None


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """The fast tier's memory; `groups` says of each layer whose slots it shares."""

    pools: list[SlotPool]
    groups: list[int]
    budget: BudgetPlan


def assemble(
    model: PreTrainedModel,
    spec: MoESpec,
    config: RuntimeConfig,
    device: Device,
    *,
    experts: ExpertMap | None = None,
    indexed: Sequence[tuple[Indexed, ...]] = (),
    in_place: bool = False,
    pinning: Pinning | None = None,
    predictor: Predictor | None = None,
) -> Parts:
    """Make store, slots, cache and executor.

    Args:
        experts: where the checkpoint's files hold each expert; None if they are in memory.
        indexed: else, for each layer its tensors, each indexed by expert.
        in_place: these tensors serve as slots; nothing is allocated.
        pinning: what a plan keeps resident, None without a plan.
        predictor: what routing is predicted by, None without.

    Raises:
        BudgetError: the budget does not hold one layer's top-k beside what is pinned.
        ConfigError: an option of the policy, of prediction or the hardware profile is wrong.
    """
    setting = _Setting(
        model=model,
        spec=spec,
        config=config,
        device=device,
        pinned=pinning.counts if pinning else (),
        profile=known_profile(config.hardware),
    )
    forms = _forms(setting)
    # Decided once: with an automatic budget free memory could tell otherwise a moment later.
    by_rows = not in_place and _by_rows(setting)
    slots = _slots(setting, experts, indexed, in_place=in_place, by_rows=by_rows)
    policy = make_policy(config.policy, spec.grid, **config.policy_options)
    cache = ExpertCache(spec.grid, slots.groups, slots.budget.slots, policy)
    fetcher, budget = _fetcher(setting, slots.budget, experts, indexed)
    profiler = Profiler(layers=len(spec.layers), grid_size=spec.grid.size)
    executor = Executor(
        cache, slots.pools, fetcher, device, profiler, exact=config.exact, by_rows=by_rows
    )
    _say_what_is_idle(setting, by_rows=by_rows, in_place=in_place)
    if not device.is_cpu and not config.exact:
        executor.slots.hosting = make_hosting(
            config.host_execution, setting.profile, str(device.torch_device)
        )
    if predictor is not None:
        if not device.is_cpu:
            fetcher.measure_copies(max(layer.expert_bytes for layer in spec.layers))
        predict(executor.loader, spec, predictor, config.prediction_options)
    if by_rows:
        forms = [form and replace(form, transposed=True) for form in forms]
    if in_place:
        cache.adopt_all()
    return Parts(
        budget=budget,
        cache=cache,
        fetcher=fetcher,
        executor=executor,
        profiler=profiler,
        forms=tuple(forms),
    )


def _forms(setting: _Setting) -> list[ExpertForm | None]:
    on_gpu = not setting.device.is_cpu
    return [
        None
        if layer.modules
        else expert_form(setting.model.get_submodule(layer.path), layer, on_gpu=on_gpu)
        for layer in setting.spec.layers
    ]


def _by_rows(setting: _Setting) -> bool:
    """Whether weights are to lie in blocks of rows."""
    total, _ = _resolve(setting, None)
    everything = sum(slot_bytes(x.params) * x.num_experts for x in setting.spec.layers)
    return lies_by_rows(
        setting.spec,
        setting.config.layout,
        on_cpu=setting.device.is_cpu,
        exact=setting.config.exact,
        fits=total >= everything,
    )


def _resolve(setting: _Setting, rows: Sequence[RowBlocks | None] | None) -> tuple[int, str]:
    config, spec, device = setting.config, setting.spec, setting.device
    # Bytes of weights other than experts' that free memory does not yet know of: on a CPU they are
    # the checkpoint's mapped pages, which count as free; on a device they are there already.
    dense = min(spec.dense_bytes, mapped_bytes(".safetensors")) if device.is_cpu else 0
    return resolve_budget(
        config.expert_budget,
        spec,
        setting.model.config,
        device.torch_device,
        threads=config.reader_threads,
        rows=rows,
        batch=config.max_batch,
        length=config.max_length,
        dense=dense,
        profile=setting.profile,
    )


def _slots(
    setting: _Setting,
    experts: ExpertMap | None,
    indexed: Sequence[tuple[Indexed, ...]],
    *,
    in_place: bool,
    by_rows: bool,
) -> _Slots:
    """The slots: the model's own tensors, or as many as the budget and the device grant."""
    spec, config, pinned = setting.spec, setting.config, setting.pinned
    rows = row_blocks(spec, by_rows=by_rows)
    total, text = _resolve(setting, rows)
    if in_place:
        return _own_tensors(setting, indexed)
    budget = plan_budget(
        spec,
        total,
        text,
        threads=config.reader_threads,
        floor=largest_whole_row(spec, experts, by_rows=by_rows) if experts else 0,
        disk=experts is not None,
        rows=rows,
        pinned=pinned,
    )
    pools, budget = allocate_pools(
        spec,
        budget,
        setting.device,
        rows=rows,
        least=least_slots(spec, pinned),
        room=working_room(
            setting.model.config,
            batch=config.max_batch,
            length=config.max_length,
            nbytes=budget.pools,
        ),
    )
    groups = [spec.group_of(p) for p in range(len(spec.layers))]
    return _Slots(pools=pools, groups=groups, budget=budget)


def _own_tensors(setting: _Setting, indexed: Sequence[tuple[Indexed, ...]]) -> _Slots:
    """The model's Parameters as slots."""
    spec, pinned = setting.spec, setting.pinned
    budget = BudgetPlan(
        total=0,
        slots=tuple(spec.grid.experts),
        chunk=0,
        threads=1,
        staging=0,
        pools=0,
        explanation="the model's own Parameters serve as slots; no memory is freed"
        + (f"; {sum(pinned)} experts pinned by the plan" if pinned else ""),
    )
    pools = [
        SlotPool.over(layer.params, tensors)
        for layer, tensors in zip(spec.layers, indexed, strict=True)
    ]
    return _Slots(pools=pools, groups=list(range(len(spec.layers))), budget=budget)


def _fetcher(
    setting: _Setting,
    budget: BudgetPlan,
    experts: ExpertMap | None,
    indexed: Sequence[tuple[Indexed, ...]],
) -> tuple[Fetcher, BudgetPlan]:
    """What brings experts, and the budget, which says so if the host tier got less than asked."""
    store: Store
    host: HostTier | None = None
    if experts is None:
        store = ParameterStore(indexed)
    else:
        store = DiskStore(experts, setting.spec, chunk=budget.chunk)
        if not setting.device.is_cpu:
            host, budget = _host_tier(setting, budget)
    fetcher = Fetcher(store, setting.device, threads=budget.threads, chunk=budget.chunk, host=host)
    return fetcher, budget


def _host_tier(setting: _Setting, budget: BudgetPlan) -> tuple[HostTier, BudgetPlan]:
    """Pinned memory for as many experts as `host_budget` allows, and enough for one step."""
    spec, device, threads = setting.spec, setting.device, setting.config.reader_threads
    total, _ = resolve_budget(
        setting.config.host_budget,
        spec,
        setting.model.config,
        torch.device("cpu"),
        threads=threads,
    )
    plan = plan_budget(spec, total, "host", threads=threads, floor=0, disk=False)

    def finish(token: Any) -> None:
        if isinstance(token, HostBatch):
            token.wait()
        else:
            device.finish(token)

    fast = budget.slots
    asked = tuple(max(each) for each in zip(plan.slots, fast, strict=True))
    tier, change = allocate_host_tier(spec, asked, device, least=fast, finish=finish)
    if change:
        budget = replace(budget, explanation=f"{budget.explanation}; {change}")
    return tier, budget


def _say_what_is_idle(setting: _Setting, *, by_rows: bool, in_place: bool) -> None:
    """Warn of options that were asked for and change nothing here."""
    config = setting.config
    if config.host_execution == "always" and (setting.device.is_cpu or config.exact):
        why = (
            "exact=True computes every expert on the device"
            if config.exact
            else "the model computes on the host anyway"
        )
        _LOG.warning("host_execution='always' changes nothing: %s", why)
    if config.layout == "rows" and not by_rows and not in_place:
        _LOG.warning(
            "layout='rows' cannot be had here (it needs a CPU with AVX2, float32, float16 or "
            "bfloat16 experts, and exact=False): weights lie as the model has them"
        )
