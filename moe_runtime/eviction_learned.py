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
from moe_runtime.selection import lowest_few

__all__ = ["Echo", "EchoConstants"]

_TINY = 1e-30  # keeps the logarithm of a count that has decayed away finite
_SLOW, _RECENT = 1, 2  # rows of the counts; the fast one is row 0


@dataclass(frozen=True, kw_only=True)
class EchoConstants:
    """The constants of `Echo`; the defaults are rounded from what `bench/policies.py` fitted.

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
        doubtful: how many candidates at least, the worst by their last value, are valued anew.
        history: passes remembered at most.
    """

    sharpness: float = 1.76
    fade: float = 0.8
    carry: float = 0.64
    discount: float = 0.51
    horizon: int = 3
    prior: float = 9.2
    fast: float = 0.9
    slow: float = 0.96
    fast_share: float = 0.56
    recent: float = 0.18
    recent_fade: float = 0.54
    trust: float = 0.56
    order: float = 1.27
    doubtful: int = 16
    history: int = 160

    def __post_init__(self) -> None:
        parts = ("fade", "carry", "discount", "fast", "slow", "fast_share", "recent_fade", "trust")
        for name in parts:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"echo: {name} has to lie in 0..1, found {getattr(self, name)}")
        if min(self.sharpness, self.prior, self.order, self.recent) < 0:
            raise ConfigError("echo: sharpness, prior, order and recent cannot be negative")
        if self.horizon < 0 or self.history < 8 or self.doubtful < 1:
            raise ConfigError(
                "echo: needs horizon 0 or more, history 8 or more, doubtful 1 or more; found "
                f"{self.horizon}, {self.history}, {self.doubtful}"
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

    To stay cheap an expert is valued when its layer is passed, and again only where it is among
    the `doubtful` lowest that are asked about.

    A step of many tokens (a prompt) counts as one pass whose experts weigh by their share of the
    busiest expert's tokens; the counts decay as if that expert's tokens had come one by one.

    Args:
        grid: numbering of the experts.
        constants: see there.
    """

    name: ClassVar[str] = "echo"

    def __init__(self, grid: ExpertGrid, constants: EchoConstants | None = None) -> None:
        self._constants = c = constants or EchoConstants()
        self._bounds = [(at, at + n) for at, n in zip(grid.offsets, grid.experts, strict=True)]
        layers = max(len(grid.layers), 1)
        self._due = np.repeat(np.arange(len(grid.layers)) / layers, grid.experts)
        # What each pass used: a row is an expert, so that a layer is a block; a column is a pass.
        self._used: NDArray[np.float32] = np.zeros((grid.size, c.history), np.float32)
        self._alike: NDArray[np.float32] = np.zeros(c.history, np.float32)
        self._alike_limit = 0.0  # what _alike would be for a pass that used the very same experts
        self._echo: NDArray[np.float32] = np.zeros(0, np.float32)
        self._pass = -1  # column of the present pass
        self._clock = 0  # passes begun, not wrapped
        self._position = len(grid.layers)  # of the last observed layer
        self._counts = np.zeros((3, grid.size))
        self._kept = np.array([[c.fast], [c.slow], [c.recent_fade]])
        self._mixture = np.array([c.fast_share, 1.0 - c.fast_share, c.recent])
        self._log_counts = np.full(grid.size, np.log(_TINY))
        self._value = np.zeros(grid.size)
        self._future = (c.discount ** np.arange(c.horizon + 1)).astype(np.float32)
        self._scale = c.sharpness * layers**0.5
        self._visits = 1.0 / (1.0 - min(c.discount, 0.99))

    def rank(self, candidates: IntArray) -> FloatArray:
        values = self._value[candidates]
        if not len(self._echo):
            return values
        doubtful = self._constants.doubtful
        if len(candidates) <= doubtful:
            return self._value_now(candidates)
        lowest = lowest_few(values, doubtful)
        values[lowest] = self._value_now(candidates[lowest])
        return values

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        if position <= self._position:
            self._begin_pass()
        self._position = position
        start, stop = self._bounds[position]
        layer, dense = slice(start, stop), experts + start
        busiest = int(tokens.max(initial=1))
        share = (tokens / busiest).astype(np.float32)
        now = self._pass
        if now:
            alike = self._alike[:now]
            alike *= self._constants.fade
            alike += (share / share.sum()) @ self._used.take(dense, axis=0)[:, :now]
            self._alike_limit = self._alike_limit * self._constants.fade + 1.0
        self._used[dense, now] = share
        self._count(layer, experts, share, busiest)
        self._weigh(now)
        # This layer comes again in the next pass: what counts is what followed, one pass later.
        heard = self._used[layer, 1 : now + 1] @ self._echo
        self._value[layer] = self._worth(heard, layer) - self._constants.order * (
            self._clock + 1 + self._due[start]
        )

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
        self, layer: slice, experts: IntArray, share: NDArray[np.float32], busiest: int
    ) -> None:
        """The counts of one layer, and the logarithm of their mixture."""
        kept = self._kept if busiest == 1 else self._kept**busiest
        counts = self._counts[:, layer]
        counts *= kept
        counts[:_RECENT, experts] += (1.0 - kept[:_RECENT]) * share
        counts[_RECENT, experts] = share
        mixed = self._mixture @ counts
        mixed += _TINY
        np.log(mixed, out=self._log_counts[layer])

    def _weigh(self, now: int) -> None:
        """How much each earlier pass tells of the present one, and what followed it: `_echo`.

        Entry `r` is the weight of pass `r`, and of the passes before it, discounted, since `r`
        followed them. Moved on by one it tells of the next pass.
        """
        if not now:
            return
        alike = self._alike[:now]
        weights = alike - alike.sum() / now
        weights *= self._scale / self._alike_limit
        np.exp(weights, out=weights)
        weights /= weights.sum() + self._constants.prior
        self._echo = np.convolve(weights, self._future)[:now]

    def _worth(self, heard: NDArray[np.float32], experts: slice | IntArray) -> FloatArray:
        """Keep-values, but for the time until the layer, of experts with this echo."""
        c = self._constants
        prior = c.prior * self._visits / (c.prior + max(len(self._echo), 1))
        value = heard + prior * self._counts[_SLOW, experts]
        value += _TINY
        np.log(value, out=value)
        value *= c.trust
        value += (1.0 - c.trust) * self._log_counts[experts]
        return value

    def _value_now(self, experts: IntArray) -> FloatArray:
        """Keep-values with the present resemblance, `[n]`, of any experts by dense index."""
        now = len(self._echo)
        used = self._used.take(experts, axis=0)
        passed = experts < self._bounds[self._position][1]
        heard = np.where(passed, used[:, 1 : now + 1] @ self._echo, used[:, :now] @ self._echo)
        due = self._due[experts]
        due += passed
        due += self._clock
        due *= self._constants.order
        return self._worth(heard, experts) - due
