"""Intervals and tests against published values, brute force, and their coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import ConfigError
from moe_runtime.steering import statistics

DIFFERENCES = st.lists(st.integers(-4, 4), min_size=1, max_size=9)


def test_wilson_as_published() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29.
    for right, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = statistics.wilson(right, count)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert statistics.wilson(20, 20).high == 1.0


def test_impossible_intervals_are_refused() -> None:
    for right, count in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ConfigError, match="needs trials"):
            statistics.wilson(right, count)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        statistics.wilson(1, 2, confidence=95)


@given(DIFFERENCES)
def test_the_sign_flip_is_the_enumeration(differences: list[int]) -> None:
    observed = abs(sum(differences))
    patterns = list(itertools.product((-1, 1), repeat=len(differences)))
    extreme = sum(
        abs(sum(s * d for s, d in zip(p, differences, strict=True))) >= observed for p in patterns
    )
    test = statistics.sign_flip(differences, resamples=10, seed=0)
    assert test.name == "sign-flip exact"
    assert math.isclose(test.p, extreme / len(patterns))


def test_the_drawn_sign_flip_agrees_with_the_exact_one() -> None:
    # 24 problems of difference 1 or -1: the exact p is the two-sided binomial one.
    differences = [1] * 18 + [-1] * 6
    exact = 2 * sum(math.comb(24, one) for one in range(7)) / 2**24
    test = statistics.sign_flip(differences, resamples=40_000, seed=1)
    assert test.name == "sign-flip Monte Carlo"
    assert abs(test.p - exact) < 4 * math.sqrt(exact / 40_000)
    assert statistics.sign_flip([1] * 40, resamples=99, seed=0).p == pytest.approx(0.01)  # never 0


def test_the_sign_flip_keeps_its_level() -> None:
    rng = np.random.default_rng(3)
    p = [
        statistics.sign_flip(rng.integers(-3, 4, size=14), resamples=10, seed=0).p
        for _ in range(400)
    ]
    share = np.mean(np.array(p) <= 0.1)
    assert 0.04 < share < 0.14


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_a_sign_flip_of_ones(better: int, worse: int) -> None:
    test = statistics.mcnemar(better, worse)
    assert 0 < test.p <= 1
    if better + worse <= statistics.EXACT_PROBLEMS:
        flips = statistics.sign_flip([1] * better + [-1] * worse, resamples=9, seed=0)
        assert math.isclose(test.p, flips.p)


def test_holm_as_in_the_book() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_order_and_never_lowers(values: list[float]) -> None:
    found = statistics.holm(values)
    assert all(a >= b for a, b in zip(found, values, strict=True))
    assert all(one <= 1 for one in found)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(found[a] <= found[b] for a, b in itertools.pairwise(order))


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_is_the_share_of_subsets(case: tuple[int, int]) -> None:
    count, right = case
    for k in range(1, count + 1):
        subsets = list(itertools.combinations(range(count), k))
        share = sum(any(one < right for one in subset) for subset in subsets) / len(subsets)
        assert statistics.pass_at_k(right, count, k) == pytest.approx(share)
    with pytest.raises(ConfigError):
        statistics.pass_at_k(right, count, count + 1)


def test_the_cluster_bootstrap_covers_and_wilson_does_not() -> None:
    """Problems with shares of their own, 16 samples each: what the two intervals are worth."""
    rng = np.random.default_rng(0)
    covered, naive, runs = 0, 0, 250
    for run in range(runs):
        shares = rng.beta(0.5, 0.5, size=40)  # mean 1/2: most problems are easy or hard
        right = rng.binomial(16, shares)
        weights = statistics.cluster_weights(40, resamples=400, seed=run)
        interval = statistics.bootstrap_mean(right / 16, weights, confidence=0.95)
        covered += interval.low <= 0.5 <= interval.high
        wilson = statistics.wilson(int(right.sum()), 40 * 16)
        naive += wilson.low <= 0.5 <= wilson.high
    assert covered / runs > 0.90
    assert naive / runs < 0.6


def test_the_median_of_a_resample_is_the_median_of_its_samples() -> None:
    samples = [[1.0, 5.0, 2.0], [9.0, 9.0, 3.0], [4.0, 7.0, 8.0]]
    weights = statistics.cluster_weights(3, resamples=200, seed=2)
    medians = []
    for row in weights:
        drawn = sorted(v for one, times in zip(samples, row, strict=True) for v in one * times)
        medians.append(drawn[(len(drawn) - 1) // 2])
    found = statistics.bootstrap_median(samples, weights, confidence=0.9)
    assert (found.low, found.high) == tuple(np.quantile(medians, [0.05, 0.95]))
    assert (weights.sum(axis=1) == 3).all()
