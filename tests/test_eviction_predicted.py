"""`Predicted` against its definition, with and without a predictor's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError
from moe_runtime.eviction import Belady, choose_victims, make_policy
from moe_runtime.eviction_predicted import Predicted, PredictedConstants
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


class PlainPredicted:
    """The definition in loops, computed anew from all passes; none is forgotten."""

    def __init__(self, grid: ExpertGrid, constants: PredictedConstants) -> None:
        self.grid, self.c, self.layers = grid, constants, len(grid.layers)
        self.used: list[np.ndarray] = []
        self.alike: list[list[float]] = [[], []]
        self.limit = [0.0, 0.0]
        self.times = np.zeros(grid.size)  # steps that used each expert
        self.fast, self.slow, self.recent = np.zeros((3, grid.size))
        self.expected = np.full(grid.size, np.nan)
        self.last = self.layers

    def observe(self, position: int, experts: Any, tokens: Any) -> None:
        c = self.c
        fades, carries = (c.fade, c.rare_fade), (c.carry, c.rare_carry)
        if position <= self.last:
            if self.used:
                for way in range(2):
                    self.alike[way] = [0.0, *(carries[way] * v for v in self.alike[way])]
                    self.limit[way] *= carries[way]
            self.used.append(np.zeros(self.grid.size))
        self.last = position
        first = self.grid.offsets[position]
        mine, share = first + experts, tokens / tokens.max()
        surprise = -np.log((self.times[mine] + 1) / (len(self.used) + 1))
        for way, weight in enumerate((share, share * surprise)):
            for earlier, used in enumerate(self.used[:-1]):
                common = float((weight * used[mine]).sum() / weight.sum())
                self.alike[way][earlier] = self.alike[way][earlier] * fades[way] + common
            if len(self.used) > 1:
                self.limit[way] = self.limit[way] * fades[way] + 1
        self.used[-1][mine] = share
        self.times[mine] += 1
        layer = slice(first, first + self.grid.experts[position])
        for counts, decay in ((self.fast, c.fast), (self.slow, c.slow)):
            kept = decay ** tokens.max()
            counts[layer] *= kept
            counts[mine] += (1 - kept) * share
        self.recent[layer] *= c.recent_fade ** tokens.max()
        self.recent[mine] = share
        self.expected[layer] = np.nan

    def value(self, dense: int) -> float:
        c, now = self.c, len(self.used) - 1
        position = int(np.searchsorted(self.grid.offsets, dense, side="right")) - 1
        passes = 1 if position <= self.last else 0
        prior = c.prior / (1 - c.discount) / (c.prior + max(now, 1))
        worth = 0.0
        for way, (sharpness, discount, trust) in enumerate(
            (
                (c.sharpness, c.discount, c.trust),
                (c.rare_sharpness, c.rare_discount, c.rare_trust),
            )
        ):
            alike = np.array(self.alike[way])
            scale = sharpness * self.layers**0.5 / (self.limit[way] or 1)
            weights = np.exp(scale * (alike - (alike.mean() if now else 0)))
            weights /= weights.sum() + c.prior
            heard = 0.0
            for earlier in range(now):
                for later in range(c.horizon + 1):
                    source = earlier + passes + later
                    if source < now + passes:
                        heard += weights[earlier] * discount**later * self.used[source][dense]
            worth += trust * np.log(heard + prior * self.slow[dense] + 1e-30)
        counts = c.fast_share * self.fast[dense] + (1 - c.fast_share) * self.slow[dense]
        counts += c.recent * self.recent[dense]
        worth += (1 - c.trust - c.rare_trust) * np.log(counts + 1e-30)
        if not np.isnan(chance := self.expected[dense]):
            worth = np.log(c.certain * chance + (1 - chance) * np.exp(worth) + 1e-30)
        return float(worth - c.order * (len(self.used) + passes + position / self.layers))


@pytest.mark.parametrize(
    "constants",
    [
        PredictedConstants(doubtful=99),
        PredictedConstants(doubtful=99, horizon=0, carry=0.9, rare_carry=0.9, prior=0.0),
        PredictedConstants(doubtful=99, trust=0.0, rare_trust=1.0),
    ],
    ids=["default", "short", "rare echo alone"],
)
@pytest.mark.parametrize("fed", [False, True])
def test_it_is_its_definition(constants: PredictedConstants, fed: bool) -> None:
    fast, plain = Predicted(GRID, constants), PlainPredicted(GRID, constants)
    random = np.random.default_rng(7)
    for number, access in enumerate(random_run(20, GRID, seed=5)):
        if number % 11 == 10:
            continue  # a pass may leave a layer out
        for policy in (fast, plain):
            policy.observe(access.position, access.experts, access.tokens)
        if fed and number % 3 == 0:
            plain.expected = np.where(random.random(GRID.size) < 0.5, random.random(), np.nan)
            fast.expect(plain.expected)
        if len(plain.used) > 1:
            met = np.flatnonzero(plain.slow)  # no other can be a candidate
            expected = [plain.value(int(dense)) for dense in met]
            np.testing.assert_allclose(fast.rank(met), expected, rtol=1e-4, atol=1e-4)


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
    told, alone = (observe(Predicted(GRID), run[:-2]) for _ in range(2))
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
    policy = observe(Predicted(GRID, PredictedConstants(history=12)), random_run(100, GRID, 3))
    assert np.isfinite(policy.rank(np.arange(GRID.size))).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fade": 1.5}, "fade has to lie in 0..1, found 1.5"),
        ({"order": -1.0}, "order cannot be negative"),
        ({"sharpness": float("nan")}, "sharpness has to be finite"),
        ({"trust": 0.7, "rare_trust": 0.7}, "cannot exceed 1 together"),
        ({"history": 2}, "history 8 or more"),
        ({"certain": 0.0}, "certain above 0"),
    ],
)
def test_constants_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PredictedConstants(), **changes)
