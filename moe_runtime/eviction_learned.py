"""`Echo`: an eviction policy that learns, from the run itself, what follows moments like this one.

Knows nothing of slots, tiers, tensors or tokens' ids: it sees routing and ranks candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import ConfigError

__all__ = ["Echo", "EchoConstants"]

_TINY = 1e-30  # keeps the logarithm of a count that has decayed away finite


@dataclass(frozen=True, kw_only=True)
class EchoConstants:
    """The constants of `Echo`; the defaults were fitted by `bench/policies.py --fit`.

    Args:
        sharpness: how strongly resemblance decides which earlier passes are listened to.
        fade: kept part of the resemblance per layer step, so that near layers count most.
        carry: kept part of the resemblance from one pass to the next.
        discount: worth of a use one pass later, relative to a use now.
        horizon: passes looked ahead in what followed an earlier pass.
        prior: weight of the counts, in passes, against what the resembling passes say.
        fast, slow: kept parts per step of the two decayed counts.
        fast_share: weight of the fast count against the slow one.
        recent: weight of a use just now beside the counts; it fades, and does not add up.
        recent_fade: kept part of that per step.
        trust: weight of the echo against the counts, in logarithms, 0 to 1.
        order: how much less an expert is worth for each pass until its layer comes again.
        again: how many other layers, evenly spread over the pass, are valued again after each
            step, beside the layer just passed.
        history: passes remembered at most.
    """

    sharpness: float = 2.0
    fade: float = 0.8
    carry: float = 0.5
    discount: float = 0.4
    horizon: int = 3
    prior: float = 1.0
    fast: float = 0.8
    slow: float = 0.96
    fast_share: float = 0.5
    recent: float = 0.1
    recent_fade: float = 0.7
    trust: float = 0.5
    order: float = 0.9
    again: int = 3
    history: int = 192

    def __post_init__(self) -> None:
        parts = ("fade", "carry", "discount", "fast", "slow", "fast_share", "recent_fade", "trust")
        for name in parts:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"echo: {name} has to lie in 0..1, found {getattr(self, name)}")
        if min(self.sharpness, self.prior, self.order, self.recent) < 0:
            raise ConfigError("echo: sharpness, prior, order and recent cannot be negative")
        if self.horizon < 0 or self.history < 8 or self.again < 0:
            raise ConfigError(
                "echo: needs horizon 0 or more, history 8 or more, again 0 or more; found "
                f"{self.horizon}, {self.history}, {self.again}"
            )


class Echo:
    """Keeps the experts that followed the moments of this run which resemble the present one.

    A pass is one forward call through all layers (one decoded token, or one prompt). For each
    earlier pass a running resemblance says how far its experts were those of the present pass,
    the layers just passed counting most. What the resembling passes used at a layer, and in the
    passes after, discounted, is the echo of each of its experts. An expert's keep-value is

        trust * log(echo) + (1 - trust) * log(decayed counts) - order * (passes until its layer)

    so frequency and recency come from the counts, likeness from the echo, and the layer just
    passed, which is needed last, is worth least. It is deterministic and starts knowing nothing.

    A step of many tokens (a prompt) counts as one pass whose experts weigh by their share of the
    busiest expert's tokens; the counts decay as if that expert's tokens had come one by one.

    Args:
        grid: numbering of the experts.
        constants: see there.
    """

    name: ClassVar[str] = "echo"

    def __init__(self, grid: ExpertGrid, constants: EchoConstants | None = None) -> None:
        self._constants = constants = constants or EchoConstants()
        self._bounds = [(at, at + n) for at, n in zip(grid.offsets, grid.experts, strict=True)]
        self._layers = len(grid.layers)
        spread = (i * self._layers // (constants.again + 1) for i in range(1, constants.again + 1))
        self._again = tuple(sorted({distance for distance in spread if distance > 0}))
        # What each pass used, experts by rows: a layer is a block of rows, a pass is a column.
        self._used: NDArray[np.float32] = np.zeros((grid.size, constants.history), np.float32)
        self._alike = np.zeros(constants.history)
        self._alike_limit = 0.0  # what _alike would be for a pass that used the very same experts
        self._pass = -1  # column of the present pass
        self._position = self._layers  # of the last observed layer
        self._clock = 0  # passes so far, not wrapped
        self._fast = np.zeros(grid.size)
        self._slow = np.zeros(grid.size)
        self._recent = np.zeros(grid.size)
        self._log_counts = np.full(grid.size, np.log(_TINY))
        self._value = np.zeros(grid.size)
        powers = np.arange(constants.horizon + 1)
        self._future = constants.discount**powers
        self._scale = constants.sharpness * self._layers**0.5
        self._visits = 1.0 / (1.0 - min(constants.discount, 0.99))

    def rank(self, candidates: IntArray) -> FloatArray:
        return self._value[candidates]

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        if position <= self._position:
            self._begin_pass()
        self._position = position
        start, stop = self._bounds[position]
        busiest = int(tokens.max(initial=1))
        share = tokens / busiest
        now = self._pass
        dense = start + experts
        if now:
            fade = self._constants.fade
            alike = self._alike[:now]
            alike *= fade
            alike += (share / share.sum()) @ self._used[dense, :now]
            self._alike_limit = self._alike_limit * fade + 1.0
        self._used[dense, now] = share
        self._count(start, stop, experts, share, busiest)
        echo = self._weigh(now)
        # Its own layer comes again in the next pass: what counts is what followed, one later.
        self._revalue(position, echo, 1, self._clock + 1)
        for distance in self._again:
            other = position + distance
            if other < self._layers:
                self._revalue(other, echo, 0, self._clock)
            else:
                self._revalue(other - self._layers, echo, 1, self._clock + 1)

    def _begin_pass(self) -> None:
        """Go to the next column; a full history loses its older third."""
        self._clock += 1
        self._pass += 1
        history = self._constants.history
        if self._pass == history:
            kept = history - history // 3
            self._used[:, :kept] = self._used[:, history - kept :].copy()
            self._used[:, kept:] = 0
            self._alike[:kept] = self._alike[history - kept :].copy()
            self._pass = kept
        now = self._pass
        # The pass after a resembling one should resemble the present one: resemblance moves on.
        if now:
            self._alike[1:now] = self._constants.carry * self._alike[: now - 1]
            self._alike[0] = 0.0
            self._alike_limit *= self._constants.carry

    def _count(
        self, start: int, stop: int, experts: IntArray, share: FloatArray, busiest: int
    ) -> None:
        """Both decayed counts of one layer, and the logarithm of their mixture."""
        constants = self._constants
        fast, slow = self._fast[start:stop], self._slow[start:stop]
        kept_fast, kept_slow = constants.fast**busiest, constants.slow**busiest
        fast *= kept_fast
        fast[experts] += (1.0 - kept_fast) * share
        slow *= kept_slow
        slow[experts] += (1.0 - kept_slow) * share
        recent = self._recent[start:stop]
        recent *= constants.recent_fade
        recent[experts] = share
        mixed = constants.fast_share * fast
        mixed += (1.0 - constants.fast_share) * slow
        mixed += constants.recent * recent
        mixed += _TINY
        np.log(mixed, out=self._log_counts[start:stop])

    def _weigh(self, now: int) -> NDArray[np.float32]:
        """How much each earlier pass tells of the present one, and what followed it, `[now]`.

        Entry `r` is the weight of pass `r`, and of the passes before it, discounted, since `r`
        followed them. Moved on by one it tells of the next pass.
        """
        if not now:
            return np.zeros(0, np.float32)
        alike = self._alike[:now]
        weights = np.exp(self._scale / self._alike_limit * (alike - alike.mean()))
        weights /= weights.sum() + self._constants.prior
        return np.convolve(weights, self._future)[:now].astype(np.float32)

    def _revalue(self, position: int, echo: NDArray[np.float32], shift: int, clock: int) -> None:
        """Keep-values of one layer whose next visit is `shift` passes on, in pass `clock`."""
        first, last = self._bounds[position]
        constants = self._constants
        heard = self._used[first:last, shift : shift + len(echo)] @ echo
        prior = constants.prior * self._visits / (constants.prior + max(len(echo), 1))
        value = heard + prior * self._slow[first:last]
        value += _TINY
        np.log(value, out=value)
        value *= constants.trust
        value += (1.0 - constants.trust) * self._log_counts[first:last]
        value -= constants.order * (clock + position / self._layers)
        self._value[first:last] = value
