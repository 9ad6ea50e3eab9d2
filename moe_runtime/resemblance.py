"""`PassMemory`: what each earlier pass of a run used, and how far it resembles the present one.

Knows nothing of keep-values, slots or tensors: it sees shares of experts, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, IntArray

__all__ = ["Likeness", "PassMemory", "Shares"]

Shares = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """One way to compare passes.

    Args:
        sharpness: how strongly resemblance decides which earlier passes are listened to.
        fade: kept part of the resemblance per layer step, so that near layers count most.
        carry: kept part of the resemblance from one pass to the next.
        prior: weight of what is known besides, in passes, against the resembling passes.
        rare: a shared expert counts by the surprise at its use (minus the logarithm of its
            frequency in the run), so that an expert that all passes use tells nothing.
    """

    sharpness: float
    fade: float
    carry: float
    prior: float
    rare: bool = False


class PassMemory:
    """The experts of the last passes, and a running resemblance of each to the present pass.

    A pass is one forward call through all layers (one decoded token, or one prompt).

    Args:
        grid: numbering of the experts.
        history: passes remembered at most, 8 or more; a full memory loses its older third.
        ways: the ways to compare passes.
    """

    def __init__(self, grid: ExpertGrid, history: int, ways: Sequence[Likeness]) -> None:
        assert history >= 8, "too short to lose a third"
        self.history = history
        # What each pass used: a row is an expert, so that a layer is a block; a column is a pass.
        self.used: Shares = np.zeros((grid.size, history), np.float32)
        self.now = -1  # column of the present pass
        self.clock = 0  # passes begun, not wrapped
        self._ways = tuple(ways)
        self._alike: list[Shares] = [np.zeros(history, np.float32) for _ in ways]
        self._limit = [0.0] * len(ways)  # what _alike would be for a pass of the very same experts
        self._scale = max(len(grid.layers), 1) ** 0.5
        self._uses = np.zeros(grid.size) if any(way.rare for way in ways) else None

    def begin_pass(self) -> None:
        """Go to the next column; what resembled the last pass is followed by what may come."""
        self.clock += 1
        self.now += 1
        if self.now == self.history:
            kept = self.history - self.history // 3
            self.used[:, :kept] = self.used[:, self.history - kept :].copy()
            self.used[:, kept:] = 0
            for alike in self._alike:
                alike[:kept] = alike[self.history - kept :].copy()
            self.now = kept
        # The pass after a resembling one should resemble the present one: resemblance moves on.
        if self.now:
            for number, way in enumerate(self._ways):
                alike = self._alike[number]
                alike[1 : self.now] = way.carry * alike[: self.now - 1]
                alike[0] = 0.0
                self._limit[number] *= way.carry

    def take(self, dense: IntArray, share: Shares) -> None:
        """A layer of the present pass used these experts.

        Args:
            dense: int64 `[n]`, distinct dense indices, all of one layer.
            share: float32 `[n]`, tokens of each over those of the busiest.
        """
        if self.now:
            before = self.used.take(dense, axis=0)[:, : self.now]
            for number, way in enumerate(self._ways):
                weight = share * self._surprise(dense) if way.rare else share
                alike = self._alike[number][: self.now]
                alike *= way.fade
                alike += (weight / weight.sum()) @ before
                self._limit[number] = self._limit[number] * way.fade + 1.0
        self.used[dense, self.now] = share
        if self._uses is not None:
            self._uses[dense] += 1.0

    def weights(self, number: int = 0) -> Shares:
        """How much each earlier pass tells of the present one, by way `number`.

        Returns:
            float32 `[now]`: a softmax of the resemblances with `prior` added below the line.
        """
        way, alike = self._ways[number], self._alike[number][: self.now]
        weights = alike - alike.sum() / max(self.now, 1)
        weights *= way.sharpness * self._scale / max(self._limit[number], 1e-30)
        np.exp(weights, out=weights)
        weights /= weights.sum() + way.prior
        return weights

    def _surprise(self, dense: IntArray) -> Shares:
        assert self._uses is not None
        # An expert was used in `clock - 1` passes at most before this one: never 0.
        return np.log((self.clock + 1.0) / (self._uses[dense] + 1.0)).astype(np.float32)
