"""What a parallel run is to do, as a checked value.

Knows no models and no plans.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moe_runtime.errors import ConfigError
from moe_runtime.placement.links import Links

__all__ = ["CHECKS", "HOMES", "MODES", "STARTS", "ParallelOptions"]

MODES = ("coherent", "vanilla")
CHECKS = ("fallback", "stop", "off")
STARTS = ("token", "ended")
HOMES = ("order", "prefill")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Options of `moe_runtime.parallel.generate`.

    Args:
        mode: `"coherent"`: rows move to the rank of their heaviest expert; `"vanilla"`: rows stay
            home.
        max_new_tokens: of each prompt.
        temperature, seed: 0 takes the likeliest token; else tokens are drawn, with random numbers
            of the prompt's place among the prompts: the same on any number of ranks.
        stop_tokens: ids that end a sequence; None: those of the model's generation configuration.
        batch_size: prompts under way at once; None for all. Memory for keys and values on each
            rank grows with it in coherent mode.
        start: where a row begins a coherent step: `"token"`, where rows of this token went in the
            first MoE layer before, as far as the run has shown; `"ended"`, where its last step
            ended. Also what `"token"` does with tokens not seen yet.
        homes: where prompts live in vanilla mode: `"order"`, in equal blocks as they were given;
            `"prefill"`, after the prefill on the rank with most of the experts that their tokens
            chose, as many prompts on each rank as before. Keys and values follow once. The cost
            model does not foretell this: it has homes in order.
        check: compare coherent with vanilla logits on some rows first, and if they differ:
            `"fallback"` runs vanilla, `"stop"` raises; `"off"` does not compare.
        links: between ranks, for the time that prefill is foretold to take on them; None for those
            that the plan's step times were predicted for, if it has any.
        keep_routing: keep what each token was routed to (`ParallelRun.routing`).

    Raises:
        ConfigError: a value out of range.
    """

    mode: str = "coherent"
    max_new_tokens: int = 20
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: Collection[int] | None = None
    batch_size: int | None = None
    start: str = "token"
    homes: str = "order"
    check: str = "fallback"
    links: Links | None = None
    keep_routing: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("start", self.start, STARTS),
            ("homes", self.homes, HOMES),
            ("check", self.check, CHECKS),
        ):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        for name in ("max_new_tokens", "batch_size"):
            number = getattr(self, name)
            unlimited = name == "batch_size" and number is None
            if not unlimited and (type(number) is not int or number < 1):
                raise ConfigError(f"{name} is a number, 1 or more, found {number!r}")
        if not self.temperature >= 0.0:
            raise ConfigError(f"temperature is 0 or more, found {self.temperature}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is a number, 0 to 2**32 - 1, found {self.seed!r}")
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", tuple(int(one) for one in self.stop_tokens))
