"""Runs the arms of an evaluation: every sample that is still missing, into the journal.

Knows models, tasks and arms; not what is made of the outcomes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import LogitsProcessor

from moe_runtime.errors import ConfigError
from moe_runtime.steering.attach import steer
from moe_runtime.steering.controls import ArmPlan, Controls, with_prompt
from moe_runtime.steering.evaluation import EvaluationSettings
from moe_runtime.steering.journal import Journal
from moe_runtime.steering.markers import marker_of
from moe_runtime.steering.outcomes import Markers, Outcome, outcome_of
from moe_runtime.steering.sampling import Completion, Request, Sampling, complete
from moe_runtime.steering.tasks import Task
from moe_runtime.steering.thought_penalty import ThoughtSwitchingPenalty

__all__ = ["ArmRunner", "Progress"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an evaluation is: samples done of all, and what this run has generated."""

    arm: str
    done: int
    total: int
    new_tokens: int
    seconds: float


class ArmRunner:
    """A model with its tasks, on which arms run.

    Args:
        model, tokenizer: decoder-only, and its tokenizer.
        tasks, settings, sampling, controls: what is asked and how.
        journal: takes what comes, and says what has come before.
        batch_size: rows of a forward call at the most.

    Raises:
        ConfigError: no end token is known.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        settings: EvaluationSettings,
        sampling: Sampling,
        controls: Controls,
        journal: Journal,
        batch_size: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._tasks: Mapping[str, Task] = {task.id: task for task in tasks}
        self._settings, self._sampling, self._controls = settings, sampling, controls
        self._journal, self._batch_size = journal, batch_size
        self._markers = Markers(start=settings.thinking_start, end=settings.thinking_end)
        self._stop = _stop_tokens(model, tokenizer)
        self._pad = _pad_token(model, tokenizer, self._stop)

    def require_room(self) -> None:
        """ConfigError if a prompt with its answer is longer than the model's positions."""
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        for task in self._tasks.values():
            length = len(self._ids(self._text(task, prompted=False)))
            if room is not None and length + self._sampling.max_new_tokens > room:
                raise ConfigError(
                    f"problem {task.id!r}: its prompt of {length} tokens and "
                    f"{self._sampling.max_new_tokens} new ones are more than the model's {room} "
                    "positions; give a smaller max_new_tokens, or leave the problem out"
                )

    def run(self, arms: Sequence[ArmPlan], progress: Callable[[Progress], None] | None) -> None:
        """Every sample that the journal lacks, arm after arm, into the journal."""
        total = len(arms) * len(self._tasks) * self._settings.samples
        tokens, seconds = 0, 0.0
        for arm in arms:
            for outcomes, spent in self._outcomes(arm):
                self._journal.add(arm.name, outcomes, spent)
                seconds += spent
                tokens += sum(one.tokens for one in outcomes)
                if progress is not None:
                    progress(
                        Progress(
                            arm=arm.name,
                            done=self._journal.count,
                            total=total,
                            new_tokens=tokens,
                            seconds=seconds,
                        )
                    )

    def _outcomes(self, arm: ArmPlan) -> Iterator[tuple[list[Outcome], float]]:
        """An arm's missing outcomes, batch by batch, with the seconds that each took."""
        texts = {
            name: self._text(task, prompted=arm.kind == "prompt")
            for name, task in self._tasks.items()
        }
        requests = self._missing(arm, texts)
        if not requests:
            return
        began = time.perf_counter()
        with self._steered(arm):
            for part in complete(
                self._model,
                requests,
                self._sampling,
                batch_size=self._batch_size,
                stop=self._stop,
                pad=self._pad,
                processors=self._processors(arm),
            ):
                outcomes = [self._judged(one, texts[one.request.problem]) for one in part]
                ended = time.perf_counter()
                yield outcomes, ended - began
                began = ended

    def _judged(self, completion: Completion, prompt: str) -> Outcome:
        return outcome_of(
            self._tasks[completion.request.problem],
            completion.request.sample,
            completion.tokens,
            ended=completion.ended,
            tokenizer=self._tokenizer,
            markers=self._markers,
            prompt=prompt,
        )

    def _missing(self, arm: ArmPlan, texts: Mapping[str, str]) -> list[Request]:
        done = self._journal.outcomes(arm.name)
        prompts = {name: tuple(self._ids(text)) for name, text in texts.items()}
        return [
            Request(problem=name, sample=sample, prompt=prompts[name])
            for name in self._tasks
            for sample in range(self._settings.samples)
            if (name, sample) not in done
        ]

    def _steered(self, arm: ArmPlan) -> AbstractContextManager[Any]:
        if arm.steering is None:
            return nullcontext()
        return steer(self._model, arm.steering, tokenizer=self._tokenizer)

    def _processors(self, arm: ArmPlan) -> Callable[[Sequence[int]], Sequence[LogitsProcessor]]:
        if arm.kind != "tip":
            return lambda _: ()
        start, end = (
            marker_of(self._tokenizer, text).variants if text else ()
            for text in (self._markers.start, self._markers.end)
        )
        tokens = sorted(
            {
                ids[0]
                for text in self._settings.tip_tokens
                for ids in marker_of(self._tokenizer, text).variants
            }
        )
        return lambda new: [
            ThoughtSwitchingPenalty(
                tokens,
                penalty=self._controls.tip_penalty,
                span=self._controls.tip_span,
                start=start,
                end=end,
                new=new,
            )
        ]

    def _text(self, task: Task, *, prompted: bool) -> str:
        text = with_prompt(task.prompt, self._controls) if prompted else task.prompt
        if not self._settings.chat:
            return text
        return str(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )

    def _ids(self, text: str) -> list[int]:
        # A chat template writes special tokens itself.
        return [
            int(one)
            for one in self._tokenizer.encode(text, add_special_tokens=not self._settings.chat)
        ]


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """End tokens as `generate` knows them, else the tokenizer's."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ConfigError(
            "neither the model's generation_config nor its tokenizer names an end token; set "
            "generation_config.eos_token_id"
        )
    return frozenset(found if isinstance(found, list | tuple) else [int(found)])


def _pad_token(model: Any, tokenizer: Any, stop: frozenset[int]) -> int:
    known = (model.generation_config.pad_token_id, tokenizer.pad_token_id, min(stop))
    return int(next(one for one in known if one is not None))
