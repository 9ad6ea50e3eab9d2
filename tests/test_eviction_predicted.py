"""`Predicted` against its definition, with and without a predictor's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_runtime
from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError
from moe_runtime.eviction import Belady, choose_victims, make_policy
from moe_runtime.eviction_learned import Echo, EchoConstants
from moe_runtime.eviction_predicted import Predicted
from moe_runtime.runtime import runtime_of
from moe_runtime.simulate import simulate

GRID = ExpertGrid(layers=(1, 3, 4, 9), experts=(5, 3, 6, 4))
WIDE = ExpertGrid(layers=(0, 1, 2, 3), experts=(24, 24, 24, 24))


def random_run(passes: int, grid: ExpertGrid, seed: int = 0, chosen: int = 2) -> list[Access]:
    """Routing without a pattern; now and then a step of several tokens."""
    random = np.random.default_rng(seed)
    run = []
    for _ in range(passes):
        for position, count in enumerate(grid.experts):
            experts = np.sort(random.choice(count, size=min(chosen, count), replace=False))
            tokens = np.ones(len(experts), np.int64)
            if random.random() < 0.15:
                tokens = random.integers(1, 5, len(experts))
            run.append(Access(position=position, experts=experts, tokens=tokens))
    return run


def observe(policy: Any, run: Sequence[Access]) -> Any:
    for access in run:
        policy.observe(access.position, access.experts, access.tokens)
    return policy


def test_alone_it_is_echo() -> None:
    constants = EchoConstants(doubtful=99)
    echo, alone = Echo(GRID, constants), Predicted(GRID, constants)
    everything = np.arange(GRID.size)
    for access in random_run(30, GRID, seed=5):
        for policy in (echo, alone):
            policy.observe(access.position, access.experts, access.tokens)
        np.testing.assert_allclose(alone.rank(everything), echo.rank(everything), rtol=1e-6)


@pytest.mark.parametrize("certain", [8.0, 0.5])
def test_a_probability_splits_the_coming_step_off(certain: float) -> None:
    constants = EchoConstants(doubtful=99)
    echo = Echo(GRID, constants)
    told = Predicted(GRID, constants, certain)
    random = np.random.default_rng(7)
    everything = np.arange(GRID.size)
    passed = np.repeat(np.arange(4), GRID.experts)  # position of each expert's layer
    passes = 0
    for access in random_run(20, GRID, seed=5):
        passes += access.position == 0
        for policy in (echo, told):
            policy.observe(access.position, access.experts, access.tokens)
        chances = np.where(random.random(GRID.size) < 0.5, random.random(GRID.size), np.nan)
        told.expect(chances)
        if passes < 3:
            continue
        due = constants.order * (passes + (passed <= access.position) + passed / 4)
        past = np.exp(echo.rank(everything) + due)
        mixed = np.log(certain * chances + (1 - chances) * past) - due
        expected = np.where(np.isnan(chances), echo.rank(everything), mixed)
        np.testing.assert_allclose(told.rank(everything), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), passes=st.integers(1, 30), data=st.data())
def test_ranks_are_finite_and_do_not_depend_on_the_order_of_the_question(
    seed: int, passes: int, data: st.DataObject
) -> None:
    run = random_run(passes, WIDE, seed, chosen=3)
    policy = observe(Predicted(WIDE), run[: len(run) - seed % 4])
    if data.draw(st.booleans()):
        chances = np.random.default_rng(seed).random(WIDE.size)
        policy.expect(np.where(chances < 0.3, np.nan, chances.round()))
    met = np.unique([WIDE.offsets[a.position] + e for a in run for e in a.experts])
    asked = np.random.default_rng(seed).permutation(met)
    ranks = policy.rank(asked)
    assert np.isfinite(ranks).all()
    np.testing.assert_array_equal(ranks[np.argsort(asked)], policy.rank(met))


# -- with a predictor ------------------------------------------------------------------------------


class Told:
    """`Predicted`, told before each choice how each layer's next step will go."""

    name = "told"

    def __init__(self, grid: ExpertGrid, run: Sequence[Access], wrong: float = 0.0) -> None:
        self.policy, self.grid, self.step = Predicted(grid), grid, 0
        self.next: list[np.ndarray] = [np.zeros(0)] * len(run)
        coming = np.full(grid.size, np.nan)
        random = np.random.default_rng(1)
        for step in range(len(run) - 1, -1, -1):
            self.next[step] = coming.copy()
            access = run[step]
            start = grid.offsets[access.position]
            used = np.zeros(grid.experts[access.position])
            used[access.experts] = 1.0
            flipped = random.random(len(used)) < wrong
            coming[start : start + len(used)] = np.where(flipped, 1 - used, used)

    def observe(self, position: int, experts: Any, tokens: Any) -> None:
        self.policy.observe(position, experts, tokens)
        self.policy.expect(self.next[self.step])
        self.step += 1

    def rank(self, candidates: Any) -> Any:
        return self.policy.rank(candidates)


@pytest.mark.parametrize("seed", range(3))
def test_an_oracle_behind_it_comes_near_belady(seed: int) -> None:
    """The slots hold no more than half a pass uses, so each layer's next step tells all."""
    run, slots = random_run(30, WIDE, seed, chosen=8), 16
    best = simulate(Belady(WIDE, run), WIDE, run, slots).misses
    told = simulate(Told(WIDE, run), WIDE, run, slots).misses
    alone = simulate(Predicted(WIDE), WIDE, run, slots).misses
    assert best <= told <= 1.02 * best
    assert alone > 1.15 * best


def test_a_predictor_that_errs_seldom_still_helps() -> None:
    run, slots = random_run(40, WIDE, 4, chosen=8), 16
    misses = [simulate(Told(WIDE, run, wrong), WIDE, run, slots).misses for wrong in (0, 0.05, 0.5)]
    alone = simulate(Predicted(WIDE), WIDE, run, slots).misses
    assert misses[0] < misses[1] < alone
    assert misses[1] < misses[2]


def test_expectations_hold_until_their_layer_is_observed_and_are_replaced_as_a_whole() -> None:
    run = random_run(12, GRID)
    constants = EchoConstants(doubtful=99)
    told, alone = (observe(Predicted(GRID, constants), run[:-2]) for _ in range(2))
    everything = np.arange(GRID.size)
    before = alone.rank(everything)
    chances = np.full(GRID.size, np.nan)
    chances[[8, 14]] = 1.0, 0.0  # layers that this pass has still to come to
    told.expect(chances)
    after = told.rank(everything)
    changed = np.flatnonzero(after != before)
    assert set(changed) <= {8, 14}
    assert after[8] > before[8]
    told.expect(np.full(GRID.size, np.nan))
    np.testing.assert_array_equal(told.rank(everything), before)
    told.expect(chances)
    for policy in (told, alone):
        observe(policy, run[-2:])
    np.testing.assert_array_equal(told.rank(everything), alone.rank(everything))


def test_what_is_expected_for_certain_outlives_what_is_not() -> None:
    run = random_run(20, WIDE, 3)
    policy = observe(Predicted(WIDE), run[:-2])  # two layers of the last pass are still to come
    met = np.unique([WIDE.offsets[a.position] + e for a in run[:-2] for e in a.experts])
    coming = met[(met >= WIDE.offsets[2]) & (met < WIDE.offsets[3])]
    sure, out = coming[::2], coming[1::2]
    chances = np.full(WIDE.size, np.nan)
    chances[sure], chances[out] = 1.0, 0.0
    policy.expect(chances)
    assert set(choose_victims(policy, coming, len(out))) == set(out)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3), "each of the 18 experts, found shape"),
        (np.full(18, 1.5), "from 0 to 1, found 1.5 to 1.5"),
        (np.full(18, -0.1), "from 0 to 1"),
        (np.full(18, np.inf), "from 0 to 1"),
    ],
)
def test_expectations_that_are_none_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Predicted(GRID).expect(values)


def test_expectations_may_come_before_anything_was_observed() -> None:
    policy = Predicted(GRID)
    policy.expect(np.linspace(0, 1, GRID.size))
    assert np.isfinite(policy.rank(np.arange(GRID.size))).all()


# -- in the runtime --------------------------------------------------------------------------------


def test_the_runtime_and_the_simulator_count_the_same_hits() -> None:
    """A prompt of two and some tokens after it, inside a quarter of the experts."""
    model = moe_runtime.from_pretrained(
        moe_runtime.bundled_model(), expert_budget="25%", device="cpu", policy="predicted"
    )
    ids = torch.arange(40, 64).reshape(2, 12)
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    trace, slots = recorder.trace, runtime_of(model).cache.slots[0]
    counters = moe_runtime.report(model).counters
    simulated = simulate(make_policy("predicted", trace.grid), trace.grid, trace.accesses(), slots)
    assert (counters.hits, counters.misses) == (simulated.hits, simulated.misses)
    assert simulated.hits > 0 < simulated.evictions


# -- the rest --------------------------------------------------------------------------------------


def test_it_never_learns_residency() -> None:
    """Asking about other candidates, as another number of slots would, changes no later rank."""
    run = random_run(25, WIDE, 2)
    few, many = Predicted(WIDE), Predicted(WIDE)
    everything = np.arange(WIDE.size)
    for access in run:
        for policy in (few, many):
            policy.observe(access.position, access.experts, access.tokens)
        few.rank(everything[:7])
        many.rank(everything[::-2])
    np.testing.assert_array_equal(few.rank(everything), many.rank(everything))


def test_it_learns_a_cycle_that_defeats_lru() -> None:
    grid = ExpertGrid(layers=(0, 1), experts=(16, 16))
    run = [
        Access(
            position=position,
            experts=np.arange(4 * (step % 4), 4 * (step % 4) + 4),
            tokens=np.ones(4, np.int64),
        )
        for step in range(120)
        for position in range(2)
    ]
    assert simulate(make_policy("lru", grid), grid, run, 16).hits == 0
    assert simulate(make_policy("predicted", grid), grid, run, 16).hit_rate > 0.3


def test_it_forgets_the_oldest_passes_and_goes_on() -> None:
    policy = observe(Predicted(GRID, EchoConstants(history=12)), random_run(100, GRID, 3))
    assert np.isfinite(policy.rank(np.arange(GRID.size))).all()


@pytest.mark.parametrize("certain", [0.0, -1.0, float("nan"), float("inf")])
def test_a_worth_that_is_none_is_refused(certain: float) -> None:
    with pytest.raises(ConfigError, match="certain has to be above 0"):
        Predicted(GRID, certain=certain)
