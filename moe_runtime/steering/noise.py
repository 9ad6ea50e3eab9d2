"""Sampling as a logits processor: each row of a batch draws with random numbers of its own.

Knows logits and random numbers; not what a row stands for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from moe_runtime.core import FloatArray
from moe_runtime.errors import ConfigError

__all__ = ["SampleNoise", "noise_stream", "warpers"]


class SampleNoise(LogitsProcessor):
    """Makes the largest score of each row a sample of its softmax, by the row's own numbers.

    Each logit's probability is divided by a number drawn from the exponential distribution; the
    largest quotient is at a token with exactly that token's probability (exponential races, which
    is the Gumbel-max trick without its logarithms). A row's numbers come from seed, problem, sample
    and step alone. So a sample does not depend on the batch that it is in, but for rounding in the
    model; and two arms whose logits are close mostly draw the same token, which is what makes
    paired differences of few samples sharp (common random numbers).

    Use for one call of `generate` with `do_sample=False`.

    Args:
        rows: names of the rows, for messages.
        streams: random numbers of each row; a row that has ended draws no more.
        temperature: above 0.
        stop: end tokens.
    """

    def __init__(
        self,
        rows: Sequence[str],
        streams: Sequence[np.random.Generator],
        *,
        temperature: float,
        stop: frozenset[int],
    ) -> None:
        self._rows, self._streams, self._temperature = rows, streams, temperature
        self._active = list(range(len(streams)))
        self._stop = stop
        self._noise: FloatArray | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores `[rows, vocabulary]`, of which the largest is the drawn token."""
        if self._noise is None:
            self._noise = np.ones(tuple(scores.shape))
        else:
            last = input_ids[:, -1].tolist()
            self._active = [row for row in self._active if last[row] not in self._stop]
        # In float64: the smallest numbers decide, and float32 would round some of them to 0.
        for row in self._active:
            self._streams[row].standard_exponential(out=self._noise[row])
        if self._temperature != 1:
            scores = scores / self._temperature  # type: ignore[assignment]
        shares = scores.float().softmax(dim=-1)
        known = torch.isfinite(shares[:, 0])  # one NaN makes the whole row NaN
        if not bool(known.all()):
            bad = self._rows[int((~known).nonzero()[0])]
            raise ConfigError(
                f"{bad}: the model's logits are not finite; "
                "use a smaller beta, or load the model in float32"
            )
        return shares.div_(torch.from_numpy(self._noise).to(shares.device, torch.float32))


def noise_stream(seed: int, problem: str, sample: int) -> np.random.Generator:
    """The random numbers of one sample, whatever stands beside it."""
    name = f"{seed} {sample} {problem}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.SFC64(key))


def warpers(*, temperature: float, top_p: float, top_k: int) -> list[LogitsProcessor]:
    """Top-k and top-p; the latter sees logits at the temperature."""
    found: list[LogitsProcessor] = []
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(_AtTemperature(TopPLogitsWarper(top_p), temperature))
    return found


class _AtTemperature(LogitsProcessor):
    """Another processor, given logits at a temperature; what it leaves out is left out."""

    def __init__(self, inner: LogitsProcessor, temperature: float) -> None:
        self._inner, self._temperature = inner, temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        warped = self._inner(input_ids, scores / self._temperature)
        return scores.masked_fill(torch.isneginf(warped), -float("inf"))
