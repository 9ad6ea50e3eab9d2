"""`steer`: reinforce experts of a model while a block of code runs, and leave no trace of it.

Reads what is asked for, checks it against the model, and puts the hooks in and takes them out; what
they do is their own modules' business.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from moe_runtime.errors import AttachError, ConfigError
from moe_runtime.model_spec import MoELayer, MoESpec, read_spec
from moe_runtime.runtime import Runtime, runtime_of
from moe_runtime.steering.experts_hook import ExpertsHook
from moe_runtime.steering.factors import LayerFactors, UseCounter
from moe_runtime.steering.files import read_steering
from moe_runtime.steering.markers import marker_of
from moe_runtime.steering.rows import CallRows
from moe_runtime.steering.spans import ThinkingSpans
from moe_runtime.steering.values import Beta, Method, Steering
from moe_runtime.steps import Step, step_modules

__all__ = ["SteeringHandle", "SteeringLike", "steer"]

# What `betas` may be: also a list or an array of numbers for the rows of a batch.
SteeringLike: TypeAlias = (
    Steering | str | os.PathLike[str] | Mapping[tuple[int, int], Beta | Sequence[float]]
)


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
    asked = _resolve(steering, spec, method, renormalise, thinking)
    _require_experts(asked, spec)
    if asked.method != "multiply" or pin:
        raise ConfigError("steer: only method='multiply' without pin=True is there so far")
    if any(layer.modules for layer in spec.layers):
        raise ConfigError("steer: experts that are modules of their own are not supported so far")
    rows = CallRows(
        batch=_batch(asked),
        new_spans=_new_spans(asked.thinking, tokenizer),
        runtime_step=lambda: _runtime_step(model),
    )
    with ExitStack() as undo:
        counters: dict[int, UseCounter] = {}
        for layer, betas in _by_layer(asked, spec):
            counters[layer.layer] = UseCounter(layer.num_experts)
            for hook in _install(model, layer, betas, asked, rows, counters[layer.layer]):
                undo.callback(hook.remove)
        if counters:
            for hook in rows.install(step_modules(model)):
                undo.callback(hook.remove)
        yield SteeringHandle(asked, rows, counters)


def _install(
    model: PreTrainedModel,
    layer: MoELayer,
    betas: Mapping[int, Beta],
    steering: Steering,
    rows: CallRows,
    uses: UseCounter,
) -> Iterator[Any]:
    """The hooks of one layer, each as soon as it is in."""
    factors = LayerFactors(
        layer.num_experts, betas, batch=rows.batch, renormalise=steering.renormalise
    )
    hook = ExpertsHook(layer.path, factors, rows, uses)
    yield model.get_submodule(layer.path).register_forward_pre_hook(hook, with_kwargs=True)


# -- what is asked for ------------------------------------------------------------------------


def _resolve(
    given: SteeringLike,
    spec: MoESpec,
    method: Method | None,
    renormalise: bool | None,
    thinking: tuple[str, str] | None,
) -> Steering:
    """One value of the forms that `steer` takes."""
    if isinstance(given, Steering):
        found = given
    elif isinstance(given, str | os.PathLike):
        file = read_steering(given)
        file.check(spec)
        found = file.steering
    elif isinstance(given, Mapping):
        found = Steering(betas={_name(name): _beta(name, beta) for name, beta in given.items()})
    else:
        raise ConfigError(
            "steer takes {(layer, expert): beta}, a Steering or a steering file's path, found "
            f"{type(given).__name__}"
        )
    changes: dict[str, Any] = {"method": method, "renormalise": renormalise, "thinking": thinking}
    return replace(found, **{name: one for name, one in changes.items() if one is not None})


def _name(name: Any) -> tuple[int, int]:
    try:
        layer, expert = name
        return int(layer), int(expert)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"steer: {name!r:.80} names no expert; write {{(layer, expert): beta}}"
        ) from error


def _beta(name: Any, beta: Any) -> Beta:
    try:
        if isinstance(beta, Sequence) or getattr(beta, "ndim", 0):
            return tuple(float(one) for one in beta)
        return float(beta)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"steer: the beta of {name!r:.80} has to be a number, or one for each row of the "
            f"batch, found {beta!r:.80}"
        ) from error


def _require_experts(steering: Steering, spec: MoESpec) -> None:
    """ConfigError unless the model has all the experts."""
    name = spec.model_id or spec.model_class
    counts = dict(zip(spec.grid.layers, spec.grid.experts, strict=True))
    for layer, expert in steering.betas:
        if layer not in counts:
            raise ConfigError(
                f"steer: layer {layer} of {name} has no routed experts; those with experts are "
                f"{_ranges(spec.grid.layers)}"
            )
        if not 0 <= expert < counts[layer]:
            raise ConfigError(
                f"steer: layer {layer} of {name} has {counts[layer]} experts, numbered from 0; "
                f"found expert {expert}"
            )


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7` for 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _batch(steering: Steering) -> int | None:
    """Rows that betas are given for; None if no beta differs between rows.

    Raises:
        ConfigError: they are given for several numbers of rows.
    """
    sizes = {
        len(beta): (layer, expert)
        for (layer, expert), beta in steering.betas.items()
        if isinstance(beta, tuple)
    }
    if len(sizes) > 1 or 0 in sizes:
        found = ", ".join(f"{size} for {name}" for size, name in sorted(sizes.items()))
        raise ConfigError(
            f"steer: betas for the rows of a batch have to be as many for every expert, and at "
            f"least one; found {found}"
        )
    return next(iter(sizes), None)


def _by_layer(steering: Steering, spec: MoESpec) -> Iterator[tuple[MoELayer, dict[int, Beta]]]:
    """The layers in which something is to be done, with the betas of their experts."""
    for layer in spec.layers:
        betas = {e: beta for (at, e), beta in steering.betas.items() if at == layer.layer}
        flat = [b for beta in betas.values() for b in (beta if isinstance(beta, tuple) else [beta])]
        if betas and (steering.method == "force" or any(beta != 1 for beta in flat)):
            yield layer, betas


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


def _runtime_step(model: PreTrainedModel) -> Step | None:
    """The forward call under way as an attached runtime has read it."""
    runtime = _runtime_of(model)
    return None if runtime is None else runtime.executor.step
