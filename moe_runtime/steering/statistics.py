"""Intervals and tests for shares and means over problems that were each sampled several times.

Knows numbers only; not what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import ConfigError

__all__ = [
    "Interval",
    "Test",
    "bootstrap_mean",
    "bootstrap_median",
    "cluster_weights",
    "holm",
    "mcnemar",
    "pass_at_k",
    "percentile_interval",
    "sign_flip",
    "wilson",
]

EXACT_PROBLEMS = 20  # 2^20 sign patterns are enumerated exactly at the most
_CHUNK = 1 << 22  # entries of an array that is worked on at once


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Lower and upper end."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Test:
    """A two-sided p-value and how it was computed."""

    p: float
    name: str


def wilson(right: int, count: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927), for independent trials.

    Raises:
        ConfigError: no trial, more successes than trials, or a confidence outside 0 to 1.
    """
    if not 0 <= right <= count or count < 1:
        raise ConfigError(f"an interval needs trials: {right} right of {count}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # Where nothing or everything is right the end is 0 or 1 but for rounding.
    return Interval(
        low=0.0 if right == 0 else max(0.0, middle - half),
        high=1.0 if right == count else min(1.0, middle + half),
    )


def cluster_weights(problems: int, *, resamples: int, seed: int) -> IntArray:
    """How often each problem is drawn in each bootstrap resample, int64 `[resamples, problems]`.

    Problems are the clusters: a resample takes a problem with all of its samples. One draw serves
    all statistics of an evaluation, so that intervals of differences are paired.
    """
    rng = np.random.default_rng(seed)
    shares = np.full(problems, 1 / problems)
    return rng.multinomial(problems, shares, size=resamples).astype(np.int64)


def bootstrap_mean(values: Sequence[float], weights: IntArray, *, confidence: float) -> Interval:
    """Interval of the mean over problems (percentile method, Efron & Tibshirani 1993).

    Args:
        values: one for each problem, the mean of its samples.
        weights: of `cluster_weights`.
    """
    means = weights @ np.asarray(values, dtype=np.float64) / weights.sum(axis=1)
    return percentile_interval(means, confidence=confidence)


def bootstrap_median(
    samples: Sequence[Sequence[float]], weights: IntArray, *, confidence: float
) -> Interval:
    """Interval of the median over all samples, whole problems resampled.

    The median of a resample is its lower median: the smallest value that at least half of the
    weight does not exceed.
    """
    values = np.concatenate([np.asarray(one, dtype=np.float64) for one in samples])
    owner = np.repeat(np.arange(len(samples)), [len(one) for one in samples])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    medians = np.empty(len(weights))
    rows = max(1, _CHUNK // max(1, len(values)))
    for first in range(0, len(weights), rows):
        reached = np.cumsum(weights[first : first + rows][:, owner], axis=1)
        at = (reached * 2 >= reached[:, -1:]).argmax(axis=1)
        medians[first : first + rows] = values[at]
    return percentile_interval(medians, confidence=confidence)


def percentile_interval(draws: FloatArray, *, confidence: float) -> Interval:
    """The middle `confidence` of draws."""
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))


def sign_flip(differences: Sequence[float], *, resamples: int, seed: int) -> Test:
    """Paired permutation test that the mean difference is 0: signs of differences are flipped.

    Under the null hypothesis either arm could have given either result of a problem, so every
    pattern of signs is equally likely (Fisher's randomisation test). Problems without a difference
    do not count. All patterns are enumerated for up to 20 others; beyond that `resamples` are
    drawn and the observed one added, so that p is never 0 (Phipson & Smyth 2010).
    """
    values = np.asarray(differences, dtype=np.float64)
    sizes, observed = np.abs(values[values != 0]), abs(values.sum())
    # Sums of the same numbers in another order differ in the last bits.
    bar = observed * (1 - 1e-12) - 1e-12
    if len(sizes) <= EXACT_PROBLEMS:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate([sums - size, sums + size])
        return Test(p=float(np.mean(np.abs(sums) >= bar)), name="sign-flip exact")
    rng, extreme = np.random.default_rng(seed), 0
    rows = max(1, _CHUNK // len(sizes))
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        signs = rng.integers(0, 2, size=(count, len(sizes)), dtype=np.int8)
        extreme += int((np.abs((2.0 * signs - 1.0) @ sizes) >= bar).sum())
    return Test(p=(extreme + 1) / (resamples + 1), name="sign-flip Monte Carlo")


def mcnemar(better: int, worse: int) -> Test:
    """McNemar's exact test of two shares on the same problems, one answer of each.

    Args:
        better, worse: problems that only the one, and only the other got right.
    """
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, one) for one in range(least + 1))
    return Test(p=min(1.0, float(2 * tail / 2**count)), name="McNemar exact")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction (Holm 1979), in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = running
    return adjusted


def pass_at_k(right: int, count: int, k: int) -> float:
    """Chance that one of k samples, drawn from `count` of which `right` are right, is right.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374).
    """
    if not 1 <= k <= count:
        raise ConfigError(f"pass@k needs k of 1 to the {count} samples, found {k}")
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"a confidence lies between 0 and 1, found {confidence}")
    return confidence
