"""From outcomes to figures: each arm's, and each comparison's of two arms.

Knows outcomes; not how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Literal

from moe_runtime.core import IntArray
from moe_runtime.steering import statistics
from moe_runtime.steering.controls import ArmPlan
from moe_runtime.steering.evaluation import Arm, Comparison, Estimate
from moe_runtime.steering.outcomes import Outcome
from moe_runtime.steering.statistics import Interval

__all__ = ["Rules", "arm_of", "compare"]

Outcomes = Mapping[tuple[str, int], Outcome]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How figures are made.

    Args:
        weights: of `cluster_weights`, the same for all arms.
        confidence: of intervals.
        resamples, seed: of Monte Carlo tests.
        greedy: the likeliest token was taken, once.
    """

    weights: IntArray
    confidence: float
    resamples: int
    seed: int
    greedy: bool


def arm_of(
    plan: ArmPlan,
    outcomes: Outcomes,
    problems: Sequence[str],
    samples: int,
    rules: Rules,
    *,
    seconds: float,
) -> Arm:
    """An arm's figures; `outcomes` has every sample of every problem."""
    rows = [[outcomes[problem, sample] for sample in range(samples)] for problem in problems]
    right = tuple(sum(one.right for one in row) for row in rows)
    share = sum(right) / (len(rows) * samples)
    thinking = [[float(one.thinking) for one in row] for row in rows]
    return Arm(
        name=plan.name,
        kind=plan.kind,
        experts=plan.experts,
        beta=plan.beta,
        draw=plan.draw,
        right=right,
        cut=_count(rows, "cut"),
        no_end=_count(rows, "no_end"),
        no_answer=_count(rows, "no_answer"),
        thinking=tuple(round(sum(row) / samples, 4) for row in thinking),
        accuracy=_mean([one / samples for one in right], rules),
        accuracy_wilson=_estimate(
            share,
            statistics.wilson(sum(right), len(rows) * samples, confidence=rules.confidence),
        ),
        pass_at=tuple(
            (k, _mean([statistics.pass_at_k(one, samples, k) for one in right], rules))
            for k in _powers(samples)
        ),
        thinking_median=_estimate(
            median_low([one for row in thinking for one in row]),
            statistics.bootstrap_median(thinking, rules.weights, confidence=rules.confidence),
        ),
        new_tokens=sum(one.tokens for row in rows for one in row),
        seconds=round(seconds, 3),
    )


def compare(arms: Sequence[Arm], samples: int, rules: Rules) -> tuple[Comparison, ...]:
    """All comparisons: with the unsteered arm, and of steered arms with their expert controls."""
    unsteered, others = arms[0], arms[1:]
    steered = [arm for arm in others if arm.kind == "steered"]
    found = [_compare(arm, unsteered, "steered", samples, rules) for arm in steered]
    found += [
        _compare(arm, unsteered, "controls", samples, rules)
        for arm in others
        if arm.kind != "steered"
    ]
    found += [
        _compare(arm, control, "specific", samples, rules)
        for arm in steered
        for control in others
        if control.kind in {"random", "frequency"} and control.beta == arm.beta
    ]
    return tuple(_corrected(found))


def _compare(
    arm: Arm,
    against: Arm,
    family: Literal["steered", "controls", "specific"],
    samples: int,
    rules: Rules,
) -> Comparison:
    counts = [a - b for a, b in zip(arm.right, against.right, strict=True)]
    longer = [a - b for a, b in zip(arm.thinking, against.thinking, strict=True)]
    better, worse = sum(one > 0 for one in counts), sum(one < 0 for one in counts)
    if rules.greedy and samples == 1:
        test = statistics.mcnemar(better, worse)
    else:
        test = statistics.sign_flip(counts, resamples=rules.resamples, seed=rules.seed)
    return Comparison(
        arm=arm.name,
        against=against.name,
        family=family,
        difference=_mean([one / samples for one in counts], rules),
        thinking_difference=_mean(longer, rules),
        better=better,
        worse=worse,
        test=test.name,
        p=test.p,
        p_holm=test.p,
    )


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """With Holm's correction, family by family."""
    corrected = list(found)
    for family in {one.family for one in found}:
        places = [at for at, one in enumerate(found) if one.family == family]
        for at, p in zip(places, statistics.holm([found[at].p for at in places]), strict=True):
            corrected[at] = replace(found[at], p_holm=p)
    return corrected


def _count(rows: Sequence[Sequence[Outcome]], form: str) -> tuple[int, ...]:
    return tuple(sum(one.form == form for one in row) for row in rows)


def _mean(values: Sequence[float], rules: Rules) -> Estimate:
    interval = statistics.bootstrap_mean(values, rules.weights, confidence=rules.confidence)
    return _estimate(sum(values) / len(values), interval)


def _estimate(value: float, interval: Interval) -> Estimate:
    return Estimate(value=value, low=interval.low, high=interval.high)


def _powers(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples."""
    found = [2**one for one in range(samples.bit_length()) if 2**one < samples]
    return [*found, samples]
