"""Prompts on their way through the decode loop, and what the loop is to do, as values.

Knows no models, no caches and no schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_runtime.errors import ConfigError
from moe_runtime.token_choice import TokenChoice

__all__ = ["Kept", "LoopOptions", "PromptState", "check_prompts"]


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    """The prompts as lists of token ids.

    Args:
        vocabulary: ids are below this.

    Raises:
        ConfigError: none, one without a token, or an id that the model does not have.
    """
    if not len(prompts):
        raise ConfigError("no prompts: give one at least")
    given: Sequence[Any] = prompts
    for number, prompt in enumerate(given):
        if isinstance(prompt, str) or not len(prompt):
            raise ConfigError(
                f"prompt {number} is {prompt!r:.40}; a prompt is a list of one or more token ids"
            )
        wrong = next((token for token in prompt if not 0 <= int(token) < vocabulary), None)
        if wrong is not None:
            raise ConfigError(
                f"prompt {number} has the token id {wrong}; the model's vocabulary has ids 0 to "
                f"{vocabulary - 1}: use its own tokenizer"
            )
    return [[int(token) for token in prompt] for prompt in given]


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What the loop does; see `generate_batches`.

    `method` is None where sequences stay in order, `window` a number of batches, `stop_tokens` the
    ids that end a sequence; `keep_logits` keeps the largest of each step.
    """

    batch_size: int
    window: int
    max_new_tokens: int
    stop_tokens: frozenset[int]
    method: str | None
    every: int
    least_gain: float
    seed: int
    keep_logits: bool


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The largest logits of one step: `values [64]` float32, of the tokens `ids [64]`."""

    values: torch.Tensor
    ids: torch.Tensor


@dataclass(eq=False, kw_only=True)
class PromptState:
    """One prompt on its way: `tokens` are the new ones, the last of them not fed yet.

    `last_call` is the number of the forward call that it was in last.
    """

    number: int
    prompt: Sequence[int]
    choice: TokenChoice
    tokens: list[int] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    done: bool = False
    last_call: int = 0

    @property
    def fed(self) -> int:
        """Tokens that have gone into the model, prompt and new ones."""
        return len(self.prompt) + len(self.tokens) - 1
