"""The policies: each against its definition written out plainly, and what all must keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError
from moe_runtime.eviction import POLICY_NAMES, EvictionPolicy, choose_victims, make_policy
from moe_runtime.eviction_learned import Echo, EchoConstants
from moe_runtime.selection import lowest_few
from moe_runtime.simulate import simulate

GRID = ExpertGrid(layers=(1, 3, 4), experts=(5, 3, 6))


def make(name: str, run: Sequence[Access] = ()) -> EvictionPolicy:
    options: dict[str, Any] = {
        "static": {"counts": np.arange(GRID.size)},
        "belady": {"accesses": run},
    }.get(name, {})
    return make_policy(name, GRID, **options)


def feed(policy: EvictionPolicy, run: Sequence[Access]) -> EvictionPolicy:
    for access in run:
        policy.observe(access.position, access.experts, access.tokens)
    return policy


def random_run(passes: int, seed: int = 0, grid: ExpertGrid = GRID) -> list[Access]:
    random = np.random.default_rng(seed)
    run = []
    for _ in range(passes):
        for position, count in enumerate(grid.experts):
            chosen = np.sort(random.choice(count, size=min(2, count), replace=False))
            tokens = random.integers(1, 5, len(chosen)) if random.random() < 0.2 else 1
            run.append(
                Access(
                    position=position,
                    experts=chosen,
                    tokens=np.broadcast_to(tokens, len(chosen)).astype(np.int64),
                )
            )
    return run


# -- choosing ------------------------------------------------------------------------------------


class _Given:
    name = "given"

    def __init__(self, values: dict[int, float]) -> None:
        self._values = values

    def observe(self, position: int, experts: Any, tokens: Any) -> None:
        pass

    def rank(self, candidates: Any) -> Any:
        return np.array([self._values[int(c)] for c in candidates])


@given(
    st.dictionaries(
        st.integers(0, 99),
        st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]),
        min_size=1,
    ),
    st.data(),
)
def test_the_lowest_leave_first_and_ties_go_to_the_lowest_index(
    values: dict[int, float], data: st.DataObject
) -> None:
    candidates = np.array(data.draw(st.permutations(sorted(values))))
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(values, key=lambda c: (values[c], c))[:count]
    assert choose_victims(_Given(values), candidates, count).tolist() == expected


def test_more_victims_than_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 victims among 1"):
        choose_victims(make("lru"), np.array([3]), 2)


@given(
    st.lists(
        st.sampled_from([-np.inf, -3.0, 0.0, 0.5]) | st.floats(-9, 9), min_size=1, max_size=999
    ),
    st.data(),
)
def test_the_lowest_few_hold_the_lowest(numbers: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(numbers)))
    values = np.array(numbers)
    found = lowest_few(values, count)
    assert (np.diff(found) > 0).all()
    others = np.delete(values, found)
    assert len(found) >= count
    assert (others > np.sort(values)[count - 1]).all()


def test_the_lowest_few_are_few() -> None:
    values = np.random.default_rng(0).random(5000)
    assert 16 <= len(lowest_few(values, 16)) <= 32


# -- what every policy keeps -----------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_the_same_run_gives_the_same_ranks_and_ranking_changes_nothing(name: str) -> None:
    run = random_run(40)
    everything = np.arange(GRID.size)
    asked, unasked = make(name, run), make(name, run)
    for access in run:
        for policy in (asked, unasked):
            policy.observe(access.position, access.experts, access.tokens)
        asked.rank(everything)
        asked.rank(everything[::-2])
    ranks = unasked.rank(everything)
    assert ranks.dtype == np.float64
    assert not np.isnan(ranks).any()
    np.testing.assert_array_equal(asked.rank(everything), ranks)
    np.testing.assert_array_equal(unasked.rank(everything[::-1]), ranks[::-1])


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_ranks_are_copies(name: str) -> None:
    run = random_run(3)
    policy = feed(make(name, run), run)
    everything = np.arange(GRID.size)
    before = policy.rank(everything).copy()
    policy.rank(everything)[:] = -1e9
    np.testing.assert_array_equal(policy.rank(everything), before)


def test_an_unknown_policy_lists_the_known() -> None:
    known = r"'mru'; known: lru, lfu, static, echo, predicted, belady"
    with pytest.raises(ConfigError, match=known):
        make_policy("mru", GRID)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lru", {"decay": 0.5}, "'lru'.*decay"),
        ("lfu", {"decay": 0.0}, r"decay has to lie in \(0, 1\], found 0.0"),
        ("static", {"counts": [1, 2]}, "each of the 14 experts"),
        ("static", {"counts": [np.nan] * 14}, "NaN"),
        ("static", {}, "counts"),
        ("belady", {}, "accesses"),
    ],
)
def test_options_that_a_policy_does_not_take_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(name, GRID, **options)


# -- each against its definition -------------------------------------------------------------------


def test_lru_ranks_by_the_step_of_the_last_use() -> None:
    run = random_run(20)
    last = np.zeros(GRID.size)
    for step, access in enumerate(run, start=1):
        last[GRID.offsets[access.position] + access.experts] = step
    np.testing.assert_array_equal(feed(make("lru"), run).rank(np.arange(GRID.size)), last)


def test_lfu_is_the_decayed_sum_of_shares() -> None:
    run = random_run(20)
    decay = 0.9
    expected = np.zeros(GRID.size)
    for position, (start, count) in enumerate(zip(GRID.offsets, GRID.experts, strict=True)):
        visits = [access for access in run if access.position == position]
        for age, access in enumerate(reversed(visits)):
            expected[start + access.experts] += decay**age * access.tokens / access.tokens.max()
        assert count
    found = feed(make_policy("lfu", GRID, decay=decay), run).rank(np.arange(GRID.size))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_static_ranks_by_the_given_counts() -> None:
    counts = np.arange(GRID.size)[::-1]
    policy = feed(make_policy("static", GRID, counts=counts), random_run(5))
    np.testing.assert_array_equal(policy.rank(np.array([0, 13, 4])), [13.0, 0.0, 9.0])


def test_belady_ranks_by_the_next_use() -> None:
    run = random_run(15)
    policy = make("belady", run)
    needs = [set((GRID.offsets[a.position] + a.experts).tolist()) for a in run]
    for step, access in enumerate(run):
        policy.observe(access.position, access.experts, access.tokens)
        for expert, rank in enumerate(policy.rank(np.arange(GRID.size))):
            later = [at for at in range(step + 1, len(run)) if expert in needs[at]]
            assert rank == (-later[0] if later else -np.inf)


def test_belady_refuses_another_run_than_its_own() -> None:
    run = random_run(4)
    policy = feed(make("belady", run), run[:3])
    with pytest.raises(ConfigError, match="step 3 is not the one"):
        policy.observe(2, np.array([0]), np.array([1]))
    with pytest.raises(ConfigError, match=f"step {len(run)}"):
        feed(make("belady", run), [*run, run[0]])


# -- echo ------------------------------------------------------------------------------------------


class PlainEcho:
    """The definition of `Echo` in loops, computed anew from all earlier passes; none is lost."""

    def __init__(self, grid: ExpertGrid, constants: EchoConstants) -> None:
        self.grid, self.c, self.layers = grid, constants, len(grid.layers)
        self.used: list[np.ndarray] = []  # share of each expert, one array a pass
        self.alike: list[float] = []
        self.limit = 0.0
        self.fast, self.slow, self.recent, self.value = np.zeros((4, grid.size))
        self.last = self.layers

    def observe(self, access: Access) -> None:
        c, position = self.c, access.position
        if position <= self.last:
            if self.used:
                self.alike = [0.0, *(c.carry * value for value in self.alike)]
                self.limit *= c.carry
            self.used.append(np.zeros(self.grid.size))
        self.last = position
        mine = self.grid.offsets[position] + access.experts
        share = access.tokens / access.tokens.max()
        if self.alike:
            for earlier, used in enumerate(self.used[:-1]):
                common = float((share * used[mine]).sum() / share.sum())
                self.alike[earlier] = self.alike[earlier] * c.fade + common
            self.limit = self.limit * c.fade + 1
        self.used[-1][mine] = share
        layer = slice(self.grid.offsets[position], None)
        layer = slice(layer.start, layer.start + self.grid.experts[position])
        for counts, decay in ((self.fast, c.fast), (self.slow, c.slow)):
            kept = decay ** access.tokens.max()
            counts[layer] *= kept
            counts[mine] += (1 - kept) * share
        self.recent[layer] *= c.recent_fade ** access.tokens.max()
        self.recent[mine] = share
        for other in range(self.layers):
            self.revalue(other, 1 if other <= position else 0)

    def revalue(self, position: int, passes_until: int) -> None:
        c, now = self.c, len(self.used) - 1
        weights = np.exp(
            c.sharpness
            * self.layers**0.5
            * (np.array(self.alike) - (np.mean(self.alike) if now else 0))
            / (self.limit or 1)
        )
        weights /= weights.sum() + c.prior
        for expert in range(self.grid.experts[position]):
            at = self.grid.offsets[position] + expert
            heard = 0.0
            for earlier in range(now):
                for later in range(c.horizon + 1):
                    source = earlier + passes_until + later
                    if source < now + passes_until:
                        heard += weights[earlier] * c.discount**later * self.used[source][at]
            prior = c.prior / (1 - c.discount) / (c.prior + max(now, 1))
            counts = c.fast_share * self.fast[at] + (1 - c.fast_share) * self.slow[at]
            counts += c.recent * self.recent[at]
            self.value[at] = (
                c.trust * np.log(heard + prior * self.slow[at] + 1e-30)
                + (1 - c.trust) * np.log(counts + 1e-30)
                - c.order * (len(self.used) + passes_until + position / self.layers)
            )


@pytest.mark.parametrize(
    "constants",
    [EchoConstants(), EchoConstants(horizon=0, carry=0.9, prior=0.0), EchoConstants(trust=1.0)],
    ids=["default", "short", "echo alone"],
)
def test_echo_is_its_definition(constants: EchoConstants) -> None:
    grid = ExpertGrid(layers=(1, 3, 4, 9), experts=(5, 3, 6, 4))
    fast, plain = Echo(grid, constants), PlainEcho(grid, constants)
    for number, access in enumerate(random_run(25, seed=5, grid=grid)):
        if number % 11 == 10:
            continue  # a pass may leave a layer out
        fast.observe(access.position, access.experts, access.tokens)
        plain.observe(access)
        if len(plain.used) > 1:
            met = np.flatnonzero(plain.slow)  # no other can be a candidate
            ranks = np.concatenate([fast.rank(part) for part in np.array_split(met, 2)])
            np.testing.assert_allclose(ranks, plain.value[met], rtol=1e-4, atol=1e-4)


def test_echo_values_the_doubtful_anew_and_the_others_as_they_were() -> None:
    grid = ExpertGrid(layers=(0, 1), experts=(40, 40))
    run = random_run(30, seed=6, grid=grid)
    few = feed(Echo(grid, EchoConstants(doubtful=4)), run)
    everything = feed(Echo(grid, EchoConstants(doubtful=1000)), run)
    met = np.unique([grid.offsets[a.position] + e for a in run for e in a.experts])
    as_asked, anew = few.rank(met), everything.rank(met)
    renewed = as_asked == anew
    assert 4 <= renewed.sum() < len(met)
    assert set(choose_victims(few, met, 2)) <= set(met[renewed])


def test_echo_learns_a_cycle_that_defeats_lru() -> None:
    """Four kinds of pass in turn, room for half: LRU always misses, the echo foresees."""
    grid = ExpertGrid(layers=(0, 1), experts=(16, 16))
    run: list[Access] = []
    for step in range(120):
        kind = step % 4
        chosen = np.arange(4 * kind, 4 * kind + 4)
        run += [
            Access(position=position, experts=chosen, tokens=np.ones(4, np.int64))
            for position in range(2)
        ]
    lru = simulate(make_policy("lru", grid), grid, run, 16)
    echo = simulate(make_policy("echo", grid), grid, run, 16)
    assert lru.hits == 0
    assert echo.hit_rate > 0.3


def test_echo_values_the_coming_layer_above_the_one_just_passed() -> None:
    """All layers used alike: what comes first is worth most, the layer just passed least."""
    grid = ExpertGrid(layers=(0, 1, 2, 3), experts=(2, 2, 2, 2))
    policy = make_policy("echo", grid)
    for _ in range(10):
        for position in range(4):
            policy.observe(position, np.array([0]), np.array([1]))
    policy.observe(0, np.array([0]), np.array([1]))
    policy.observe(1, np.array([0]), np.array([1]))
    values = policy.rank(np.array([grid.offsets[position] for position in (2, 3, 0, 1)]))
    assert (np.diff(values) < 0).all()


def test_echo_forgets_the_oldest_passes_and_goes_on() -> None:
    constants = EchoConstants(history=12)
    run = random_run(300, seed=3)
    policy = Echo(GRID, constants)
    feed(policy, run)
    assert np.isfinite(policy.rank(np.arange(GRID.size))).all()
    # Once the history is full, what lies further back than it reaches has no part in the echo:
    # only the counts remember it, and they fade.
    other = Echo(GRID, constants)
    feed(other, random_run(300, seed=4)[: 3 * 228] + run[3 * 228 :])
    assert policy.rank(np.arange(GRID.size)) == pytest.approx(
        other.rank(np.arange(GRID.size)), abs=0.25
    )


def test_echo_takes_long_prompts_single_layers_and_skipped_layers() -> None:
    grid = ExpertGrid(layers=(5,), experts=(4,))
    policy = Echo(grid)
    policy.observe(0, np.arange(4), np.array([1, 3000, 2, 1]))
    policy.observe(0, np.array([1]), np.array([1]))
    assert int(policy.rank(np.arange(4)).argmax()) == 1
    gaps = [access for at, access in enumerate(random_run(30)) if at % 5]
    assert np.isfinite(feed(Echo(GRID), gaps).rank(np.arange(GRID.size))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fade": 1.5}, "fade has to lie in 0..1, found 1.5"),
        ({"sharpness": -1.0}, "cannot be negative"),
        ({"history": 2}, "history 8 or more"),
    ],
)
def test_echo_refuses_constants_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EchoConstants(**options)
