"""`Payoff`: finds out while a model runs whether acting on predictions makes it faster.

Knows seconds only; not what is predicted, nor what is done about it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, stdev
from typing import Any

__all__ = ["Decision", "Payoff", "PayoffRules"]


@dataclass(frozen=True, kw_only=True)
class PayoffRules:
    """How the trial goes.

    Args:
        window: decode steps that run alike; the first of each is not counted, since its cache is
            the other way's.
        least_pairs, most_pairs: pairs of windows before a decision can, and has to, fall.
        hopeless: predicting is given up as soon as two pairs are slower by this factor.
        sure: standard errors that the mean has to lie away from even.
        again: steps until a new trial after the decision to predict, and to do without.
    """

    window: int = 8
    least_pairs: int = 4
    most_pairs: int = 12
    hopeless: float = 1.15
    sure: float = 1.5
    again: tuple[int, int] = (1024, 2048)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided at which decode step, and on what grounds.

    Args:
        step: decode steps counted so far.
        state: "trial", "predicting" or "plain".
        ratio: mean seconds a step with prediction over those without, None before a trial.
        error: standard error of its logarithm.
        why: in words.
    """

    step: int
    state: str
    ratio: float | None = None
    error: float | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a run file."""
        return asdict(self)


@dataclass
class Payoff:
    """Alternates windows of decode steps with and without prediction and compares their seconds.

    While undecided half of the steps run plainly. The comparison is of neighbouring windows (the
    medians of their steps), so that a drifting disk does not decide. Undecided at the end of the
    trial means plain: who cannot show a gain is not used.
    """

    rules: PayoffRules = field(default_factory=PayoffRules)
    enabled: bool = True
    decisions: list[Decision] = field(default_factory=lambda: [Decision(step=0, state="trial")])
    _steps: int = 0
    _since: int = 0
    _window: list[float] = field(default_factory=list)
    _medians: list[float] = field(default_factory=list)
    _ratios: list[float] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Either "trial", "predicting" or "plain"."""
        return self.decisions[-1].state if self.enabled else "predicting"

    @property
    def acting(self) -> bool:
        """Whether predictions are to be acted on in the step that comes."""
        if self.state != "trial":
            return self.state == "predicting"
        # Windows go plain, acting, acting, plain, ...: a steady drift cancels out.
        return len(self._medians) % 4 in (1, 2)

    @property
    def following(self) -> bool:
        """Whether the predictor has to be told what happens, acting or not."""
        return self.state != "plain"

    def end_step(self, seconds: float, predictor_seconds: float) -> None:
        """A decode step ended.

        Args:
            seconds: it took.
            predictor_seconds: of these in the predictor; a plain step is counted without them.
        """
        if not self.enabled:
            return
        acting = self.acting
        self._steps += 1
        if self.state != "trial":
            self._since += 1
            if self._since >= self.rules.again[self.state == "plain"]:
                self._decide("trial", "time to look again")
            return
        self._window.append(seconds if acting else max(seconds - predictor_seconds, 1e-9))
        if len(self._window) < self.rules.window:
            return
        self._medians.append(median(self._window[1:] or self._window))
        self._window.clear()
        if len(self._medians) % 2 == 0:
            first, second = self._medians[-2:]
            # The second window acted in the first pair of four windows, the first one in the other.
            swap = len(self._medians) % 4 == 0
            acted, plain = (first, second) if swap else (second, first)
            self._ratios.append(math.log(acted / plain))
            self._judge()

    def fail(self, why: str) -> None:
        """There will be no predictions any more."""
        self._decide("plain", why)
        self.enabled = True
        self._since = -(10**12)

    def _judge(self) -> None:
        rules, pairs = self.rules, len(self._ratios)
        if pairs < 2:
            return
        mean = fmean(self._ratios)
        error = stdev(self._ratios) / math.sqrt(pairs)
        if min(self._ratios[-2:]) > math.log(rules.hopeless):
            self._decide("plain", "two pairs of windows in a row were much slower", mean, error)
        elif pairs >= rules.least_pairs and mean + rules.sure * error < 0:
            self._decide("predicting", "steps with prediction are faster", mean, error)
        elif pairs >= rules.least_pairs and mean - rules.sure * error > 0:
            self._decide("plain", "steps with prediction are slower", mean, error)
        elif pairs >= rules.most_pairs:
            self._decide("plain", "no gain could be shown", mean, error)

    def _decide(
        self, state: str, why: str, mean: float | None = None, error: float | None = None
    ) -> None:
        ratio = None if mean is None else round(math.exp(mean), 4)
        self.decisions.append(
            Decision(
                step=self._steps,
                state=state,
                ratio=ratio,
                error=None if error is None else round(error, 4),
                why=why,
            )
        )
        self._since = 0
        for kept in (self._window, self._medians, self._ratios):
            kept.clear()
