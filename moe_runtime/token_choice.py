"""Choosing tokens from logits, greedily or by each prompt's own random numbers.

Knows logits and seeds; no models.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["TokenChoice"]


class TokenChoice:
    """The likeliest token, or one drawn at a temperature.

    Drawing takes the largest of logits / temperature + Gumbel noise, which is a sample of the
    softmax. The noise belongs to the prompt's number and the step, so that a prompt's tokens do not
    depend on what runs beside it; and "the top two" means something for drawn tokens too.

    Args:
        temperature: 0 for the likeliest token.
        seed: of all noise.
        number: the prompt's.
    """

    def __init__(self, *, temperature: float, seed: int, number: int) -> None:
        self._temperature = temperature
        self._noise: torch.Generator | None = None
        if temperature:
            # Torch's generator on a CPU takes 32 bits of a seed: both numbers go into all of them.
            name = f"{seed} {number}".encode()
            key = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")
            self._noise = torch.Generator().manual_seed(key)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What the token is the largest of, float64 `[V]`, for the next step; uses its noise up.

        Args:
            logits: `[V]`.
        """
        scores = logits.to("cpu", torch.float64)
        if self._noise is None:
            return scores
        uniform = torch.rand(len(scores), generator=self._noise, dtype=torch.float64)
        # rand gives 0 now and then, whose noise would be -inf.
        return scores / self._temperature - torch.log(-torch.log(uniform.clamp_min(1e-300)))

    def skip(self, steps: int, vocabulary: int) -> None:
        """Use up the noise of steps whose token was chosen elsewhere, for `vocabulary` logits."""
        if self._noise is not None:
            for _ in range(steps):
                torch.rand(vocabulary, generator=self._noise, dtype=torch.float64)

    @property
    def scale(self) -> float:
        """How much a difference of logits is worth in scores."""
        return 1.0 / self._temperature if self._temperature else 1.0
