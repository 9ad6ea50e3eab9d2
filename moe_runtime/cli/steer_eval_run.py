"""From the options of `steer eval` to the evaluation: files read, model loaded, arms run.

Does not know what is shown of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_runtime.cli.options import tokenizer_options
from moe_runtime.errors import ConfigError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.steering.evaluate import evaluate_steering, spec_of
from moe_runtime.steering.evaluation import SteeringEvaluation
from moe_runtime.steering.files import read_steering
from moe_runtime.steering.tasks import read_tasks
from moe_runtime.trace import RoutingTrace

__all__ = ["run_evaluation"]


def run_evaluation(
    path: str,
    tasks: Path,
    steering: Path,
    traces: list[Path],
    *,
    hub: dict[str, Any],
    runtime: dict[str, Any],
    thinking_only: bool,
    options: dict[str, Any],
) -> SteeringEvaluation:
    """The evaluation; what is small is read first, so that its faults show before a model loads.

    Args:
        path: of the model, a folder or hub id.
        tasks, steering, traces: files.
        hub: for `from_pretrained`.
        runtime: `device`, `policy`, and `expert_budget` where there is one.
        thinking_only: steer only between the markers.
        options: of `evaluate_steering`.
    """
    from transformers import AutoTokenizer

    problems, file = read_tasks(tasks), read_steering(steering)
    counts = [RoutingCounts.from_trace(RoutingTrace.load(one)) for one in traces]
    steered = file.steering
    if thinking_only:
        if not all(options["thinking"]):
            raise ConfigError("--thinking-only needs both markers of --thinking")
        steered = replace(steered, thinking=options["thinking"])
    tokenizer = AutoTokenizer.from_pretrained(path, **tokenizer_options(hub))
    model = _loaded(path, hub, runtime)
    file.check(spec_of(model))
    return evaluate_steering(
        model,
        tokenizer,
        problems,
        steered,
        counts=RoutingCounts.total(counts) if counts else None,
        tasks_name=tasks.name,
        steering_name=steering.name,
        **options,
    )


def _loaded(path: str, hub: dict[str, Any], runtime: dict[str, Any]) -> Any:
    """Inside a budget where one is given, else all of it by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    import moe_runtime

    if "expert_budget" in runtime:
        return moe_runtime.from_pretrained(path, **runtime, **hub)
    device = runtime["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(path, **hub).to(device).eval()
