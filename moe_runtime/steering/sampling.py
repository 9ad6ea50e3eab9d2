"""Many samples of many prompts in batches, each drawn with random numbers of its own.

Knows token ids and transformers' `generate`; not what the texts mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from moe_runtime.errors import ConfigError
from moe_runtime.steering.noise import SampleNoise, noise_stream, warpers

__all__ = ["Completion", "Request", "Sampling", "complete"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: of each sample, 1 or more.
        temperature: 0 takes the likeliest token.
        top_p, top_k: as in transformers, applied at the temperature; 1 and 0 leave nothing out.
        seed: of all random numbers.

    Raises:
        ConfigError: a value that is not possible.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens has to be 1 or more": self.max_new_tokens >= 1,
            "temperature has to be finite and 0 or more": 0 <= self.temperature < float("inf"),
            "top_p has to be above 0 and at most 1": 0 < self.top_p <= 1,
            "top_k has to be 0 (off) or more": self.top_k >= 0,
            "seed has to be 0 or more": self.seed >= 0,
        }
        broken = next((rule for rule, kept in rules.items() if not kept), None)
        if broken is not None:
            name = broken.split()[0]
            raise ConfigError(f"{broken}, found {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to draw: of which problem, which of its samples, and its prompt's token ids."""

    problem: str
    sample: int
    prompt: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of a request.

    Args:
        tokens: new token ids, without the end token and what follows it.
        ended: an end token came before the length limit.
    """

    request: Request
    tokens: tuple[int, ...]
    ended: bool


def complete(
    model: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    batch_size: int,
    stop: frozenset[int],
    pad: int,
    processors: Callable[[Sequence[int]], Sequence[LogitsProcessor]] = lambda _: (),
) -> Iterator[list[Completion]]:
    """All requests through `model.generate`, batch by batch; those that are done after each call.

    When three quarters of a batch have ended, the call ends too, and the rest go on later among
    their like, their text so far as part of the prompt: few long samples do not keep the batch.

    Args:
        model: a decoder-only model.
        batch_size: rows of a call at the most.
        stop: end tokens.
        pad: token id for padding, on the left of prompts and after the end.
        processors: makes those that change a call's logits before they are sampled; given for each
            row how many tokens after its prompt the call starts with.
    """
    # Longest first, so that a batch that does not fit into memory fails at once.
    waiting = deque(
        _Flight(request=one, stream=noise_stream(sampling.seed, one.problem, one.sample))
        for one in sorted(requests, key=lambda one: -len(one.prompt))
    )
    carried: list[_Flight] = []
    while waiting or carried:
        if len(carried) >= batch_size or not waiting:
            carried.sort(key=lambda one: -one.length)
            batch, carried = carried[:batch_size], carried[batch_size:]
        else:
            batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        chosen = processors([len(one.tokens) for one in batch])
        _call(model, batch, sampling, stop=stop, pad=pad, processors=chosen)
        carried += [one for one in batch if one.outcome is None]
        yield [one.outcome for one in batch if one.outcome is not None]


@dataclass(eq=False, kw_only=True)
class _Flight:
    """A request on its way: its tokens so far, its random numbers, its completion when done."""

    request: Request
    stream: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    outcome: Completion | None = None

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    def take(self, row: list[int], limit: int, stop: frozenset[int]) -> None:
        """Add what a call gave, end and padding included."""
        new = row[: limit - len(self.tokens)]
        end = next((at for at, token in enumerate(new) if token in stop), None)
        self.tokens += new if end is None else new[:end]
        if end is not None or len(self.tokens) >= limit:
            self.outcome = Completion(
                request=self.request, tokens=tuple(self.tokens), ended=end is not None
            )


@torch.no_grad()
def _call(
    model: Any,
    batch: Sequence[_Flight],
    sampling: Sampling,
    *,
    stop: frozenset[int],
    pad: int,
    processors: Sequence[LogitsProcessor],
) -> None:
    """One call of `generate`; the batch's flights take what came."""
    longest = max(one.length for one in batch)
    ids = torch.full((len(batch), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(batch):
        ids[row, longest - one.length :] = torch.tensor([*one.request.prompt, *one.tokens])
        mask[row, longest - one.length :] = 1
    chosen = LogitsProcessorList(processors)
    if sampling.temperature:
        chosen += warpers(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
        )
        chosen.append(
            SampleNoise(
                [f"problem {one.request.problem!r}, sample {one.request.sample}" for one in batch],
                [one.stream for one in batch],
                temperature=sampling.temperature,
                stop=stop,
            )
        )
    room = [sampling.max_new_tokens - len(one.tokens) for one in batch]
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(room),
            eos_token_id=sorted(stop),
            pad_token_id=pad,
        ),
        logits_processor=chosen,
        stopping_criteria=StoppingCriteriaList([_FewLeft(longest, room, stop)]),
    )
    for flight, row in zip(batch, out[:, longest:].tolist(), strict=True):
        flight.take(row, sampling.max_new_tokens, stop)


class _FewLeft(StoppingCriteria):
    """Ends rows at their own limits, and the call when a quarter of its rows is left."""

    def __init__(self, start: int, room: Sequence[int], stop: frozenset[int]) -> None:
        self._start, self._stop = start, stop
        self._left = dict(enumerate(room))  # of the rows that go on: how many tokens they may have
        self._few = len(room) // 4

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        new, last = input_ids.shape[1] - self._start, input_ids[:, -1].tolist()
        self._left = {
            row: room
            for row, room in self._left.items()
            if new < room and last[row] not in self._stop
        }
        few = len(self._left) <= self._few
        done = [few or row not in self._left for row in range(len(last))]
        return torch.tensor(done, device=input_ids.device)
