"""`SteeringCost`: what steering does to the cache, as a value and as a file, `*.steer-cost.json`.

Knows no model; measures nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text
from moe_runtime.steering.plain import from_plain, load_plain
from moe_runtime.steering.shift import RoutingShift

__all__ = ["ARMS", "ArmName", "CostArm", "CostRun", "SteeredExpert", "SteeringCost"]

FORMAT, VERSION = "moe-runtime.steer-cost", 1

ArmName = Literal["unsteered", "steered", "pinned", "own"]
ARMS: Mapping[ArmName, str] = {
    "unsteered": "unsteered",
    "steered": "steered",
    "pinned": "steered, with pinned slots",
    "own": "steered, its own text",
}


@dataclass(frozen=True, kw_only=True)
class CostRun:
    """All prompts once in one arm, after a warm-up; counts of this run alone.

    Args:
        new_tokens, seconds: generated in all, and the time of `generate`, prefill included.
        decode_tokens, decode_seconds: of the forward calls of one token alone.
        hits, misses: experts that the layers of all calls needed and that were, or were not, in
            the fast tier.
        bytes_read: from the slow tier.
        stall_seconds: spent waiting for experts.
    """

    new_tokens: int
    seconds: float
    decode_tokens: int
    decode_seconds: float
    hits: int
    misses: int
    bytes_read: int
    stall_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding; None if nothing was decoded."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts that were there; None if none was needed."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read for each new token, those of its prompt's prefill included."""
        return self.bytes_read / self.new_tokens if self.new_tokens else None


@dataclass(frozen=True, kw_only=True)
class CostArm:
    """One way of running the prompts.

    Args:
        name: "unsteered", "steered" and "pinned" (steered, the steered experts in slots of their
            own) all produce the same tokens, those that the unsteered model chose. "own" is
            steered and goes on with what it chooses itself, so that its text and its length
            differ.
        rounds: in order; round n of all arms ran one after another.
    """

    name: ArmName
    rounds: tuple[CostRun, ...]

    def median(self, figure: Callable[[CostRun], float | None]) -> float | None:
        """Median over the rounds of a figure; None where a round has none."""
        values = [figure(one) for one in self.rounds]
        known = [value for value in values if value is not None]
        return median(known) if known and len(known) == len(values) else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the rounds, decoding."""
        return self.median(lambda one: one.tokens_per_second)

    @property
    def hit_rate(self) -> float | None:
        """Median over the rounds."""
        return self.median(lambda one: one.hit_rate)

    @property
    def bytes_per_token(self) -> float | None:
        """Median over the rounds."""
        return self.median(lambda one: one.bytes_per_token)


@dataclass(frozen=True, kw_only=True)
class SteeredExpert:
    """One steered expert and how often tokens chose it, 0 to 1, on the same tokens.

    Args:
        layer, expert: absolute Hugging Face layer index, number of the expert.
        beta: its factor.
        uses, steered_uses: share of the tokens that chose it, unsteered and steered.
    """

    layer: int
    expert: int
    beta: float
    uses: float
    steered_uses: float


@dataclass(frozen=True, kw_only=True)
class SteeringCost:
    """What steering costs inside an expert budget, and how it moves routing.

    Args:
        model_id, fingerprint: of the model.
        steering: name of the steering, a file's; "" if it had none.
        method, renormalise, thinking: as in `Steering`.
        experts: what was steered.
        budget: as it was asked for, "25%"; `slots` of `all_experts` were the fast tier.
        policy: of eviction.
        prompts, max_new_tokens: what was generated in each run, greedily.
        arms: the unsteered one first.
        shift: unsteered against steered over the same tokens, prompts included.
        versions: `(package, version)`.
        machine: `(what, which)`.
    """

    model_id: str
    fingerprint: str
    steering: str
    method: str
    renormalise: bool
    thinking: tuple[str, ...]
    experts: tuple[SteeredExpert, ...]
    budget: str
    slots: int
    all_experts: int
    policy: str
    prompts: int
    max_new_tokens: int
    arms: tuple[CostArm, ...]
    shift: RoutingShift
    versions: tuple[tuple[str, str], ...] = ()
    machine: tuple[tuple[str, str], ...] = ()

    def arm(self, name: ArmName) -> CostArm | None:
        """The arm of this name; None if it was not run."""
        return next((one for one in self.arms if one.name == name), None)

    def ratios(
        self, name: ArmName, figure: Callable[[CostRun], float | None]
    ) -> tuple[float, float, float] | None:
        """An arm's figure over the unsteered one's of the same round: median, least, most.

        None if the arm was not run, or where there was nothing to divide by.
        """
        arm, plain = self.arm(name), self.arm("unsteered")
        if arm is None or plain is None:
            return None
        pairs = [(figure(a), figure(b)) for a, b in zip(arm.rounds, plain.rounds, strict=True)]
        values = [a / b for a, b in pairs if a is not None and b]
        if not values or len(values) < len(pairs):
            return None
        return median(values), min(values), max(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with format and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteeringCost:
        """Again. ConfigError if it is no such file, of another version, or damaged."""
        if data.get("format") != FORMAT:
            raise ConfigError(
                f"field 'format' is {data.get('format')!r:.80}, not {FORMAT!r}; this is no cost of "
                "steering"
            )
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise ConfigError(
                f"field 'version' is {data.get('version')!r:.80}, this release reads {VERSION}; "
                "measure again"
            )
        try:
            found = from_plain(cls, data, "")
            _check(found)
        except ConfigError as error:
            raise ConfigError(
                f"the cost of steering is damaged: {error}; measure again (moe-runtime steer cost)"
            ) from error
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `*.steer-cost.json`, whole or not at all; gives its path."""
        return write_text(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringCost:
        """Read a file. ConfigError names the file, what was found and what to do."""
        return load_plain(path, cls.from_dict, what="cost of steering", again="measure again")


def _check(found: SteeringCost) -> None:
    """Arms are distinct, begin with the unsteered one and have equally many rounds."""
    names = [arm.name for arm in found.arms]
    if names[:1] != ["unsteered"] or len(set(names)) != len(names):
        raise ConfigError(f"arms has to begin with 'unsteered' and name each once, found {names}")
    rounds = {len(arm.rounds) for arm in found.arms}
    if rounds == {0} or len(rounds) != 1:
        raise ConfigError(f"all arms need the same number of rounds, found {sorted(rounds)}")
    for arm in found.arms:
        for at, one in enumerate(arm.rounds):
            if min(asdict(one).values()) < 0:
                raise ConfigError(f"round {at} of arm {arm.name!r} has a number below 0")
    for expert in found.experts:
        for name in ("uses", "steered_uses"):
            if not 0 <= getattr(expert, name) <= 1:
                raise ConfigError(
                    f"{name} of expert {expert.expert} in layer {expert.layer} has to be a share "
                    f"of 0 to 1, found {getattr(expert, name)}"
                )
    for layer in found.shift.layers:
        for name in ("changed", "jaccard", "total_variation"):
            if not 0 <= getattr(layer, name) <= 1:
                raise ConfigError(
                    f"shift: {name} of layer {layer.layer} has to be 0 to 1, found "
                    f"{getattr(layer, name)}"
                )
