"""Which absent experts are worth loading ahead of their layer, and which residents to hold on to.

Decides from forecasts, residency and what the link has to spare; it moves nothing and reads no
clock, so that the runtime and the simulator decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_runtime.cache import ExpertCache
from moe_runtime.core import FloatArray
from moe_runtime.errors import ConfigError
from moe_runtime.forecast import Forecaster

__all__ = ["PlannerRules", "PrefetchPlanner", "Spare"]


@dataclass(frozen=True, kw_only=True)
class PlannerRules:
    """When a forecast is acted on.

    Args:
        lookahead: layers ahead that are forecast and loaded for, 1 or more.
        bar: least probability for a load ahead.
        hold: least probability for a resident to stay while others can leave.
        share: part of a pool's slots that may be loading ahead at once.
        prefetch: whether anything is loaded ahead; else forecasts only decide what stays.
    """

    lookahead: int = 2
    bar: float = 0.4
    hold: float = 0.3
    share: float = 0.25
    prefetch: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.lookahead, int) or self.lookahead < 1:
            raise ConfigError(f"lookahead must be 1 layer or more, found {self.lookahead!r}")
        for name in ("bar", "hold", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} has to lie in 0..1, found {getattr(self, name)!r}")


@dataclass
class Spare:
    """How long the link is free of needed loads between two layers, decode and prefill apart.

    Decayed means, seconds; None before anything was seen.
    """

    keep: float = 0.9
    decode: float | None = None
    prefill: float | None = None

    def add(self, seconds: float, *, decode: bool) -> None:
        """The link was free for so long before a layer began."""
        name = "decode" if decode else "prefill"
        known = getattr(self, name)
        setattr(
            self, name, seconds if known is None else self.keep * known + (1 - self.keep) * seconds
        )

    def of(self, *, decode: bool) -> float | None:
        """Seconds a layer."""
        return self.decode if decode else self.prefill


@dataclass(eq=False)
class PrefetchPlanner:
    """Decisions over one run.

    Args:
        cache: whose residency it looks at, and whose expectations it sets.
        forecaster: says what will be needed.
        rules: when to act.
        nbytes: bytes of one expert of each layer position.
        expect: takes the forecasts, `[grid.size]`, NaN where there is none, if the policy can make
            use of them; the cache's expectations serve the others.
    """

    cache: ExpertCache
    forecaster: Forecaster
    rules: PlannerRules
    nbytes: Sequence[int]
    expect: Callable[[FloatArray], None] | None = None
    _values: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self._values = np.full(self.cache.grid.size, np.nan)

    @property
    def forecasts(self) -> FloatArray:
        """A copy of the probabilities at hand, `[grid.size]`, NaN where there is none."""
        return self._values.copy()

    def choose(self, position: int, room: float) -> list[tuple[int, int]]:
        """Loads to start now, the most urgent first; also renews what is expected.

        Nearest layers first, in each the likeliest first, as long as what is already under way
        and these arrive before their layer begins, or are likely enough to be begun all the same.

        Args:
            position: the layer that runs now; -1 before the first.
            room: bytes that the link can bring in beside what is needed, until the next layer.

        Returns:
            (layer position, expert) of absent experts.
        """
        grid, rules = self.cache.grid, self.rules
        self._forget(position)
        under_way = [len(self.cache.loading_ahead(p)) for p in range(len(grid.layers))]
        chosen: list[tuple[int, int]] = []
        pending = float(
            sum(count * size for count, size in zip(under_way, self.nbytes, strict=True))
        )
        last = min(position + rules.lookahead, len(grid.layers) - 1)
        for coming in range(position + 1, last + 1):
            values = self.forecaster.demand(coming, coming - position)
            if values is None:
                return []
            start = grid.offsets[coming]
            self._values[start : start + len(values)] = values
            if self.expect is None:
                self.cache.expect(coming, np.flatnonzero(values >= rules.hold).tolist())
            if not rules.prefetch:
                continue
            likely = np.flatnonzero(values >= rules.bar)
            for expert in likely[np.argsort(-values[likely], kind="stable")].tolist():
                if self.cache.slot(coming, expert) >= 0:
                    continue
                free = room * (coming - position) - pending
                if not _worth_beginning(float(values[expert]), free, self.nbytes[coming]):
                    break
                if not self._may_load(coming, under_way, chosen):
                    break
                chosen.append((coming, expert))
                pending += self.nbytes[coming]
        if self.expect is not None:
            self.expect(self._values)
        return chosen

    def stop(self) -> None:
        """Predictions are not acted on: nothing is expected."""
        self.cache.expect_nothing()
        if self.expect is not None:
            self._values[:] = np.nan
            self.expect(self._values)

    def _forget(self, position: int) -> None:
        """What was forecast for layers that have run by now, or for an earlier call."""
        grid = self.cache.grid
        if position < 0:
            self._values[:] = np.nan
            self.cache.expect_nothing()
            return
        start = grid.offsets[position]
        self._values[start : start + grid.experts[position]] = np.nan
        self.cache.expect(position, ())

    def _may_load(
        self, position: int, under_way: Sequence[int], chosen: Sequence[tuple[int, int]]
    ) -> bool:
        group = self.cache.group(position)
        busy = sum(n for p, n in enumerate(under_way) if self.cache.group(p) == group)
        busy += sum(self.cache.group(p) == group for p, _ in chosen)
        return busy < max(1, int(self.rules.share * self.cache.slots[group]))


def _worth_beginning(chance: float, free: float, nbytes: int) -> bool:
    """Whether a load is to be begun in `free` bytes of spare link before its layer begins.

    One that fits costs nothing that is needed. Of one that does not, the part `free / nbytes` is
    gained if it is used, and the other part delays what is needed if it is not; it is worth it from
    the chance on at which these balance.
    """
    if free >= nbytes:
        return True
    return free > 0 and chance >= 1.0 - free / nbytes
