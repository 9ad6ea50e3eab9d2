"""The simulator against brute force: exhaustive search, a reference LRU, and the counts' laws."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.eviction import Belady, EvictionPolicy, LeastRecentlyUsed, make_policy
from moe_runtime.simulate import simulate

Run = tuple[ExpertGrid, list[Access]]

POLICIES: dict[str, Callable[[ExpertGrid, Sequence[Access]], EvictionPolicy]] = {
    "lru": lambda grid, run: make_policy("lru", grid),
    "lfu": lambda grid, run: make_policy("lfu", grid),
    "static": lambda grid, run: make_policy("static", grid, counts=np.arange(grid.size)),
    "echo": lambda grid, run: make_policy("echo", grid),
    "belady": lambda grid, run: make_policy("belady", grid, accesses=run),
}


@st.composite
def runs(draw: st.DrawFn, *, most_experts: int = 6, most_steps: int = 40, wide: int = 3) -> Run:
    """A grid of up to three layers of unequal sizes, and passes through it; some skip a layer."""
    experts = draw(st.lists(st.integers(1, most_experts), min_size=1, max_size=3))
    grid = ExpertGrid(layers=tuple(range(1, 2 * len(experts), 2)), experts=tuple(experts))
    accesses = []
    steps = draw(st.integers(0, most_steps))
    for step in range(steps):
        position = step % len(experts)
        if draw(st.integers(0, 9)) == 0:
            continue
        count = experts[position]
        chosen = draw(
            st.lists(st.integers(0, count - 1), min_size=1, max_size=min(wide, count), unique=True)
        )
        tokens = draw(st.lists(st.integers(1, 4), min_size=len(chosen), max_size=len(chosen)))
        accesses.append(
            Access(
                position=position,
                experts=np.array(sorted(chosen), dtype=np.int64),
                tokens=np.array(tokens, dtype=np.int64),
            )
        )
    return grid, accesses


def dense_sets(grid: ExpertGrid, accesses: Sequence[Access]) -> list[frozenset[int]]:
    return [frozenset((grid.offsets[a.position] + a.experts).tolist()) for a in accesses]


def fewest_misses(needs: Sequence[frozenset[int]], slots: int) -> int:
    """Exhaustive search over every choice of victims; each step must fit into the slots."""
    states = {frozenset[int](): 0}
    for need in needs:
        following: dict[frozenset[int], int] = {}
        for resident, misses in states.items():
            missing = need - resident
            surplus = max(len(resident) + len(missing) - slots, 0)
            for victims in combinations(sorted(resident - need), surplus):
                after = (resident - frozenset(victims)) | need
                cost = misses + len(missing)
                following[after] = min(cost, following.get(after, cost))
        states = following
    return min(states.values())


def reference_lru(needs: Sequence[frozenset[int]], slots: int) -> tuple[int, int]:
    """Hits and misses of LRU with a dictionary; within a step, ascending use."""
    pool: OrderedDict[int, None] = OrderedDict()
    hits = misses = 0
    for need in needs:
        missing = sorted(need - pool.keys())
        hits += len(need) - len(missing)
        misses += len(missing)
        for expert in sorted(need & pool.keys()):
            pool.move_to_end(expert)
        while len(pool) + len(missing) > slots:
            pool.popitem(last=False)
        for expert in sorted(need):
            pool[expert] = None
            pool.move_to_end(expert)
    return hits, misses


def widest(accesses: Sequence[Access]) -> int:
    return max((len(access.experts) for access in accesses), default=1)


@given(runs(most_experts=3, most_steps=9, wide=2), st.integers(0, 3))
def test_belady_is_as_good_as_exhaustive_search(run: Run, spare: int) -> None:
    grid, accesses = run
    slots = widest(accesses) + spare
    found = simulate(Belady(grid, accesses), grid, accesses, slots)
    assert found.misses == fewest_misses(dense_sets(grid, accesses), slots)


@given(runs(), st.integers(0, 10))
def test_no_policy_has_fewer_misses_than_belady(run: Run, spare: int) -> None:
    grid, accesses = run
    slots = widest(accesses) + spare
    least = simulate(Belady(grid, accesses), grid, accesses, slots).misses
    for make in POLICIES.values():
        assert simulate(make(grid, accesses), grid, accesses, slots).misses >= least


@given(runs(), st.integers(0, 10))
def test_lru_equals_the_reference_dictionary(run: Run, spare: int) -> None:
    grid, accesses = run
    slots = widest(accesses) + spare
    found = simulate(LeastRecentlyUsed(grid), grid, accesses, slots)
    assert (found.hits, found.misses) == reference_lru(dense_sets(grid, accesses), slots)


@pytest.mark.parametrize("name", POLICIES)
@given(run=runs(), slots=st.integers(1, 20))
def test_the_counts_agree_with_each_other(name: str, run: Run, slots: int) -> None:
    grid, accesses = run
    needs = dense_sets(grid, accesses)
    found = simulate(POLICIES[name](grid, accesses), grid, accesses, slots)
    assert found.requests == sum(map(len, needs))
    assert found.hits == sum(found.hits_by_position)
    assert found.misses == sum(found.misses_by_position)
    assert found.first_uses == len(frozenset().union(*needs)) <= found.misses
    assert found.misses - found.evictions == min(slots, found.first_uses)
    assert found.steps == len(accesses)
    again = simulate(POLICIES[name](grid, accesses), grid, accesses, slots)
    assert again == found


@pytest.mark.parametrize("name", ["lru", "belady"])
@given(run=runs(), spare=st.integers(0, 10))
def test_more_slots_never_add_misses(name: str, run: Run, spare: int) -> None:
    """Inclusion: LRU and Belady rank without regard to the size of the pool."""
    grid, accesses = run
    slots = widest(accesses) + spare
    few = simulate(POLICIES[name](grid, accesses), grid, accesses, slots)
    more = simulate(POLICIES[name](grid, accesses), grid, accesses, slots + 1)
    assert more.misses <= few.misses


class _Watching:
    """A random policy that checks what it is offered against a pool of its own."""

    name: ClassVar[str] = "watching"

    def __init__(self, grid: ExpertGrid, slots: int) -> None:
        self._grid = grid
        self._slots = slots
        self._needed: frozenset[int] = frozenset()
        self._random = np.random.default_rng(0)
        self.asked = 0

    def observe(self, position: int, experts: IntArray, tokens: IntArray) -> None:
        self._needed = frozenset((self._grid.offsets[position] + experts).tolist())

    def rank(self, candidates: IntArray) -> FloatArray:
        self.asked += 1
        assert len(set(candidates.tolist())) == len(candidates) <= self._slots
        if len(self._needed) <= self._slots:
            assert not self._needed & set(candidates.tolist())
        return self._random.random(len(candidates))


@given(runs(), st.integers(1, 12))
def test_nothing_that_the_step_needs_is_offered_for_eviction(run: Run, slots: int) -> None:
    grid, accesses = run
    policy = _Watching(grid, slots)
    found = simulate(policy, grid, accesses, slots)
    assert (policy.asked > 0) == (found.evictions > 0)


def access(position: int, *experts: int) -> Access:
    chosen = np.array(experts, dtype=np.int64)
    return Access(position=position, experts=chosen, tokens=np.ones_like(chosen))


def test_a_step_wider_than_the_pool_runs_in_waves() -> None:
    grid = ExpertGrid(layers=(0,), experts=(8,))
    run = [access(0, 0, 1), access(0, 0, 1, 2, 3, 4, 5, 6)]
    found = simulate(LeastRecentlyUsed(grid), grid, run, 3)
    # 0 and 1 are hits and stay for the wave of 2; then 3, 4, 5 and at last 6.
    assert (found.hits, found.misses, found.waves) == (2, 7, 1 + 3)
    assert found.evictions == 7 - 3


def test_hits_that_fill_the_pool_are_computed_before_the_rest_is_loaded() -> None:
    grid = ExpertGrid(layers=(0,), experts=(8,))
    run = [access(0, 4, 5), access(0, 0, 4, 5)]
    found = simulate(LeastRecentlyUsed(grid), grid, run, 2)
    assert (found.hits, found.misses, found.evictions, found.waves) == (2, 3, 1, 2)


def test_slots_move_between_layers() -> None:
    grid = ExpertGrid(layers=(0, 1), experts=(4, 4))
    run = [access(0, 0), access(1, 0, 1, 2)] + [access(1, 0, 1, 2), access(0, 0)] * 3
    assert simulate(LeastRecentlyUsed(grid), grid, run, 4).misses == 4


def test_bytes_are_counted_by_layer() -> None:
    grid = ExpertGrid(layers=(0, 1), experts=(2, 2))
    run = [access(0, 0, 1), access(1, 1)]
    found = simulate(LeastRecentlyUsed(grid), grid, run, 4, expert_bytes=(10, 1000))
    assert found.bytes_read == 1020
    assert simulate(LeastRecentlyUsed(grid), grid, run, 4).bytes_read is None
    with pytest.raises(ConfigError, match="each of the 2 layers, found 1"):
        simulate(LeastRecentlyUsed(grid), grid, run, 4, expert_bytes=(10,))


def test_a_pool_without_slots_is_refused() -> None:
    grid = ExpertGrid(layers=(0,), experts=(2,))
    with pytest.raises(BudgetError, match="found 0"):
        simulate(LeastRecentlyUsed(grid), grid, [], 0)


def test_an_empty_run_has_no_hits() -> None:
    grid = ExpertGrid(layers=(0,), experts=(2,))
    found = simulate(LeastRecentlyUsed(grid), grid, [], 1)
    assert (found.requests, found.hit_rate) == (0, 0.0)


def dense(*indices: int) -> IntArray:
    return np.array(indices, dtype=np.int64)


def test_pinned_experts_never_miss_and_the_others_share_the_rest() -> None:
    grid = ExpertGrid(layers=(0,), experts=(6,))
    run = [access(0, 0), access(0, 1), access(0, 2), access(0, 0, 1)]
    free = simulate(LeastRecentlyUsed(grid), grid, run, 2)
    kept = simulate(LeastRecentlyUsed(grid), grid, run, 2, pinned=dense(0))
    assert (free.hits, free.misses) == (1, 4)
    assert (kept.hits, kept.misses, kept.pinned_hits) == (2, 3, 2)
    assert kept.first_uses == 2
    assert kept.slots == 2


@given(runs(), st.integers(1, 12))
def test_pinning_nothing_changes_nothing(run: Run, slots: int) -> None:
    grid, accesses = run
    plain = simulate(LeastRecentlyUsed(grid), grid, accesses, slots)
    assert simulate(LeastRecentlyUsed(grid), grid, accesses, slots, pinned=dense()) == plain


@given(runs(), st.data())
def test_pinning_is_a_smaller_pool_for_fewer_experts(run: Run, data: st.DataObject) -> None:
    """The rest of the run, without the pinned experts, in what slots are left."""
    grid, accesses = run
    pinned = np.array(sorted(data.draw(st.sets(st.integers(0, grid.size - 1)))), np.int64)
    spare = data.draw(st.integers(1, 8))
    rest = []
    for step in accesses:
        kept = ~np.isin(grid.offsets[step.position] + step.experts, pinned)
        rest.append(replace(step, experts=step.experts[kept], tokens=step.tokens[kept]))
    found = simulate(LeastRecentlyUsed(grid), grid, accesses, len(pinned) + spare, pinned=pinned)
    alone = simulate(LeastRecentlyUsed(grid), grid, rest, spare)
    assert (found.misses, found.evictions) == (alone.misses, alone.evictions)
    assert found.hits == alone.hits + found.pinned_hits


@pytest.mark.parametrize(
    ("slots", "pinned", "error", "message"),
    [
        (2, (0, 1), BudgetError, "found 2 slots and 2 pinned"),
        (1, (0, 1), BudgetError, "found 1 slots and 2 pinned"),
        (3, (0, 6), ConfigError, "dense indices 0 to 5, found 0 to 6"),
        (3, (-1, 2), ConfigError, "found -1 to 2"),
    ],
)
def test_what_cannot_be_pinned_is_said(
    slots: int, pinned: tuple[int, ...], error: type[Exception], message: str
) -> None:
    grid = ExpertGrid(layers=(0,), experts=(6,))
    with pytest.raises(error, match=message):
        simulate(LeastRecentlyUsed(grid), grid, [access(0, 1)], slots, pinned=dense(*pinned))


def test_all_experts_may_be_pinned() -> None:
    grid = ExpertGrid(layers=(0,), experts=(3,))
    found = simulate(LeastRecentlyUsed(grid), grid, [access(0, 0, 2)], 3, pinned=dense(0, 1, 2))
    assert (found.hits, found.misses, found.pinned_hits) == (2, 0, 2)
