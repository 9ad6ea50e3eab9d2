"""Puts a model into an expert budget and takes it out again: from_pretrained, attach, detach.

No algorithm lives here; each step is a call to the part that owns it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.assembly import assemble
from moe_runtime.checkpoint import map_experts
from moe_runtime.config import RuntimeConfig
from moe_runtime.core import format_bytes
from moe_runtime.device import open_device
from moe_runtime.errors import AttachError, BudgetError
from moe_runtime.expert_tensors import (
    held_tensors,
    keep_experts,
    move_dense,
    place_placeholders,
)
from moe_runtime.inspection import check_options, open_files
from moe_runtime.loading import build_structure, load_without_experts, read_config, resolve_class
from moe_runtime.memory import free_memory, resident_set
from moe_runtime.model_spec import read_spec
from moe_runtime.pinning import PlanLike, open_plan
from moe_runtime.prediction import PredictorLike, open_predictor, predictor_name
from moe_runtime.runtime import RUNTIME, Runtime, runtime_of
from moe_runtime.saving import ExpertStateDict
from moe_runtime.slot_memory import dense_memory

__all__ = ["attach", "detach", "from_pretrained"]

_LOG = logging.getLogger("moe_runtime")


def from_pretrained(  # noqa: PLR0913  the options of `RuntimeConfig`
    path_or_id: str | os.PathLike[str],
    *,
    expert_budget: int | str = "auto",
    host_budget: int | str = "auto",
    device: str = "auto",
    policy: str = "lru",
    policy_options: Mapping[str, Any] | None = None,
    exact: bool = False,
    layout: str = "auto",
    reader_threads: int = 3,
    preload: bool | str = "auto",
    plan: PlanLike | None = None,
    predictor: PredictorLike | None = None,
    prediction_options: Mapping[str, Any] | None = None,
    max_batch: int = 1,
    max_length: int = 4096,
    hardware: str | None = "auto",
    host_execution: str = "auto",
    auto_class: str | None = None,
    **hf_kwargs: Any,
) -> Any:
    """Load a MoE model whose experts stay in a budget.

    Args:
        path_or_id: a folder or a hub id, as `AutoModelForCausalLM.from_pretrained` takes it.
        expert_budget, host_budget, device, policy, policy_options, exact, layout, reader_threads,
            preload: see `RuntimeConfig`.
        plan: a plan file or a `Plan` for one device: the experts of its tier `"device"` are loaded
            at the start and stay; the policy has the rest of the budget.
        predictor: a predictor file (`moe-runtime train-predictor`) or a `Predictor`: experts are
            loaded ahead of their layers and kept by what it forecasts, as long as that pays.
        prediction_options, max_batch, max_length, hardware, host_execution: see `RuntimeConfig`.
        auto_class: name of the auto class to load with; None for the first that knows the model.
        hf_kwargs: passed on (`revision`, `subfolder`, `variant`, `local_files_only`, `dtype`, ...).

    Returns:
        The model, of its own transformers class, in evaluation mode; with
        `output_loading_info=True` the pair that transformers returns.

    Raises:
        UnsupportedModelError: no MoE layer behind transformers' experts interface and no list of
            expert modules, or quantised.
        BudgetError: the budget does not hold one layer's top-k beside what the plan pins; says the
            least that works.
        PlanError: the plan is damaged, for another model, or for several devices.
        CheckpointError: the checkpoint is damaged or incomplete.
    """
    chosen = open_plan(plan)
    config = RuntimeConfig(
        expert_budget=expert_budget,
        host_budget=host_budget,
        device=device,
        policy=policy,
        policy_options=policy_options or {},
        exact=exact,
        layout=layout,
        reader_threads=reader_threads,
        preload=preload,
        plan=None if chosen is None else chosen.name,
        predictor=predictor_name(predictor),
        prediction_options=prediction_options or {},
        max_batch=max_batch,
        max_length=max_length,
        hardware=hardware,
        host_execution=host_execution,
    )
    place = open_device(device)
    before = resident_set()
    path_or_id = os.fspath(path_or_id)
    options = check_options(hf_kwargs)
    model_config = read_config(path_or_id, options)
    cls = resolve_class(model_config, auto_class)
    files = open_files(path_or_id, options)
    if chosen is not None:  # a plan for another model is refused before weights are loaded
        _, built = build_structure(cls, model_config, options.get("dtype"))
        chosen.for_model(replace(built.of(), model_id=path_or_id))
    result, structure = load_without_experts(cls, path_or_id, options)
    model: PreTrainedModel = result[0] if isinstance(result, tuple) else result
    spec = replace(structure.of(), model_id=path_or_id)
    experts = map_experts(
        model, spec, files, structure.keys, key_mapping=options.get("key_mapping")
    )
    with dense_memory(spec, place.torch_device):
        model.to(place.torch_device)  # type: ignore[arg-type]
    pinning = None if chosen is None else chosen.for_model(spec)
    opened = open_predictor(predictor, spec)
    parts = assemble(model, spec, config, place, experts=experts, pinning=pinning, predictor=opened)
    runtime = Runtime(
        model, spec, config, place, parts,
        paged=True, rss_before=before, pinning=pinning, predictor=opened,
    )  # fmt: skip
    place_placeholders(model, spec, place.torch_device)
    runtime.install()
    _LOG.info("%s: %s", path_or_id, runtime.budget.explanation)
    ExpertStateDict(runtime, experts).install(model)
    _preload(runtime)
    return result


def attach(  # noqa: PLR0913  as above
    model: PreTrainedModel,
    *,
    expert_budget: int | str = "auto",
    host_budget: int | str = "auto",
    device: str = "auto",
    policy: str = "lru",
    policy_options: Mapping[str, Any] | None = None,
    exact: bool = False,
    layout: str = "auto",
    reader_threads: int = 3,
    preload: bool | str = "auto",
    plan: PlanLike | None = None,
    predictor: PredictorLike | None = None,
    prediction_options: Mapping[str, Any] | None = None,
    max_batch: int = 1,
    max_length: int = 4096,
    hardware: str | None = "auto",
    host_execution: str = "auto",
) -> PreTrainedModel:
    """Run a model that is already in memory through the runtime; its Parameters are the host tier.

    On a GPU its dense part moves there and its experts are paged in. On a CPU no memory is freed:
    with `expert_budget="auto"` the Parameters are computed with in place; an explicit budget makes
    slots beside them (to try policies and budgets out).

    Returns:
        The same model.

    Raises:
        AttachError: it is attached already.
        UnsupportedModelError, BudgetError, PlanError: as `from_pretrained`.
    """
    if RUNTIME in model.__dict__:
        raise AttachError("this model is attached already; moe_runtime.detach(model) first")
    chosen = open_plan(plan)
    config = RuntimeConfig(
        expert_budget=expert_budget,
        host_budget=host_budget,
        device=device,
        policy=policy,
        policy_options=policy_options or {},
        exact=exact,
        layout=layout,
        reader_threads=reader_threads,
        preload=preload,
        plan=None if chosen is None else chosen.name,
        predictor=predictor_name(predictor),
        prediction_options=prediction_options or {},
        max_batch=max_batch,
        max_length=max_length,
        hardware=hardware,
        host_execution=host_execution,
    )
    place = open_device(device)
    spec = read_spec(model)
    indexed = [held_tensors(model, layer) for layer in spec.layers]
    away = {one.device.type for tensors in indexed for each in tensors for one in each} - {"cpu"}
    if away:
        raise AttachError(
            f"the experts lie on {away.pop()}; attach takes a model whose experts are in host "
            "memory (load it with device_map='cpu')"
        )
    before = resident_set()
    pinning = None if chosen is None else chosen.for_model(spec)
    opened = open_predictor(predictor, spec)
    build = partial(
        assemble, model, spec, config, place, indexed=indexed, pinning=pinning, predictor=opened
    )
    if place.is_cpu:
        parts = build(in_place=expert_budget == "auto")
        _LOG.warning("attach frees no memory on a CPU: the model's experts stay in RAM")
    else:
        try:
            with dense_memory(spec, place.torch_device):
                move_dense(model, spec, place.torch_device)
            parts = build()
        except BaseException:
            move_dense(model, spec, torch.device("cpu"))
            raise
    runtime = Runtime(
        model, spec, config, place, parts,
        paged=False, rss_before=before, pinning=pinning, predictor=opened,
    )  # fmt: skip
    runtime.install()
    _preload(runtime)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach` exactly, or load every expert of a model made by `from_pretrained`.

    Raises:
        AttachError: not attached, or a call is under way.
        BudgetError: the experts do not fit in free memory; says how many bytes they take.
    """
    runtime = runtime_of(model)
    if not runtime.executor.try_stop():
        raise AttachError("a call is under way on this model; detach it when it has returned")
    try:
        if runtime.paged:
            _load_experts(model, runtime)
        elif not runtime.device.is_cpu:
            move_dense(model, runtime.spec, torch.device("cpu"))
        ExpertStateDict.remove(model)
        runtime.uninstall(model)
    finally:
        runtime.executor.resume()
    return model


def _preload(runtime: Runtime) -> None:
    if runtime.pinning is not None:
        runtime.pinning.apply(runtime.executor)
    fits = sum(runtime.budget.slots) >= runtime.spec.grid.size
    if runtime.config.preload is True or (runtime.config.preload == "auto" and fits):
        runtime.executor.preload()


def _load_experts(model: PreTrainedModel, runtime: Runtime) -> None:
    """Give the experts their Parameters back, read from slots and the checkpoint."""
    spec = runtime.spec
    device = runtime.device.torch_device
    need = spec.total_expert_bytes
    free = free_memory(device)
    if need > free:
        raise BudgetError(
            f"detach would load all experts: {need} bytes ({format_bytes(need)}), but "
            f"{format_bytes(free)} are free on {device.type}"
        )
    keep_experts(model, spec, runtime.expert_tensors, device)
