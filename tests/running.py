"""Running the tiny model through the runtime, in so little memory that every step reads.

Does not know what tests do to it in between.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

import moe_runtime

# (n, act): the n-th read from now on, and only it, is `act` instead; or, where `act` gives None,
# goes on after it.
FailAt: TypeAlias = Callable[[int, Callable[[], int | None]], None]

SMALL = 130_000  # bytes: staging and seven to ten of the 64 experts


def load(path: Path, **options: Any) -> PreTrainedModel:
    """A tiny checkpoint in a small budget on the CPU, unless the options say otherwise."""
    options = {"expert_budget": SMALL, "device": "cpu", **options}
    model = moe_runtime.from_pretrained(path, **options)
    assert isinstance(model, PreTrainedModel)
    return model


def generate(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    """The prompt `[1, T]` and 16 greedy tokens: `[1, T + 16]`."""
    tokens = model.generate(prompt, max_new_tokens=16, do_sample=False)  # type: ignore[operator]
    assert isinstance(tokens, torch.Tensor)
    return tokens


def assert_usable(model: PreTrainedModel, prompt: torch.Tensor, tokens: torch.Tensor) -> None:
    """The cache is whole, and the model generates what it should."""
    moe_runtime.runtime_of(model).check_integrity()
    assert torch.equal(generate(model, prompt), tokens)
    moe_runtime.runtime_of(model).check_integrity()
