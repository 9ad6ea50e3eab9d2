"""Builds the chain and takes it apart: from_pretrained, attach, detach, record, report.

No algorithm lives here; each step is a call to the part that owns it.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moe_runtime import interface
from moe_runtime.budget import (
    BudgetPlan,
    least_slots,
    plan_budget,
    resolve_budget,
    working_room,
)
from moe_runtime.cache import ExpertCache
from moe_runtime.checkpoint import ExpertMap, map_experts
from moe_runtime.config import RuntimeConfig
from moe_runtime.core import format_bytes
from moe_runtime.device import Device, open_device
from moe_runtime.ending import end_with
from moe_runtime.errors import AttachError, BudgetError, UnsupportedModelError
from moe_runtime.eviction import make_policy
from moe_runtime.executor import Executor, LayerHandle, expert_form
from moe_runtime.expert_tensors import (
    Indexed,
    held_tensors,
    keep_experts,
    move_dense,
    place_placeholders,
)
from moe_runtime.hardware.cache import known_profile
from moe_runtime.host_experts import HostBatch
from moe_runtime.hosting import make_hosting
from moe_runtime.kernels import ExpertForm
from moe_runtime.layout import largest_whole_row, lies_by_rows, row_blocks
from moe_runtime.loading import (
    build_structure,
    load_without_experts,
    read_config,
    resolve_class,
)
from moe_runtime.memory import free_memory, mapped_bytes, resident_set
from moe_runtime.model_spec import MoESpec, read_spec
from moe_runtime.module_hooks import ModuleHooks
from moe_runtime.pinning import Pinning, PlanLike, open_plan
from moe_runtime.prediction import (
    PredictorLike,
    open_predictor,
    predict,
    prediction_record,
    predictor_name,
)
from moe_runtime.predictors.base import Predictor
from moe_runtime.prefetch import Fetcher
from moe_runtime.profiler import Profiler
from moe_runtime.recorder import Recorder
from moe_runtime.report import Report
from moe_runtime.run_record import run_record
from moe_runtime.safetensors_index import CheckpointFiles, open_checkpoint, resolve_shards
from moe_runtime.saving import ExpertStateDict
from moe_runtime.slot_memory import allocate_host_tier, allocate_pools, dense_memory
from moe_runtime.slots import RowBlocks, SlotPool, slot_bytes
from moe_runtime.steps import begin_step, is_calling, step_modules
from moe_runtime.store import DiskStore, HostTier, ParameterStore, Store
from moe_runtime.trace_writer import open_writer

__all__ = [
    "Runtime",
    "attach",
    "detach",
    "from_pretrained",
    "inspect_checkpoint",
    "record",
    "report",
    "runtime_of",
]

_LOG = logging.getLogger("moe_runtime")
_RUNTIME = "_moe_runtime"
_HOOKS = "_moe_runtime_hooks"


class Runtime:
    """One model's experts in a budget. Made by `from_pretrained` and `attach`.

    Attributes:
        spec: the model's MoE structure.
        config: the options as given.
        pinning: what a plan keeps resident, None without a plan.
        predictor: what routing is predicted by, None without.
        budget: what the budget holds.
        cache, executor, profiler: the parts, for whoever wants to look.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: MoESpec,
        config: RuntimeConfig,
        device: Device,
        *,
        paged: bool,
        rss_before: int = 0,
        pinning: Pinning | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self.spec = spec
        self.config = config
        self.device = device
        self.paged = paged
        self.rss_before = rss_before
        self.pinning = pinning
        self.predictor = predictor
        self.budget: BudgetPlan
        self.cache: ExpertCache
        self.executor: Executor
        self.profiler = Profiler(layers=len(spec.layers), grid_size=spec.grid.size)
        self._forms: list[ExpertForm | None] = []  # of experts that are slices of tensors
        self._previous: interface.Previous
        self._fetcher: Fetcher
        self._recorders: list[Recorder] = []
        self._sequence_ids: tuple[int, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        # A copied model shares slots and counters with the one it was copied from.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise AttachError(
            "a model in an expert budget cannot be pickled: save_pretrained it, or detach it first"
        )

    # -- building -------------------------------------------------------------------------------

    def open(
        self,
        *,
        experts: ExpertMap | None = None,
        indexed: Sequence[tuple[Indexed, ...]] = (),
        in_place: bool = False,
    ) -> None:
        """Make store, slots, cache and executor.

        Args:
            experts: where the checkpoint's files hold each expert; None if they are in memory.
            indexed: else, for each layer its tensors, each indexed by expert.
            in_place: these tensors serve as slots; nothing is allocated.
        """
        threads = self.config.reader_threads
        grid = self.spec.grid
        self._read_forms()
        # Decided once: with an automatic budget free memory could tell otherwise a moment later.
        by_rows = not in_place and self._by_rows()
        floor = largest_whole_row(self.spec, experts, by_rows=by_rows) if experts else 0
        disk = experts is not None
        rows = row_blocks(self.spec, by_rows=by_rows)
        total, text = self._resolve(rows)
        pinned = self.pinning.counts if self.pinning else ()
        if not in_place:
            self.budget = plan_budget(
                self.spec,
                total,
                text,
                threads=threads,
                floor=floor,
                disk=disk,
                rows=rows,
                pinned=pinned,
            )
            pools, self.budget = allocate_pools(
                self.spec,
                self.budget,
                self.device,
                rows=rows,
                least=least_slots(self.spec, pinned),
                room=working_room(
                    self.model.config,
                    batch=self.config.max_batch,
                    length=self.config.max_length,
                    nbytes=self.budget.pools,
                ),
            )
            counts: tuple[int, ...] = self.budget.slots
            groups = [self.spec.group_of(p) for p in range(len(self.spec.layers))]
        else:
            counts = grid.experts
            groups = list(range(len(self.spec.layers)))
            pools = [
                SlotPool.over(layer.params, tensors)
                for layer, tensors in zip(self.spec.layers, indexed, strict=True)
            ]
            self.budget = BudgetPlan(
                total=0,
                slots=tuple(counts),
                chunk=floor,
                threads=1,
                staging=0,
                pools=0,
                explanation="the model's own Parameters serve as slots; no memory is freed"
                + (f"; {sum(pinned)} experts pinned by the plan" if pinned else ""),
            )
        policy = make_policy(self.config.policy, grid, **self.config.policy_options)
        self.cache = ExpertCache(grid, groups, counts, policy)
        store: Store = ParameterStore(indexed)
        if experts is not None:
            store = DiskStore(experts, self.spec, chunk=self.budget.chunk)
        self._fetcher = Fetcher(
            store,
            self.device,
            threads=self.budget.threads,
            chunk=self.budget.chunk,
            host=self._host_tier() if disk and not self.device.is_cpu else None,
        )
        self.executor = Executor(
            self.cache,
            pools,
            self._fetcher,
            self.device,
            self.profiler,
            exact=self.config.exact,
            by_rows=by_rows,
        )
        if self.config.host_execution == "always" and (self.device.is_cpu or self.config.exact):
            why = (
                "exact=True computes every expert on the device"
                if self.config.exact
                else ("the model computes on the host anyway")
            )
            _LOG.warning("host_execution='always' changes nothing: %s", why)
        if self.config.layout == "rows" and not by_rows and not in_place:
            _LOG.warning(
                "layout='rows' cannot be had here (it needs a CPU with AVX2, float32, float16 or "
                "bfloat16 experts, and exact=False): weights lie as the model has them"
            )
        if not self.device.is_cpu and not self.config.exact:
            self.executor.slots.hosting = make_hosting(
                self.config.host_execution,
                known_profile(self.config.hardware),
                str(self.device.torch_device),
            )
        if self.predictor is not None:
            if not self.device.is_cpu:
                self._fetcher.measure_copies(max(layer.expert_bytes for layer in self.spec.layers))
            predict(self.executor.loader, self.spec, self.predictor, self.config.prediction_options)
        if by_rows:
            self._forms = [form and replace(form, transposed=True) for form in self._forms]
        if in_place:
            self.cache.adopt_all()
        # The runtime outlives the model that it was made for where a deep copy of that goes on.
        end_with(self, self._fetcher)
        self.executor.slots.end_with(self)

    def _by_rows(self) -> bool:
        """Whether weights are to lie in blocks of rows."""
        total, _ = self._resolve(None)
        everything = sum(slot_bytes(x.params) * x.num_experts for x in self.spec.layers)
        return lies_by_rows(
            self.spec,
            self.config.layout,
            on_cpu=self.device.is_cpu,
            exact=self.config.exact,
            fits=total >= everything,
        )

    def _resolve(self, rows: Sequence[RowBlocks | None] | None) -> tuple[int, str]:
        return resolve_budget(
            self.config.expert_budget,
            self.spec,
            self.model.config,
            self.device.torch_device,
            threads=self.config.reader_threads,
            rows=rows,
            batch=self.config.max_batch,
            length=self.config.max_length,
            dense=self._dense_to_come(),
            profile=known_profile(self.config.hardware),
        )

    def _dense_to_come(self) -> int:
        """Bytes of weights other than experts' that free memory does not yet know of."""
        if self.device.is_cpu:
            # Loaded, they are the checkpoint's mapped pages, which count as free.
            return min(self.spec.dense_bytes, mapped_bytes(".safetensors"))
        return 0  # they are on the device before the slots

    def _read_forms(self) -> None:
        model = self.model
        on_gpu = not self.device.is_cpu
        self._forms = [
            None
            if layer.modules
            else expert_form(model.get_submodule(layer.path), layer, on_gpu=on_gpu)
            for layer in self.spec.layers
        ]

    def _host_tier(self) -> HostTier:
        """Pinned memory for as many experts as `host_budget` allows, and enough for one step."""
        total, _ = resolve_budget(
            self.config.host_budget,
            self.spec,
            self.model.config,
            torch.device("cpu"),
            threads=self.config.reader_threads,
        )
        plan = plan_budget(
            self.spec, total, "host", threads=self.config.reader_threads, floor=0, disk=False
        )

        def finish(token: Any) -> None:
            if isinstance(token, HostBatch):
                token.wait()
            else:
                self.device.finish(token)

        fast = self.budget.slots
        asked = tuple(max(each) for each in zip(plan.slots, fast, strict=True))
        tier, change = allocate_host_tier(self.spec, asked, self.device, least=fast, finish=finish)
        if change:
            told = f"{self.budget.explanation}; {change}"
            self.budget = replace(self.budget, explanation=told)
        return tier

    def install(self) -> None:
        """Hook into the model: its experts, and around its forward calls."""
        model = self.model
        hooks: list[RemovableHandle] = []
        for module in step_modules(model):
            hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        hooks += ModuleHooks(self.executor, self.spec.layers).install(model)
        self._previous = interface.take_over(
            model,
            [
                (model.get_submodule(layer.path), LayerHandle(self.executor, at, layer, form))
                for at, (layer, form) in enumerate(zip(self.spec.layers, self._forms, strict=True))
                if form is not None
            ],
        )
        model.__dict__[_HOOKS] = hooks
        model.__dict__[_RUNTIME] = self

    def uninstall(self, model: PreTrainedModel) -> None:
        """Undo `install` on a model, be it a deep copy of the one that it was done on.

        The experts must have their tensors again before they run.
        """
        for hook in model.__dict__.pop(_HOOKS):
            hook.remove()
        modules = [model.get_submodule(layer.path) for layer in self.spec.layers]
        interface.hand_back(model, modules, self._previous, original=model is self._model())
        del model.__dict__[_RUNTIME]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = begin_step(kwargs, args)
        if self._sequence_ids is not None and len(self._sequence_ids) == step.batch:
            step.sequence_ids = self._sequence_ids
        step.ended = False
        self.profiler.begin_step(decode=step.decode, tokens=step.tokens)
        self.executor.begin_call(step)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        with self.executor.exclusive():
            record = None
            if output is None:  # the call failed
                self.profiler.drop_step()
                for recorder in self._recorders:
                    recorder.discard_step()
            else:
                if self.executor.step is not None:
                    self.executor.step.ended = True
                residents = self.cache.residents() if self.profiler.wants_snapshot() else None
                record = self.profiler.end_step(residents)
        self.executor.end_call(None if record is None else record.seconds)

    @contextmanager
    def sequences(self, numbers: Sequence[int]) -> Iterator[None]:
        """Say whose tokens the forward calls inside the block carry, for all who listen.

        Without it, rows of a batch are taken for the sequences of the calls before, in order.

        Args:
            numbers: a number for each row of the batch; a sequence keeps its own from call to call.
        """
        before, self._sequence_ids = self._sequence_ids, tuple(numbers)
        try:
            yield
        finally:
            self._sequence_ids = before

    # -- looking --------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The model that this runtime runs."""
        model = self._model()
        if model is None:
            raise AttachError("the model of this runtime is gone")
        return model

    def check_integrity(self) -> None:
        """Assert the cache's invariants, between layer steps."""
        with self.executor.exclusive():
            self.cache.check_integrity()

    def reset_counters(self) -> None:
        """Start the profile anew; what is resident stays."""
        with self.executor.exclusive():
            self.cache.reset_counters()
            fresh = Profiler(layers=len(self.spec.layers), grid_size=self.spec.grid.size)
            if self.executor.loader.prediction is not None:
                self.executor.loader.prediction.forecaster.reset_accuracy()
            self.profiler = self.executor.profiler = fresh

    def run_record(self, *, simulate: bool = True) -> dict[str, Any]:
        """The run so far as plain data, the form of a run file.

        Args:
            simulate: also replay the run's routing with LRU, this policy and Belady.
        """
        with self.executor.exclusive():
            return run_record(
                spec=self.spec,
                config=self.config,
                budget=self.budget,
                cache=self.cache,
                profiler=self.profiler,
                device=self.device.torch_device,
                rss_before=self.rss_before,
                simulated=simulate,
                plan=self.pinning.record(self.spec, self.cache) if self.pinning else None,
                prediction=prediction_record(self.executor.loader, self.spec),
            )

    def expert_tensors(self, position: int, expert: int) -> tuple[torch.Tensor, ...]:
        """A copy of one expert's tensors in host memory, from its slot or from the slow tier."""
        with self.executor.exclusive():
            return self.executor.copy_expert(position, expert)

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[Recorder]:
        """Let a recorder listen."""
        self.executor.listeners.append(recorder)
        self._recorders.append(recorder)
        try:
            yield recorder
        finally:
            self.executor.listeners.remove(recorder)
            self._recorders.remove(recorder)
            recorder.flush()


# -- the public verbs ----------------------------------------------------------------------------


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
    options = _check_options(hf_kwargs)
    model_config = read_config(path_or_id, options)
    cls = resolve_class(model_config, auto_class)
    files = _open_files(path_or_id, options)
    if chosen is not None:  # a plan for another model is refused before weights are loaded
        _, built = build_structure(cls, model_config, options.get("dtype"))
        chosen.for_model(_named(built.of(), path_or_id))
    result, structure = load_without_experts(cls, path_or_id, options)
    model: PreTrainedModel = result[0] if isinstance(result, tuple) else result
    spec = _named(structure.of(), path_or_id)
    experts = map_experts(
        model, spec, files, structure.keys, key_mapping=options.get("key_mapping")
    )
    with dense_memory(spec, place.torch_device):
        model.to(place.torch_device)  # type: ignore[arg-type]
    runtime = Runtime(
        model,
        spec,
        config,
        place,
        paged=True,
        rss_before=before,
        pinning=None if chosen is None else chosen.for_model(spec),
        predictor=open_predictor(predictor, spec),
    )
    runtime.open(experts=experts)
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
    if _RUNTIME in model.__dict__:
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
    runtime = Runtime(
        model,
        spec,
        config,
        place,
        paged=False,
        rss_before=resident_set(),
        pinning=None if chosen is None else chosen.for_model(spec),
        predictor=open_predictor(predictor, spec),
    )
    if place.is_cpu:
        runtime.open(indexed=indexed, in_place=expert_budget == "auto")
        _LOG.warning("attach frees no memory on a CPU: the model's experts stay in RAM")
    else:
        try:
            with dense_memory(spec, place.torch_device):
                move_dense(model, spec, place.torch_device)
            runtime.open(indexed=indexed)
        except BaseException:
            move_dense(model, spec, torch.device("cpu"))
            raise
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
    if not runtime.executor.try_stop(lambda thread: is_calling(thread, runtime)):
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


@contextmanager
def record(
    model: PreTrainedModel,
    *,
    tokenizer_id: str = "",
    path: str | os.PathLike[str] | None = None,
    stop_tokens: Collection[int] = (),
) -> Iterator[Recorder]:
    """Record the routing of everything that the model runs inside the block.

    Args:
        model: loaded by `from_pretrained` or attached.
        tokenizer_id: the tokenizer's name or path; the model's if not given.
        path: a `*.trace.safetensors` file to write. Rows then go to parts beside it while the
            model runs, so that memory stays bounded and an interruption loses nothing that is in
            a part; the file is made when the block ends, by an exception too.
        stop_tokens: token ids that end a sequence; see `Recorder`.

    Yields:
        The recorder; its `trace` is a `RoutingTrace`, also after the block (without `path`).

    Raises:
        TraceError: the path exists, does not end in `.safetensors`, or has parts of an earlier
            recording beside it.
    """
    runtime = runtime_of(model)
    if path is None:
        recorder = Recorder(runtime.spec, tokenizer_id, stop_tokens=stop_tokens)
        with runtime.recording(recorder):
            yield recorder
        return
    with open_writer(path) as writer:
        recorder = Recorder(runtime.spec, tokenizer_id, sink=writer.append, stop_tokens=stop_tokens)
        with runtime.recording(recorder):
            yield recorder


def report(model: PreTrainedModel, *, simulate: bool = True) -> Report:
    """What the runtime did since it was made or since its counters were reset."""
    return Report.from_run(runtime_of(model).run_record(simulate=simulate))


def runtime_of(model: PreTrainedModel) -> Runtime:
    """The runtime of a model made by `from_pretrained` or attached."""
    runtime = model.__dict__.get(_RUNTIME)
    if not isinstance(runtime, Runtime):
        raise AttachError(
            f"this {type(model).__name__} has no runtime: load it with moe_runtime.from_pretrained "
            "or call moe_runtime.attach(model)"
        )
    return runtime


def inspect_checkpoint(
    path_or_id: str | os.PathLike[str], *, auto_class: str | None = None, **hf_kwargs: Any
) -> tuple[MoESpec, ExpertMap]:
    """Structure and byte ranges of a checkpoint's experts, without loading a weight.

    Raises:
        As `from_pretrained`.
    """
    options = _check_options(hf_kwargs)
    path_or_id = os.fspath(path_or_id)
    config = read_config(path_or_id, options)
    cls = resolve_class(config, auto_class)
    files = _open_files(path_or_id, options)
    dtype = options.get("dtype", getattr(config, "dtype", None))
    model, structure = build_structure(cls, config, dtype)
    spec = _named(structure.of(), path_or_id)
    return spec, map_experts(model, spec, files, structure.keys)


# -- steps ---------------------------------------------------------------------------------------


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "quantization_config is not supported: the runtime computes with float experts"
        )
    for name in ("device_map", "gguf_file", "tp_plan", "distributed_config"):
        if options.get(name) is not None:
            raise UnsupportedModelError(
                f"{name} cannot be combined with the runtime, which places the weights itself; "
                "use device= and expert_budget="
            )
    return dict(options)


def _open_files(path_or_id: str, options: dict[str, Any]) -> CheckpointFiles:
    chosen = {k: v for k, v in options.items() if k != "variant"}
    shards = resolve_shards(path_or_id, variant=options.get("variant"), **chosen)
    return open_checkpoint(shards)


def _named(spec: MoESpec, path_or_id: str) -> MoESpec:
    return replace(spec, model_id=path_or_id)


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
