"""Comparing a run over many prompts with each prompt run alone.

Knows the model's forward and what a run kept; no batches, no schedules.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from moe_runtime.batch_run import Agreement
from moe_runtime.prompt_state import PromptState
from moe_runtime.token_choice import TokenChoice

__all__ = ["compare_alone"]

_CLOSE = 1e-5
# Differences, relative to the largest logit, up to which a token may differ by rounding: other sums
# in other batches, and now and then a router whose last choice was as close. More is a fault.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}


def compare_alone(
    model: PreTrainedModel, prompts: Sequence[PromptState], choices: Sequence[TokenChoice]
) -> Agreement:
    """Feed each prompt with its new tokens to the model alone, in one call, and compare each step.

    Args:
        model: the model that ran.
        prompts: as the run left them, with the largest logits of each step kept.
        choices: a fresh one for each prompt: the noise of the run again.
    """
    rounding = _ROUNDING.get(model.dtype, 1e-3)
    accepted = inspect.signature(model.forward).parameters
    steps = beyond = near_ties = different = 0
    largest = 0.0
    for state, choice in zip(prompts, choices, strict=True):
        fed = torch.tensor([[*state.prompt, *state.tokens[:-1]]], device=model.device)
        count = len(state.tokens)
        options = {"logits_to_keep": count} if "logits_to_keep" in accepted else {}
        with torch.no_grad():
            output = model(input_ids=fed, use_cache=False, **options)
        reference = output.logits[0, -count:].float().to("cpu")
        for logits, token, kept in zip(reference, state.tokens, state.kept, strict=True):
            difference = float((logits[kept.ids] - kept.values).abs().max())
            relative = difference / max(float(logits.abs().max()), torch.finfo().tiny)
            steps += 1
            largest = max(largest, relative)
            beyond += relative > _CLOSE
            top = choice.scores(logits).topk(2)
            if int(top.indices[0]) != token:
                margin = float(top.values[0] - top.values[1])
                # Both may move by the difference, one up and one down.
                close = margin <= 2.0 * difference * choice.scale
                tie = close and relative <= rounding
                near_ties, different = near_ties + tie, different + (not tie)
    return Agreement(
        steps=steps, largest=largest, beyond=beyond, near_ties=near_ties, different=different
    )
