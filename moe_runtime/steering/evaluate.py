"""Runs a model on tasks, unsteered, steered and under controls, and makes the evaluation of it.

Knows models, tasks and arms; what the figures mean is said in `evaluation`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import transformers

from moe_runtime.errors import AttachError, ConfigError, UnsupportedModelError
from moe_runtime.model_spec import MoESpec, read_spec
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.runtime import runtime_of
from moe_runtime.steering.arm_runner import ArmRunner, Progress
from moe_runtime.steering.controls import Controls, plan_arms
from moe_runtime.steering.evaluation import EvaluationSettings, SteeringEvaluation
from moe_runtime.steering.journal import Journal
from moe_runtime.steering.sampling import Sampling
from moe_runtime.steering.statistics import cluster_weights
from moe_runtime.steering.summarise import Rules, arm_of, compare
from moe_runtime.steering.tasks import Task, tasks_digest
from moe_runtime.steering.values import Steering
from moe_runtime.version import __version__

__all__ = ["evaluate_steering", "spec_of"]


def evaluate_steering(  # noqa: PLR0913  what an evaluation is made of
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    steering: Steering,
    *,
    betas: Sequence[float],
    samples: int = 16,
    sampling: Sampling | None = None,
    controls: Controls | None = None,
    counts: RoutingCounts | None = None,
    thinking: tuple[str, str] = ("<think>", "</think>"),
    batch_size: int = 32,
    chat: bool = False,
    journal: str | os.PathLike[str] | None = None,
    tasks_name: str = "",
    steering_name: str = "",
    confidence: float = 0.95,
    resamples: int = 10_000,
    progress: Callable[[Progress], None] | None = None,
) -> SteeringEvaluation:
    """Measure what steering does to accuracy, thinking length and answer form.

    Every arm answers the same problems; sample n of a problem is drawn with the same random
    numbers in each arm.

    Args:
        model: decoder-only; plain, or loaded by `moe_runtime.from_pretrained`.
        tokenizer: the model's.
        tasks: of `read_tasks`.
        steering: experts, method, and whether only thinking is steered; `betas` replace its own.
        betas: of all its experts at once, one arm each; 1 is the unsteered arm, which is always
            there.
        samples: of each problem in each arm.
        sampling, controls: see there; by themselves temperature 1 and no controls.
        counts: uses of each expert, for the control "frequency".
        thinking: start and end marker, by which thinking is measured; both "" for a model that
            does not think.
        batch_size: rows of a forward call at the most.
        chat: put prompts into the tokenizer's chat template.
        journal: a file for outcomes as they come. If it is there already, the evaluation goes on
            where that one stopped. The caller removes it when the result is safe.
        confidence, resamples: of intervals and tests.
        progress: called after each batch.

    Raises:
        ConfigError: an option that is not possible, an expert that the model does not have, a
            prompt that is too long, or a journal of another evaluation.
        UnsupportedModelError: an encoder-decoder model, or one without MoE layers.
    """
    sampling, controls = sampling or Sampling(), controls or Controls()
    _require_possible(model, tasks, samples, batch_size, sampling, thinking)
    spec = spec_of(model)
    arms = plan_arms(steering, betas, controls, grid=spec.grid, seed=sampling.seed, counts=counts)
    settings = EvaluationSettings(
        tasks=tasks_name,
        tasks_digest=tasks_digest(tasks),
        steering=steering_name,
        method=steering.method,
        renormalise=steering.renormalise,
        thinking_only=steering.thinking is not None,
        thinking_start=thinking[0],
        thinking_end=thinking[1],
        samples=samples,
        **asdict(sampling),
        prompt_text=controls.prompt_text if "prompt" in controls.kinds else "",
        prompt_place=controls.prompt_place,
        tip_tokens=(controls.tip_tokens or (thinking[1],)) if "tip" in controls.kinds else (),
        tip_penalty=controls.tip_penalty,
        tip_span=controls.tip_span,
        confidence=confidence,
        resamples=resamples,
        chat=chat,
    )
    kept = Journal(
        journal,
        {
            "model": {"id": spec.model_id, "fingerprint": spec.fingerprint},
            "settings": asdict(settings),
            "arms": {arm.name: [list(one) for one in arm.experts] for arm in arms},
            "thinking_steered": steering.thinking,
        },
    )
    runner = ArmRunner(model, tokenizer, tasks, settings, sampling, controls, kept, batch_size)
    runner.require_room()
    runner.run(arms, progress)
    rules = Rules(
        weights=cluster_weights(len(tasks), resamples=resamples, seed=sampling.seed),
        confidence=confidence,
        resamples=resamples,
        seed=sampling.seed,
        greedy=not sampling.temperature,
    )
    problems = tuple(task.id for task in tasks)
    found = tuple(
        arm_of(
            arm, kept.outcomes(arm.name), problems, samples, rules, seconds=kept.seconds(arm.name)
        )
        for arm in arms
    )
    return SteeringEvaluation(
        model_id=spec.model_id,
        fingerprint=spec.fingerprint,
        layer_ids=spec.grid.layers,
        experts=spec.grid.experts,
        settings=settings,
        problem_ids=problems,
        families=tuple(task.family for task in tasks),
        arms=found,
        comparisons=compare(found, samples, rules),
        versions=_versions(),
    )


def _require_possible(
    model: Any,
    tasks: Sequence[Task],
    samples: int,
    batch_size: int,
    sampling: Sampling,
    thinking: tuple[str, str],
) -> None:
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError("steering is evaluated on decoder-only models")
    if not tasks:
        raise ConfigError("there is no task to evaluate on")
    if samples < 1 or batch_size < 1:
        raise ConfigError(
            f"samples and batch size have to be 1 or more, found {samples} and {batch_size}"
        )
    if not sampling.temperature and samples > 1:
        raise ConfigError(
            f"temperature 0 gives the same answer each time, so {samples} samples say no more "
            "than one; give samples 1, or a temperature"
        )
    if thinking[0] and not thinking[1]:
        raise ConfigError(f"thinking that starts with {thinking[0]!r} needs an end marker too")


def spec_of(model: Any) -> MoESpec:
    """The structure of a model, attached to a runtime or not."""
    try:
        return runtime_of(model).spec
    except AttachError:
        return read_spec(model, model_id=str(getattr(model.config, "_name_or_path", "")))


def _versions() -> tuple[tuple[str, str], ...]:
    return (
        ("moe_runtime", __version__),
        ("torch", str(torch.__version__)),
        ("transformers", transformers.__version__),
        ("numpy", np.__version__),
        ("python", platform.python_version()),
    )
