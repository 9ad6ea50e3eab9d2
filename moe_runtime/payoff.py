"""`Payoff`: finds out while a model runs whether acting on predictions makes it faster.

What finding out costs is kept in a ledger and bounded. Knows seconds only; not what is predicted,
nor what is done about it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, stdev
from typing import Any, Literal

__all__ = ["Decision", "Payoff", "PayoffRules"]


@dataclass(frozen=True, kw_only=True)
class PayoffRules:
    """How the trial goes.

    Args:
        window: decode steps that are compared with as many of the other kind before and after; the
            first of each kind is not counted, since its cache is the other way's.
        warm: steps in which the predictor only follows, before a window, if it was not told.
        allowed: share of the seconds that trying the other way may cost, in a trial and after it.
        free: steps' worth that it may cost at once.
        cut: a window is broken off when it has cost so many steps.
        light: a predictor that takes less than this share of a step is told all the time.
        least_windows, most_windows: before a decision can, and the first one has to, fall.
        hopeless: predicting is given up as soon as two windows in a row are slower by the first
            factor, or all steps of one by the second.
        sure: standard errors that the mean has to lie away from even.
        again: steps until a new trial after the decision to do without.
    """

    window: int = 4
    warm: int = 2
    allowed: tuple[float, float] = (0.02, 0.01)
    free: float = 1.0
    cut: float = 2.0
    light: float = 0.01
    least_windows: int = 5
    most_windows: int = 14
    hopeless: tuple[float, float] = (1.15, 2.0)
    sure: float = 2.0
    again: int = 2048


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
class Ledger:
    """What trying has cost, in seconds, of how many; prompts and decode steps apart."""

    allowed: float
    cost: float = 0.0
    elapsed: float = 0.0
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=8))

    def add(self, seconds: float, cost: float) -> None:
        """A call of `seconds`, of which trying cost so many."""
        self.elapsed += seconds
        self.cost += cost

    def followed(self, seconds: float, spent: float) -> None:
        """In a call of `seconds` the predictor took `spent`."""
        self.shares.append(spent / max(seconds, 1e-9))

    def share(self) -> float | None:
        """The predictor's part of a call, None before it is known."""
        return median(self.shares) if len(self.shares) > 1 else None

    def can_pay(self, cost: float = 0.0) -> bool:
        """Whether so much more stays within what is allowed."""
        return self.cost + cost <= self.allowed * self.elapsed


Phase = Literal["rest", "warm", "probe", "after"]


@dataclass
class Payoff:
    """Tries a window of decode steps the other way now and then, and compares its seconds.

    In a trial and without prediction the other way is with it. What a window is compared with are
    those before and after it (medians of steps), so that a drifting disk does not decide. A window
    that proved slow is followed by as many steps of the usual way as it takes for the loss to be a
    small part of the run; a fast one by the next. Undecided at the end of the trial means plain:
    who cannot show a gain is not used. Who is used goes on being compared in the same way.
    """

    rules: PayoffRules = field(default_factory=PayoffRules)
    enabled: bool = True
    decisions: list[Decision] = field(default_factory=lambda: [Decision(step=0, state="trial")])
    _steps: int = 0
    _since: int = 0
    _phase: Phase = "rest"
    _before: deque[float] = field(init=False)
    _now: list[float] = field(default_factory=list)  # steps of the present phase
    _tried: list[float] = field(default_factory=list)  # steps of the last window the other way
    _ratios: deque[float] = field(init=False)  # logarithms of seconds with prediction over without
    _decode: Ledger = field(init=False)
    _prefill: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self._before = deque(maxlen=self.rules.window)
        self._ratios = deque(maxlen=self.rules.most_windows)
        self._decode, self._prefill = (Ledger(self.rules.allowed[0]) for _ in range(2))

    @property
    def state(self) -> str:
        """Either "trial", "predicting" or "plain"."""
        return self.decisions[-1].state if self.enabled else "predicting"

    def acts(self, *, decode: bool) -> bool:
        """Whether predictions are to be acted on in the call that comes."""
        if not self.enabled or not decode:
            return self.follows(decode=decode)
        return self.state != "plain" and (self._phase == "probe") == (self.state == "trial")

    def follows(self, *, decode: bool) -> bool:
        """Whether the predictor has to be told what happens in the call that comes."""
        if self.state != "trial":
            return self.state == "predicting"
        if decode and self._phase in ("warm", "probe"):
            return True
        share = (self._decode if decode else self._prefill).share()
        if share is None or share < self.rules.light:
            return True
        # The gain of acting in a prompt is not known, what the predictor took of it is.
        return not decode and self._prefill.can_pay()

    def end_prefill(self, seconds: float, spent: float | None) -> None:
        """A prompt's call ended; arguments as of `end_step`."""
        if self.enabled and self.state == "trial":
            self._prefill.add(seconds, spent or 0.0)
            if spent is not None:
                self._prefill.followed(seconds, spent)

    def end_step(self, seconds: float, spent: float | None) -> None:
        """A decode step ended.

        Args:
            seconds: it took.
            spent: of these in the predictor, None if it was not told. A plain step is counted
                without them.
        """
        if not self.enabled:
            return
        self._steps += 1
        if self.state == "plain":
            self._since += 1
            if self._since >= self.rules.again:
                self._decide("trial", "time to look again")
            return
        if spent is not None:
            self._decode.followed(seconds, spent)
        told = spent or 0.0
        # What a step would have taken: with prediction all of it, plainly without the predictor.
        alone = seconds if self.acts(decode=True) else max(seconds - told, 1e-9)
        if self._phase == "probe":
            self._end_probe(seconds, alone)
        else:
            self._end_usual(seconds, alone)

    def fail(self, why: str) -> None:
        """There will be no predictions any more."""
        self._decide("plain", why)
        self.enabled = True
        self._since = -(10**12)

    def _end_probe(self, seconds: float, alone: float) -> None:
        usual = median(self._before)
        self._now.append(alone)
        self._decode.add(seconds, seconds - usual)
        lost = sum(self._now) - usual * len(self._now)
        slow = lost > self.rules.cut * usual and len(self._now) > 2
        if slow or len(self._now) > self.rules.window:
            self._tried = self._now
            self._go("after")

    def _end_usual(self, seconds: float, alone: float) -> None:
        rules = self.rules
        self._now.append(alone)
        if self._phase == "after":
            # What the window did to the cache is a part of its cost.
            self._decode.add(seconds, seconds - median(self._before))
            if len(self._now) > rules.window:
                self._judge(self._now[1:])
        else:
            self._decode.add(seconds, seconds - alone)
            self._before.append(alone)
        if self._phase == "warm" and len(self._now) >= rules.warm:
            self._go("probe")
        elif self._phase == "rest" and len(self._before) == rules.window and self._can_try():
            told = self.follows(decode=True) and self._decode.share() is not None
            self._go("probe" if told else "warm")

    def _can_try(self) -> bool:
        """Whether one more window, as slow as those so far, stays within what is allowed."""
        rules, usual, share, slower = self.rules, median(self._before), 0.0, 0.0
        if self._ratios:
            slower = math.exp(fmean(self._ratios) * (1 if self.state == "trial" else -1)) - 1.0
        if self.state == "trial":
            share = min(self._decode.share() or 0.0, 0.999)
        window = min(max(slower, 0.0) * (rules.window + 1), rules.cut + 1)
        warm = 0.0 if share < rules.light else rules.warm * share / (1 - share)
        return self._decode.can_pay((window + warm - rules.free) * usual)

    def _go(self, phase: Phase) -> None:
        self._phase, self._now = phase, []

    def _judge(self, after: list[float]) -> None:
        """A window and what comes after it are complete."""
        rules, trial = self.rules, self.state == "trial"
        usual = (math.log(median(self._before)) + math.log(median(after))) / 2
        found = math.log(median(self._tried[1:])) - usual
        self._ratios.append(found if trial else -found)
        self._before.extend(after)
        self._go("rest")
        windows = len(self._ratios)
        twice, once = (math.log(factor) for factor in rules.hopeless)
        if trial and math.log(min(self._tried[1:])) - usual > once:
            self._decide("plain", "every step of a window was much slower", found)
            return
        if windows < 2:
            return
        mean = fmean(self._ratios)
        error = stdev(self._ratios) / math.sqrt(windows)
        if trial and min(self._ratios[-1], self._ratios[-2]) > twice:
            self._decide("plain", "two windows in a row were much slower", mean, error)
        elif windows >= rules.least_windows and mean - rules.sure * error > 0:
            self._decide("plain", "steps with prediction are slower", mean, error)
        elif not trial:
            return
        elif windows >= rules.least_windows and mean + rules.sure * error < 0:
            self._decide("predicting", "steps with prediction are faster", mean, error)
        elif windows >= rules.most_windows:
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
        self._go("rest")
        self._before.clear()
        self._ratios.clear()
        for ledger in (self._decode, self._prefill):
            ledger.cost = ledger.elapsed = 0.0
            ledger.allowed = self.rules.allowed[state == "predicting"]
