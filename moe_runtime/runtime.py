"""A model's runtime: what watches its forward calls, what is asked of it, what it tells.

Does not know how its parts are made (`assembly`), nor how a model comes to have one (`lifecycle`).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moe_runtime import interface
from moe_runtime.assembly import Parts
from moe_runtime.config import RuntimeConfig
from moe_runtime.device import Device
from moe_runtime.ending import end_with
from moe_runtime.errors import AttachError
from moe_runtime.executor import LayerHandle
from moe_runtime.model_spec import MoESpec
from moe_runtime.module_hooks import ModuleHooks
from moe_runtime.pinning import Pinning
from moe_runtime.prediction import prediction_record
from moe_runtime.predictors.base import Predictor
from moe_runtime.profiler import Profiler
from moe_runtime.recorder import Recorder
from moe_runtime.report import Report
from moe_runtime.run_record import run_record
from moe_runtime.steps import begin_step, step_modules
from moe_runtime.trace_writer import open_writer

__all__ = ["RUNTIME", "Runtime", "record", "report", "runtime_of"]

RUNTIME = "_moe_runtime"  # the model's attribute that holds its runtime
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
        parts: Parts,
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
        self.budget = parts.budget
        self.cache = parts.cache
        self.executor = parts.executor
        self.profiler = parts.profiler
        self._forms = parts.forms
        self._previous: interface.Previous
        self._recorders: list[Recorder] = []
        self._sequence_ids: tuple[int, ...] | None = None
        # The runtime outlives the model that it was made for where a deep copy of that goes on.
        end_with(self, parts.fetcher)
        parts.executor.slots.end_with(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        # A copied model shares slots and counters with the one it was copied from.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise AttachError(
            "a model in an expert budget cannot be pickled: save_pretrained it, or detach it first"
        )

    # -- a model's calls ------------------------------------------------------------------------

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
        model.__dict__[RUNTIME] = self

    def uninstall(self, model: PreTrainedModel) -> None:
        """Undo `install` on a model, be it a deep copy of the one that it was done on.

        The experts must have their tensors again before they run.
        """
        for hook in model.__dict__.pop(_HOOKS):
            hook.remove()
        modules = [model.get_submodule(layer.path) for layer in self.spec.layers]
        interface.hand_back(model, modules, self._previous, original=model is self._model())
        del model.__dict__[RUNTIME]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = begin_step(kwargs, args)
        if self._sequence_ids is not None and len(self._sequence_ids) == step.batch:
            step.sequence_ids = self._sequence_ids
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


def runtime_of(model: PreTrainedModel) -> Runtime:
    """The runtime of a model made by `from_pretrained` or attached."""
    runtime = model.__dict__.get(RUNTIME)
    if not isinstance(runtime, Runtime):
        raise AttachError(
            f"this {type(model).__name__} has no runtime: load it with moe_runtime.from_pretrained "
            "or call moe_runtime.attach(model)"
        )
    return runtime


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
