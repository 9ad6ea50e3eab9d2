"""`steer`: reinforce experts of a model while a block of code runs, and leave no trace of it.

Reads what is asked for, checks it against the model, and puts the hooks in and takes them out; what
they do is their own modules' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moe_runtime.errors import AttachError, ConfigError
from moe_runtime.model_spec import MoELayer, read_spec
from moe_runtime.runtime import Runtime, runtime_of
from moe_runtime.steering.experts_hook import ExpertsHook
from moe_runtime.steering.factors import LayerFactors, UseCounter
from moe_runtime.steering.markers import marker_of
from moe_runtime.steering.request import (
    SteeringLike,
    batch_size,
    by_layer,
    require_possible,
    resolve,
)
from moe_runtime.steering.router_hook import RouterHook
from moe_runtime.steering.rows import CallRows
from moe_runtime.steering.separate_experts import SeparateExperts
from moe_runtime.steering.slots import keep_in_slots
from moe_runtime.steering.spans import ThinkingSpans
from moe_runtime.steering.values import Beta, Method, Steering
from moe_runtime.steps import step_modules

__all__ = ["SteeringHandle", "steer"]


class SteeringHandle:
    """What a block of steering does and has done; it can be read after the block, too.

    Attributes:
        steering: what is done.
    """

    def __init__(
        self, steering: Steering, rows: CallRows, counters: Mapping[int, UseCounter]
    ) -> None:
        self.steering = steering
        self._rows = rows
        self._counters = counters

    @property
    def uses(self) -> dict[tuple[int, int], int]:
        """`{(layer, expert): uses}`: in how many steered rows a steered expert was chosen.

        Experts of layers in which every beta is 1 are not counted: nothing is hooked there.
        """
        return {
            (layer, expert): self._counters[layer].of(expert)
            for layer, expert in self.steering.betas
            if layer in self._counters
        }

    @property
    def steered_positions(self) -> tuple[int, ...]:
        """Positions inside thinking spans so far, of the sequence in each row of the last call.

        Empty without `thinking=`.
        """
        return self._rows.counts


@contextmanager
def steer(
    model: PreTrainedModel,
    steering: SteeringLike,
    *,
    method: Method | None = None,
    renormalise: bool | None = None,
    thinking: tuple[str, str] | None = None,
    tokenizer: Any = None,
    pin: bool = False,
) -> Iterator[SteeringHandle]:
    """Reinforce experts in everything that the model runs inside the block.

    Where the router chose the expert, its weight is multiplied by beta, after top-k, normalisation
    and scaling; the weights are not normalised again, and what is chosen does not change (RICE,
    arXiv 2505.14681, section 3). Rows of padding are left alone. Blocks nest: an inner one
    multiplies what an outer one has made of the weights. A routing trace that is recorded inside
    the block holds the steered weights; of experts that are modules of their own the router's.

    Args:
        model: plain, attached, or loaded by `moe_runtime.from_pretrained`.
        steering: `{(layer, expert): beta}` with absolute layer indices, a `Steering`, or a
            `*.steer.json` file. A beta is one number, or one for each row of the batch: a row is
            one of the model's own forward call, of which `generate` makes one for each beam and
            each of `num_return_sequences`.
        method, renormalise, thinking: see `Steering`; what is given here goes before what
            `steering` says. "force" takes the place of the choice of least weight where the expert
            was not chosen, and that weight times beta; a beta of 1 is forced too.
        tokenizer: the model's, to find the markers of `thinking`. Sequences are followed by their
            row (or by `Runtime.sequences`) from a call with an empty cache on: beam search, whose
            beams change rows, must not be combined with `thinking`.
        pin: keep the steered experts in their slots until the block ends. Needs a runtime.

    Yields:
        A handle that counts.

    Raises:
        ConfigError: a beta, layer or expert that cannot be; a file that is damaged or for another
            model; `thinking` without a tokenizer.
        BudgetError: fewer slots than the experts to be pinned need.
        UnsupportedModelError: no MoE model, or one whose routing cannot be changed in this way.
        AttachError: `pin` without a runtime. During a call also: rows cannot be told.
    """
    runtime = _runtime_of(model)
    spec = runtime.spec if runtime is not None else read_spec(model)
    asked = resolve(steering, spec, method, renormalise, thinking)
    require_possible(asked, spec)
    rows = CallRows(
        batch=batch_size(asked),
        new_spans=_new_spans(asked.thinking, tokenizer),
        runtime_step=lambda: None if runtime is None else runtime.executor.step,
    )
    with ExitStack() as undo:
        counters: dict[int, UseCounter] = {}
        for layer, betas in by_layer(asked, spec):
            counters[layer.layer] = UseCounter(layer.num_experts)
            for hook in _install(model, layer, betas, asked, rows, counters[layer.layer]):
                undo.callback(hook.remove)
        if counters:
            for hook in rows.install(step_modules(model)):
                undo.callback(hook.remove)
        if pin:
            undo.enter_context(keep_in_slots(runtime, asked.betas))
        yield SteeringHandle(asked, rows, counters)


def _install(
    model: PreTrainedModel,
    layer: MoELayer,
    betas: Mapping[int, Beta],
    steering: Steering,
    rows: CallRows,
    uses: UseCounter,
) -> Iterator[RemovableHandle]:
    """The hooks of one layer, each as soon as it is in."""
    router = None
    if steering.method == "logit_bias":
        router = RouterHook(model, layer, betas, rows)
        yield from router.install()
    if layer.modules:
        scaled = {} if router is not None else betas
        separate = SeparateExperts(
            layer, scaled, counted=betas, rows=rows, uses=uses, router=router
        )
        yield from separate.install(model)
        return
    factors = None
    if router is None:
        factors = LayerFactors(
            layer.num_experts, betas, batch=rows.batch, renormalise=steering.renormalise
        )
    force = sorted(betas) if steering.method == "force" else ()
    hook = ExpertsHook(layer.path, rows, uses, factors=factors, force=force, router=router)
    yield model.get_submodule(layer.path).register_forward_pre_hook(hook, with_kwargs=True)


def _new_spans(
    thinking: tuple[str, str] | None, tokenizer: Any
) -> Callable[[], ThinkingSpans] | None:
    """What makes the spans between these markers.

    Raises:
        ConfigError: no tokenizer, an unknown marker, or one marker for both.
    """
    if thinking is None:
        return None
    if isinstance(thinking, str) or len(thinking) != 2 or thinking[0] == thinking[1]:
        raise ConfigError(
            "thinking= takes two different texts, the start and the end marker, found "
            f"{thinking!r:.80}"
        )
    if tokenizer is None:
        raise ConfigError(
            f"thinking={thinking!r} needs tokenizer=, the model's, to know the markers' token ids"
        )
    start, end = (marker_of(tokenizer, text).variants for text in thinking)
    return lambda: ThinkingSpans(start, end)


# -- the runtime, if there is one ---------------------------------------------------------------


def _runtime_of(model: PreTrainedModel) -> Runtime | None:
    try:
        return runtime_of(model)
    except AttachError:
        return None
