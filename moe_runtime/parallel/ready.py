"""A model made ready on one rank of several: compared with the others, fitted to memory, loaded.

Each step is a call to the part that owns it; nothing runs here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from moe_runtime.model_spec import MoESpec, read_spec
from moe_runtime.parallel.agreement import require_same, together
from moe_runtime.parallel.footprint import Footprint, cache_bytes, require_memory
from moe_runtime.parallel.held import HeldExperts, held_experts, refuse_modules
from moe_runtime.parallel.link import Link
from moe_runtime.parallel.options import ParallelOptions
from moe_runtime.parallel.shards import open_source
from moe_runtime.parallel.shares import Shares, contiguous_plan, shares_of
from moe_runtime.placement.plan import Plan
from moe_runtime.version import __version__

__all__ = ["ReadyModel", "ready_checkpoint", "ready_model"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadyModel:
    """What an engine needs of one rank.

    Args:
        model: dense weights in place.
        plan, shares: who holds which expert.
        held: this rank's experts, by position.
        footprint: what it was reckoned to take; None of a model that was in memory.
    """

    model: PreTrainedModel
    spec: MoESpec
    plan: Plan
    shares: Shares
    held: Sequence[HeldExperts]
    footprint: Footprint | None = None


def ready_checkpoint(
    path: str,
    prompts: Sequence[Sequence[int]],
    plan: Plan | None,
    options: ParallelOptions,
    link: Link,
    loading: Mapping[str, Any],
) -> ReadyModel:
    """Load a rank's share of a checkpoint, if all ranks agree and machines have room.

    Args:
        loading: options of `from_pretrained` (`dtype`, `revision`, ...).

    Raises:
        ParallelError: ranks differ in checkpoint, plan, release, options or prompts, or another
            rank failed; on every rank.
        BudgetError: weights, keys and values do not fit, with the numbers; before they are loaded.
        PlanError: the plan is for another model or number of ranks.
        CheckpointError, UnsupportedModelError: as `open_source`.
    """
    source = together(link, "opening the checkpoint", lambda: open_source(path, **loading))
    fingerprint = together(link, "reading the checkpoint's fingerprint", source.fingerprint)
    require_same(link, _facts(prompts, plan, options) | {"checkpoint": fingerprint})
    spec = source.spec
    plan = plan if plan is not None else contiguous_plan(spec.grid, link.size)
    shares = _shares(link, plan, spec)
    owned = shares.owned(link.rank)
    need = Footprint(
        experts=source.expert_bytes(owned),
        dense=spec.dense_bytes,
        cache=_cache_bytes(source.config, prompts, options, link.size),
    )
    require_memory(link, need)
    device = str(link.device)
    shard = together(link, "loading weights", lambda: source.load(owned, device=device))
    model = shard.model.eval()
    return ReadyModel(
        model=model,
        spec=shard.spec,
        plan=plan,
        shares=shares,
        held=held_experts(model, shard.spec, owned, shard.tensors),
        footprint=need,
    )


def ready_model(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    plan: Plan | None,
    options: ParallelOptions,
    link: Link,
    experts: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
) -> ReadyModel:
    """A rank's share of a model in memory: copies of its experts, or those given.

    Raises:
        ParallelError, PlanError, UnsupportedModelError: as `ready_checkpoint`.
    """
    spec = together(link, "reading the model", lambda: _spec_of(model))
    require_same(link, _facts(prompts, plan, options) | {"model": spec.fingerprint})
    plan = plan if plan is not None else contiguous_plan(spec.grid, link.size)
    shares = _shares(link, plan, spec)
    held = held_experts(model, spec, shares.owned(link.rank), experts)
    return ReadyModel(model=model, spec=spec, plan=plan, shares=shares, held=held)


def _spec_of(model: PreTrainedModel) -> MoESpec:
    spec = read_spec(model)
    refuse_modules(spec)
    return spec


def _shares(link: Link, plan: Plan, spec: MoESpec) -> Shares:
    """All ranks have the same plan and model, so that it fits on all or on none."""
    return together(link, "fitting the plan", lambda: shares_of(plan, spec, link.size))


def _facts(
    prompts: Sequence[Sequence[int]], plan: Plan | None, options: ParallelOptions
) -> dict[str, Any]:
    """What ranks must have alike, small enough to be shown."""
    return {
        "release": f"moe-runtime {__version__}, transformers {transformers.__version__}",
        "plan": None if plan is None else _digest([layer.hosts for layer in plan.layers]),
        "devices of the plan": None if plan is None else plan.devices,
        "prompts": _digest([[int(token) for token in prompt] for prompt in prompts]),
        "options": {name: str(value) for name, value in asdict(options).items()},
    }


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def _cache_bytes(
    config: PreTrainedConfig,
    prompts: Sequence[Sequence[int]],
    options: ParallelOptions,
    ranks: int,
) -> int:
    return cache_bytes(
        config,
        [len(prompt) for prompt in prompts],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        # A rank of a vanilla run keeps its own prompts' keys and values only.
        share=1 if options.mode == "coherent" else ranks,
    )
