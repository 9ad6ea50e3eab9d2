"""`generate`: tokens for many prompts with a plan's experts spread over ranks; called on each.

Checks what it is given and loads; an engine runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.agreement import together
from moe_runtime.parallel.engine import Engine
from moe_runtime.parallel.group_link import GroupLink
from moe_runtime.parallel.link import Link
from moe_runtime.parallel.options import ParallelOptions
from moe_runtime.parallel.ready import ReadyModel, ready_checkpoint, ready_model
from moe_runtime.parallel.run import ParallelRun
from moe_runtime.placement.plan import Plan
from moe_runtime.prompt_state import check_prompts

__all__ = ["generate"]


def generate(
    model: PreTrainedModel | str | os.PathLike[str],
    prompts: Sequence[Sequence[int]],
    *,
    plan: Plan | None = None,
    mode: str = "coherent",
    options: ParallelOptions | None = None,
    link: Link | None = None,
    experts: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    loading: Mapping[str, Any] | None = None,
    keep: Callable[[int, int, torch.Tensor], None] | None = None,
    **settings: Any,
) -> ParallelRun:
    """Generate for many prompts on several ranks, each of which calls this with the same arguments.

    In coherent mode a row moves to the rank of its heaviest expert and goes on there: each rank has
    the keys and values of all sequences (ExFlow, 2401.08383, section IV; for more than one expert a
    token, partial sums follow the row). In vanilla mode rows stay home and two all-to-alls a layer
    send them out and back. Tokens are those of one process up to rounding: float32 logits agree to
    about 1e-6 of the largest, so a token can differ only where the top two are that close.

    Args:
        model: a decoder-only model's path, or the model in memory. Of a path each rank loads the
            experts that the plan gives it and no others; of one in memory it copies them, and the
            model is left as it was.
        prompts: token ids of each prompt, one or more.
        plan: for this model and number of ranks; None for blocks of neighbouring experts.
        mode: `"coherent"` or `"vanilla"`.
        options: everything else; `settings` are its fields one by one, in its place.
        link: None for one over torch.distributed's default process group.
        experts: this rank's experts of a model in memory, where they were loaded apart from it: by
            absolute layer index and parameter name `[held, ...]`, in ascending order of expert
            numbers.
        loading: of a path: options of `from_pretrained` (`dtype`, `revision`, ...).
        keep: told, on the rank where a row ended, of prompt number, step and logits `[V]`.

    Returns:
        Tokens and counts, the same on every rank.

    Raises:
        ConfigError: an option out of range, prompts without a token or with unknown ids.
        BudgetError: a path's weights, or keys and values, do not fit into free memory.
        PlanError: a plan for another model or number of ranks.
        UnsupportedModelError: experts that are modules of their own; with check `"stop"` a model
            that coherence does not fit.
        ParallelError: another rank failed (at once, in that one's words), was lost or late, or
            ranks were given different things. After an error that not all ranks have raised by
            themselves the link and its process group are of no use any more, and say so.
    """
    if link is None:
        link = GroupLink()
    with link.telling():
        if options is None:
            options = ParallelOptions(mode=mode, **settings)
        elif settings:
            raise ConfigError(f"give options or {', '.join(settings)}, not both")
        ready, given = _ready(model, prompts, plan, options, link, experts, loading)
        engine = Engine(
            ready.model,
            ready.spec,
            ready.plan,
            ready.shares,
            ready.held,
            link,
            options,
            _stop_tokens(ready.model, options.stop_tokens),
        )
        return engine.run(given, keep)


def _ready(
    model: PreTrainedModel | str | os.PathLike[str],
    prompts: Sequence[Sequence[int]],
    plan: Plan | None,
    options: ParallelOptions,
    link: Link,
    experts: Mapping[int, Mapping[str, torch.Tensor]] | None,
    loading: Mapping[str, Any] | None,
) -> tuple[ReadyModel, list[list[int]]]:
    """The model with this rank's experts, and the prompts, looked at on all ranks."""
    if isinstance(model, PreTrainedModel):
        given = together(link, "checking the prompts", lambda: _checked(model, prompts))
        return ready_model(model, given, plan, options, link, experts), given
    ready = ready_checkpoint(os.fspath(model), prompts, plan, options, link, loading or {})
    return ready, together(link, "checking the prompts", lambda: _checked(ready.model, prompts))


def _checked(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return check_prompts(prompts, model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]


def _stop_tokens(model: PreTrainedModel, given: Collection[int] | None) -> frozenset[int]:
    if given is not None:
        return frozenset(given)
    known: Any = getattr(model.generation_config, "eos_token_id", None)
    if known is None:
        return frozenset()
    return frozenset([known] if isinstance(known, int) else [int(token) for token in known])
