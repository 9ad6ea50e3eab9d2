"""The positive control: the planted model found out and steered, beside what its weights say.

Does not know how the model is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import moe_runtime
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.steering.controls import Controls
from moe_runtime.steering.evaluate import evaluate_steering
from moe_runtime.steering.identify import identify
from moe_runtime.steering.sampling import Sampling
from moe_runtime.steering.tasks import Task
from moe_runtime.steering.values import Steering
from planted_steering import (
    ANSWERS,
    PLANTED,
    accuracy_at,
    answer_of,
    planted_model,
    planted_tokenizer,
    prompt_of,
    reference_of,
)
from steering_figures import evaluation_figures, identification_figures

__all__ = ["planted_control"]

MARKERS = {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}
SEED = 16


def planted_control(sizes: Any, file: Path) -> dict[str, Any]:
    """Identification, accuracy against what the weights say, and controls.

    Args:
        sizes: `bootstrap`, `planted_samples`, `draws` and `resamples` of it.
        file: the evaluation is written there.
    """
    tokenizer, plain = planted_tokenizer(), planted_model()
    model = moe_runtime.attach(planted_model(), expert_budget="auto")
    texts = [reference_of(n, words) for words in (1, 2, 3) for n in range(ANSWERS)]
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        model(**tokenizer(texts, return_tensors="pt", padding=True,
                          return_token_type_ids=False))  # fmt: skip
    trace = recorder.trace
    found = identify(trace, MARKERS, 1, tokenizer=tokenizer, bootstrap=sizes.bootstrap, seed=SEED)
    tasks = [
        Task(id=f"Q{n}", prompt=prompt_of(n), answer=answer_of(n), checker="exact")
        for n in range(ANSWERS)
    ]
    evaluation = evaluate_steering(
        plain,
        tokenizer,
        tasks,
        Steering(betas=dict.fromkeys(found.chosen, 1.0)),
        betas=(0.0, 0.5, 2.0, 4.0, 8.0),
        samples=sizes.planted_samples,
        sampling=Sampling(seed=SEED, max_new_tokens=48, temperature=1.0),
        controls=Controls(kinds=("random", "frequency"), draws=sizes.draws),
        counts=RoutingCounts.from_trace(trace),
        batch_size=128,
        tasks_name="planted",
        resamples=sizes.resamples,
    )
    evaluation.save(file)
    return {
        "planted": list(PLANTED),
        "identification": identification_figures(found, None),
        "constructed": {f"{b:g}": round(accuracy_at(b), 4) for b in (0, 0.5, 1, 2, 4, 8)},
        "evaluation": evaluation_figures(evaluation),
    }
