"""`Predicted`: an eviction policy that ranks by predicted next use, with or without a predictor.

Knows nothing of slots, tiers, tensors or of how a predictor comes to its probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import ConfigError
from moe_runtime.eviction_learned import TINY, UseCounts
from moe_runtime.resemblance import Likeness, PassMemory, Shares
from moe_runtime.selection import lowest_few

__all__ = ["Predicted", "PredictedConstants"]


@dataclass(frozen=True, kw_only=True)
class PredictedConstants:
    """The constants of `Predicted`; the defaults are rounded from what `bench/policies.py` fitted.

    Args:
        sharpness, fade, carry: of the plain likeness of passes (see `Likeness`).
        rare_sharpness, rare_fade, rare_carry: of the likeness by surprising experts.
        discount, rare_discount: worth of a use one pass later, in what followed alike passes.
        horizon: passes looked ahead in what followed.
        prior: weight of the slow count, in passes, against what the alike passes say.
        fast, slow: kept parts per step of the two decayed counts.
        fast_share: weight of the fast count against the slow one.
        recent: weight of a use just now beside the counts; it fades, and does not add up.
        recent_fade: kept part of that per step.
        trust, rare_trust: weights of the two echoes in the logarithm of the keep-value, the rest
            is the counts'; 0 or more, at most 1 together.
        order: how much less an expert is worth for each pass until its layer comes.
        certain: worth of a use that is predicted for certain, in discounted uses.
        doubtful: how many candidates at least, the worst by their last value, are valued anew.
        history: passes remembered at most.
    """

    sharpness: float = 1.59
    fade: float = 0.72
    carry: float = 0.47
    rare_sharpness: float = 2.14
    rare_fade: float = 0.9
    rare_carry: float = 0.24
    discount: float = 0.46
    rare_discount: float = 0.57
    horizon: int = 3
    prior: float = 5.72
    fast: float = 0.92
    slow: float = 0.971
    fast_share: float = 0.68
    recent: float = 0.21
    recent_fade: float = 0.38
    trust: float = 0.37
    rare_trust: float = 0.16
    order: float = 1.35
    certain: float = 8.0
    doubtful: int = 16
    history: int = 160

    def __post_init__(self) -> None:
        parts = (
            "fade", "carry", "rare_fade", "rare_carry", "discount", "rare_discount", "fast", "slow",
            "fast_share", "recent_fade", "trust", "rare_trust",
        )  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            if not np.isfinite(value):
                raise ConfigError(f"predicted: {field.name} has to be finite, found {value}")
            if field.name in parts and not 0 <= value <= 1:
                raise ConfigError(f"predicted: {field.name} has to lie in 0..1, found {value}")
            if value < 0:
                raise ConfigError(f"predicted: {field.name} cannot be negative, found {value}")
        if self.trust + self.rare_trust > 1:
            raise ConfigError(
                "predicted: trust and rare_trust cannot exceed 1 together, found "
                f"{self.trust} and {self.rare_trust}"
            )
        if self.history < 8 or self.doubtful < 1 or self.certain <= 0:
            raise ConfigError(
                "predicted: needs history 8 or more, doubtful 1 or more, certain above 0; found "
                f"{self.history}, {self.doubtful}, {self.certain}"
            )


class Predicted:
    """Keeps what is expected to be used soonest, from the run's own past and from a predictor.

    As `Echo` it listens to the earlier passes that resemble the present one (see there for what
    a pass is), but in two ways, plainly and by surprising experts. What an expert is worth, in
    discounted uses, is

        log worth = trust * log(echo) + rare_trust * log(rare echo)
                    + (1 - trust - rare_trust) * log(decayed counts)

    and its keep-value is `log worth - order * (passes until its layer)`. Where a predictor gives
    a probability `P` for the coming step of the expert's layer (`expect`), that step is split off:

        keep-value = log(certain * P + worth * (1 - P)) - order * (passes until)

    so that a certain use is worth `certain`. Without `expect` it works alone. It is deterministic
    and starts knowing nothing.

    To stay cheap an expert is valued when its layer is passed or expected, and again only where it
    is among the `doubtful` lowest that are asked about.

    Args:
        grid: numbering of the experts.
        constants: see there.
    """

    name: ClassVar[str] = "predicted"

    def __init__(self, grid: ExpertGrid, constants: PredictedConstants | None = None) -> None:
        self._constants = c = constants or PredictedConstants()
        self._bounds = [(at, at + n) for at, n in zip(grid.offsets, grid.experts, strict=True)]
        layers = max(len(grid.layers), 1)
        self._due = np.repeat(np.arange(len(grid.layers)) / layers, grid.experts)
        plain = Likeness(sharpness=c.sharpness, fade=c.fade, carry=c.carry, prior=c.prior)
        rare = Likeness(
            sharpness=c.rare_sharpness,
            fade=c.rare_fade,
            carry=c.rare_carry,
            prior=c.prior,
            rare=True,
        )
        self._memory = PassMemory(grid, c.history, [plain, rare])
        self._counts = UseCounts(grid.size, c)
        discounts = (c.discount, c.rare_discount)
        self._futures = [(d ** np.arange(c.horizon + 1)).astype(np.float32) for d in discounts]
        self._visits = 1.0 / (1.0 - min(c.discount, 0.99))
        self._trusts = np.array([c.trust, c.rare_trust])
        self._echoes: Shares = np.zeros((0, 2), np.float32)
        self._position = len(grid.layers)  # of the last observed layer
        self._reached = grid.size  # below it lie the layers that the present pass has passed
        self._worth = np.full(grid.size, np.log(TINY))  # log worth when last valued
        self._value = np.zeros(grid.size)
        self._expected = np.full(grid.size, np.nan)

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        memory = self._memory
        if position <= self._position:
            memory.begin_pass()
        self._position = position
        start, stop = self._bounds[position]
        self._reached = stop
        layer, dense = slice(start, stop), experts + start
        busiest = int(tokens.max(initial=1))
        share = (tokens / busiest).astype(np.float32)
        memory.take(dense, share)
        self._counts.take(layer, experts, share, busiest)
        if now := memory.now:
            self._echoes = np.stack(
                [
                    np.convolve(memory.weights(number), future)[:now]
                    for number, future in enumerate(self._futures)
                ],
                axis=1,
            )
        self._expected[layer] = np.nan  # it has come true or not
        # This layer comes again in the next pass: what counts is what followed, one pass later.
        worth = self._log_worth(memory.used[layer, 1 : now + 1] @ self._echoes, layer)
        self._worth[layer] = worth
        self._value[layer] = worth - self._constants.order * (memory.clock + 1 + self._due[start])

    def expect(self, values: FloatArray) -> None:
        """Take in a predictor's probabilities, in place of those of earlier calls. Mutates.

        They hold for the next step of each expert's layer, until `observe` is told of it: for
        layers that the present pass has still to come to, use within this pass; for the others,
        which a predictor of the present pass does not know, use in the next.

        Args:
            values: float `[grid.size]`, by dense index, 0 to 1; NaN where nothing is known.

        Raises:
            ConfigError: another shape, or a number outside 0 to 1.
        """
        if values.shape != self._expected.shape:
            raise ConfigError(
                f"predicted: expectations need one number for each of the {len(self._expected)} "
                f"experts, found shape {values.shape}"
            )
        known = np.flatnonzero(~np.isnan(values))
        given = values[known]
        if len(known) and not 0 <= given.min() <= given.max() <= 1:
            raise ConfigError(
                "predicted: expectations are probabilities from 0 to 1, found "
                f"{given.min()} to {given.max()}; NaN stands for unknown"
            )
        changed = np.flatnonzero(~(np.isnan(self._expected) & np.isnan(values)))
        self._expected[:] = values
        self._value[changed] = self._keep_value(self._worth[changed], changed)

    def rank(self, candidates: IntArray) -> FloatArray:
        values = self._value[candidates]
        if not len(self._echoes):
            return values
        doubtful, lowest = self._constants.doubtful, np.arange(len(candidates))
        if len(candidates) > doubtful:
            lowest = lowest_few(values, doubtful)
        # Which are valued anew, and in which order, must not depend on the order of `candidates`.
        lowest = lowest[np.lexsort((candidates[lowest], values[lowest]))[:doubtful]]
        values[lowest] = self._value_now(candidates[lowest])
        return values

    def _log_worth(self, heard: Shares, experts: slice | IntArray) -> FloatArray:
        """Logarithm of the worth of experts with these two echoes, `[n, 2]`."""
        c = self._constants
        prior = c.prior * self._visits / (c.prior + max(len(self._echoes), 1))
        told = heard + prior * self._counts.slow[experts][:, None]
        told += TINY
        worth: FloatArray = np.log(told) @ self._trusts
        worth += (1.0 - c.trust - c.rare_trust) * self._counts.logarithm[experts]
        return worth

    def _keep_value(self, worth: FloatArray, experts: IntArray) -> FloatArray:
        """Keep-values of experts of this log worth, by what is expected and when it is due."""
        order = self._constants.order
        due = self._due[experts] + (experts < self._reached) + self._memory.clock
        chance = self._expected[experts]
        known = ~np.isnan(chance)
        if known.any():
            later = np.exp(worth[known]) * (1.0 - chance[known])
            worth = worth.copy()
            worth[known] = np.log(self._constants.certain * chance[known] + later + TINY)
        value: FloatArray = worth - order * due
        return value

    def _value_now(self, experts: IntArray) -> FloatArray:
        """Keep-values with the present resemblance, `[n]`, of any experts by dense index."""
        now = len(self._echoes)
        used = self._memory.used.take(experts, axis=0)
        passed = (experts < self._reached)[:, None]
        heard = np.where(passed, used[:, 1 : now + 1] @ self._echoes, used[:, :now] @ self._echoes)
        return self._keep_value(self._log_worth(heard, experts), experts)
