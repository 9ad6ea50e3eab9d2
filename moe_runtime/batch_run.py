"""What came of generating for many prompts: the tokens, and what they cost, as values.

Knows neither models nor schedules.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Agreement", "BatchRun", "PhaseCounts"]


@dataclass(frozen=True, kw_only=True)
class PhaseCounts:
    """One phase (prefill or decode) of a run over many prompts.

    Args:
        calls: forward calls, one for each batch and step.
        tokens: tokens that went in, padding not counted.
        active: distinct experts of a call, summed over layers and calls; None on a model without
            our runtime, like all that follow but `seconds`.
        on_demand: ExpertFlow (He)'s figure: experts of a call beyond a layer's share of the slots,
            summed over layers and calls. It takes the slots as full of the right experts.
        hits, misses: experts found resident, and loaded, as the cache counted them.
        bytes_read: bytes of experts that came from disk and from host memory.
        seconds: time in these forward calls and in choosing tokens.
    """

    calls: int = 0
    tokens: int = 0
    active: int | None = None
    on_demand: float | None = None
    hits: int | None = None
    misses: int | None = None
    bytes_read: int | None = None
    seconds: float = 0.0

    @property
    def active_per_call(self) -> float | None:
        """Experts that a call activates, summed over layers; None if unknown."""
        return None if self.active is None or not self.calls else self.active / self.calls

    @property
    def misses_per_token(self) -> float | None:
        """Experts loaded for each token; None if unknown."""
        return None if self.misses is None or not self.tokens else self.misses / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures."""
        return asdict(self) | {
            "active_per_call": self.active_per_call,
            "misses_per_token": self.misses_per_token,
        }


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Tokens and logits of a run beside those of each prompt run alone.

    The reference is fed the run's own tokens, so that each step is compared by itself.

    Args:
        steps: tokens compared.
        largest: the largest difference of logits at a step, relative to the step's largest
            reference logit; of the 64 largest logits of each step.
        beyond: steps whose difference is more than 1e-5.
        near_ties: tokens that differ where the reference's top two lie no further apart than twice
            what the logits differ by, and that is rounding (1e-3 of the largest in float32, 0.05 in
            float16, 0.25 in bfloat16).
        different: tokens that differ without that excuse; 0 unless something is wrong.
    """

    steps: int
    largest: float
    beyond: int
    near_ties: int
    different: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class BatchRun:
    """Tokens for many prompts, and what they cost.

    Args:
        outputs: new tokens of each prompt, in the prompts' order, the stop token included.
        schedule: what was asked for.
        scheduled: whether sequences were regrouped; False in order, and where no path is known.
        fallback: why regrouping was given up or never begun, "" if it was not.
        predictor: name of the predictor of paths, "" if there was none.
        batch_size: sequences of a forward call at most.
        window: batches under way at once.
        every: steps between regroupings.
        prefill, decode: what the phases cost.
        rounds: steps in which every sequence under way got a token.
        regroupings: rounds that began with another grouping.
        moved: sequences whose keys and values were gathered into another batch, summed over rounds.
        schedule_seconds: time for predicting and grouping.
        gather_seconds: time for gathering keys and values.
        agreement: the comparison with each prompt alone, None unless asked for.
    """

    outputs: tuple[tuple[int, ...], ...]
    schedule: str
    scheduled: bool
    fallback: str
    predictor: str
    batch_size: int
    window: int
    every: int
    prefill: PhaseCounts
    decode: PhaseCounts
    rounds: int
    regroupings: int
    moved: int
    schedule_seconds: float
    gather_seconds: float
    agreement: Agreement | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens generated, over all prompts."""
        return sum(map(len, self.outputs))

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decoded tokens over the time for decoding, scheduling and gathering; None without any."""
        seconds = self.decode.seconds + self.schedule_seconds + self.gather_seconds
        return self.decode.tokens / seconds if self.decode.tokens and seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens over all of the time, prefill too."""
        seconds = self.decode.seconds + self.schedule_seconds + self.gather_seconds
        seconds += self.prefill.seconds
        return self.new_tokens / seconds if seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "outputs": [list(tokens) for tokens in self.outputs],
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
            "new_tokens": self.new_tokens,
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }
