"""The cache's bookkeeping under arbitrary legal use, against a model that a reader can check.

Knows no tensors and no executor: the operations are the four verbs of a layer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_runtime.access import Access
from moe_runtime.cache import ExpertCache
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError
from moe_runtime.eviction import POLICY_NAMES, EvictionPolicy, make_policy
from moe_runtime.simulate import simulate

# Three layers share a pool, one has its own: experts of another shape.
GRID = ExpertGrid(layers=(0, 1, 3, 4), experts=(6, 6, 5, 6))
GROUP_OF = (0, 0, 1, 0)

# Policies that need to know something beforehand.
OPTIONS: dict[str, Callable[[ExpertGrid], dict[str, Any]]] = {
    "static": lambda grid: {"counts": np.arange(grid.size) * 7 % 5},
}


def fresh_policy(name: str, grid: ExpertGrid) -> EvictionPolicy:
    """A policy by name, over any run: all but Belady, which only knows one run."""
    return make_policy(name, grid, **OPTIONS.get(name, lambda _: {})(grid))


ONLINE = [name for name in POLICY_NAMES if name != "belady"]


def access(position: int, experts: Sequence[int], tokens: int = 1) -> Access:
    ascending = np.array(sorted(set(experts)), np.int64)
    return Access(
        position=position, experts=ascending, tokens=np.full(len(ascending), tokens, np.int64)
    )


class CacheMachine(RuleBasedStateMachine):
    """Layer steps in every legal order and partial order, abandoned at any moment.

    The model: `slots` says who lies in which slot, `loading` and `pinned` are sets. Which resident
    leaves is the policy's choice, so the model takes it over and checks that it was a legal one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache: ExpertCache

    @initialize(
        policy=st.sampled_from(ONLINE),
        slots=st.tuples(st.integers(1, 12), st.integers(1, 5)),
    )
    def start(self, policy: str, slots: tuple[int, int]) -> None:
        self.cache = ExpertCache(GRID, GROUP_OF, slots, fresh_policy(policy, GRID))
        self.slots = slots
        self.placed: dict[tuple[int, int], int] = {}  # (position, expert) -> slot
        self.loading: set[tuple[int, int]] = set()  # needed by the step under way
        self.ahead: set[tuple[int, int]] = set()  # loading before they are needed
        self.unused: set[tuple[int, int]] = set()  # loaded so, and not used yet
        self.expected: set[tuple[int, int]] = set()
        self.fates = dict.fromkeys(("ahead", "in_time", "late", "unused", "withdrawn"), 0)
        self.pinned: set[tuple[int, int]] = set()
        self.position = -1  # of the layer step under way
        self.absent: list[int] = []
        self.permanent: set[tuple[int, int]] = set()
        self.hits = [0] * len(GROUP_OF)
        self.misses = [0] * len(GROUP_OF)
        self.permanent_hits = [0] * len(GROUP_OF)
        self.evictions = self.rereads = 0
        self.seen: set[tuple[int, int]] = set()

    # -- the verbs ------------------------------------------------------------------------------

    @precondition(lambda self: self.position < 0)
    @rule(position=st.integers(0, 3), chosen=st.sets(st.integers(0, 4)), tokens=st.integers(1, 40))
    def request(self, position: int, chosen: set[int], tokens: int) -> None:
        hits, late, misses = self.cache.request(access(position, list(chosen), tokens))
        coming = {expert for at, expert in self.ahead if at == position} & chosen
        held = {expert for expert in chosen if (position, expert) in self.placed} - coming
        assert hits == sorted(held)
        assert late == sorted(coming)
        assert misses == sorted(chosen - held - coming)
        self.position, self.absent = position, misses
        self.pinned |= {(position, expert) for expert in hits}
        self.loading |= {(position, expert) for expert in late}
        self.ahead -= self.loading
        first = {(position, expert) for expert in hits} & self.unused
        self.unused -= first
        self.fates["in_time"] += len(first)
        self.fates["late"] += len(late)
        self.hits[position] += len(hits)
        self.misses[position] += len(misses) + len(late)
        self.permanent_hits[position] += sum((position, e) in self.permanent for e in hits)

    @precondition(lambda self: self.absent)
    @rule(count=st.integers(1, 5))
    def grant(self, count: int) -> None:
        asked = self.absent[:count]
        group = GROUP_OF[self.position]
        free = self.cache.free_slots(self.position)
        assert free == self.slots[group] - self._held(group)
        before = dict(self.placed)
        granted = self.cache.grant(self.position, asked)
        evictable = self._evictable(group)
        assert granted == asked[: min(len(asked), free + len(evictable))]
        gone = {key for key in before if self.cache.slot(*key) < 0}
        assert gone <= evictable
        assert len(gone) == max(0, len(granted) - free)
        if gone & self.expected:  # only when there was nothing else
            assert not (evictable - gone) - self.expected
        self._left(gone)
        for expert in granted:
            key = (self.position, expert)
            self.placed[key] = self.cache.slot(*key)
            self.loading.add(key)
        self.absent = self.absent[len(granted) :]

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.loading)))
        self.cache.commit(*key)
        self.loading.remove(key)
        self.pinned.add(key)
        self.rereads += key in self.seen
        self.seen.add(key)

    @rule(position=st.integers(0, 3), expert=st.integers(0, 4))
    def load_ahead(self, position: int, expert: int) -> None:
        if (position, expert) in self.placed or expert in self.absent:
            return
        free = self.cache.free_slots(position)
        evictable = self._evictable(GROUP_OF[position]) - self.expected
        before = dict(self.placed)
        assert self.cache.load_ahead(position, expert) == bool(free or evictable)
        gone = {key for key in before if self.cache.slot(*key) < 0}
        assert gone <= evictable
        assert len(gone) == (not free and bool(evictable))
        self._left(gone)
        if free or evictable:
            self.placed[position, expert] = self.cache.slot(position, expert)
            self.ahead.add((position, expert))
            self.fates["ahead"] += 1

    @precondition(lambda self: self.ahead)
    @rule(data=st.data(), arrives=st.booleans())
    def end_ahead(self, data: st.DataObject, arrives: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.ahead)))
        self.ahead.remove(key)
        if arrives:
            self.cache.settle_ahead(*key)
            self.unused.add(key)
            self.rereads += key in self.seen
            self.seen.add(key)
        else:
            self.cache.drop_ahead(*key)
            del self.placed[key]
            self.fates["withdrawn"] += 1

    @rule(position=st.integers(0, 3), experts=st.sets(st.integers(0, 4)))
    def expect(self, position: int, experts: set[int]) -> None:
        self.cache.expect(position, sorted(experts))
        self.expected = {key for key in self.expected if key[0] != position}
        self.expected |= {(position, expert) for expert in experts}

    @rule()
    def expect_nothing(self) -> None:
        self.cache.expect_nothing()
        self.expected.clear()

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.pinned)), min_size=1))
        self.cache.release(self.position, [expert for _, expert in chosen])
        self.pinned -= chosen

    @precondition(lambda self: self.position >= 0 and not self.pinned)
    @rule(data=st.data())
    def pin_again(self, data: st.DataObject) -> None:
        residents = sorted(key for key in self._residents() if key[0] == self.position)
        if residents:
            key = data.draw(st.sampled_from(residents))
            self.cache.pin(*key)
            self.pinned.add(key)

    @precondition(lambda self: len(self.permanent) < 5)
    @rule(data=st.data())
    def make_permanent(self, data: st.DataObject) -> None:
        residents = sorted(self._residents())
        if residents:
            position, expert = data.draw(st.sampled_from(residents))
            self.cache.make_permanent(position, [expert])
            self.permanent.add((position, expert))

    @precondition(lambda self: not self.absent and not self.loading and not self.pinned)
    @rule()
    def end_step(self) -> None:
        self.position = -1

    @rule()
    def abandon(self) -> None:
        self.cache.abandon()
        for key in self.loading | self.ahead:
            del self.placed[key]
        self.fates["withdrawn"] += len(self.ahead)
        for keys in (self.loading, self.ahead, self.pinned, self.expected):
            keys.clear()
        self.position, self.absent = -1, []

    @precondition(lambda self: self.position < 0)
    @rule()
    def reset_counters(self) -> None:
        self.cache.reset_counters()
        self.hits = [0] * len(GROUP_OF)
        self.misses = [0] * len(GROUP_OF)
        self.permanent_hits = [0] * len(GROUP_OF)
        self.evictions = self.rereads = 0
        self.fates = dict.fromkeys(self.fates, 0)
        self.fates["ahead"] = len(self.ahead) + len(self.unused)

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def agrees_with_the_model(self) -> None:
        cache = self.cache
        cache.check_integrity()
        for position, count in enumerate(GRID.experts):
            for expert in range(count):
                key = (position, expert)
                assert cache.slot(*key) == self.placed.get(key, -1)
                assert cache.is_resident(*key) == (key in self._residents())
            whole = all(cache.is_resident(position, expert) for expert in range(count))
            assert cache.all_resident(position) == whole
            mine = {expert for at, expert in self.ahead if at == position}
            assert set(cache.loading_ahead(position)) == mine
        resident = sorted(GRID.offsets[p] + e for p, e in self._residents())
        assert cache.residents().tolist() == resident
        assert cache.counters.hits.tolist() == self.hits
        assert cache.counters.misses.tolist() == self.misses
        assert cache.counters.permanent_hits.tolist() == self.permanent_hits
        assert self.permanent <= self._residents()
        for name, count in self.fates.items():
            assert int(getattr(cache.counters, name).sum()) == count, name
        for position in range(len(GROUP_OF)):
            mine = {expert for at, expert in self.permanent if at == position}
            assert cache.permanent(position) == mine
        assert cache.counters.evictions == self.evictions
        assert cache.counters.rereads == self.rereads

    def _residents(self) -> set[tuple[int, int]]:
        return set(self.placed) - self.loading - self.ahead

    def _left(self, gone: set[tuple[int, int]]) -> None:
        for key in gone:
            del self.placed[key]
        self.evictions += len(gone)
        self.fates["unused"] += len(gone & self.unused)
        self.unused -= gone

    def _held(self, group: int) -> int:
        return sum(GROUP_OF[position] == group for position, _ in self.placed)

    def _evictable(self, group: int) -> set[tuple[int, int]]:
        return {
            key
            for key in self.placed
            if GROUP_OF[key[0]] == group and key in self._residents() - self.pinned - self.permanent
        }


# 270 runs of up to 50 operations each: over ten thousand, each followed by every check above.
CacheMachine.TestCase.settings = settings(max_examples=270, stateful_step_count=50, deadline=None)
TestAnyOrderOfOperations = CacheMachine.TestCase


def layer_step(cache: ExpertCache, step: Access) -> None:
    """One step of one layer, as the executor runs it: hits first if some experts lack a slot."""
    position = step.position
    hits, _, waiting = cache.request(step)
    granted = cache.grant(position, waiting)
    waiting = waiting[len(granted) :]
    if waiting:
        cache.release(position, hits)
        hits = []
    while granted:
        for expert in granted:
            cache.commit(position, expert)
        if not waiting:
            break
        cache.release(position, granted)
        granted = cache.grant(position, waiting)
        waiting = waiting[len(granted) :]
    cache.release(position, hits + granted)


@st.composite
def runs(draw: st.DrawFn, grid: ExpertGrid) -> list[Access]:
    """Passes over all layers; each needs some of the layer's experts."""
    passes = draw(st.integers(1, 12))
    return [
        access(
            position,
            draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4)),
            draw(st.integers(1, 9)),
        )
        for _ in range(passes)
        for position, count in enumerate(grid.experts)
    ]


ONE_POOL = ExpertGrid(layers=(0, 1, 2), experts=(5, 7, 6))


@pytest.mark.parametrize("policy", [*ONLINE, "belady"])
@settings(max_examples=40)
@given(run=runs(ONE_POOL), slots=st.integers(1, 18))
def test_counters_equal_the_simulators(policy: str, run: list[Access], slots: int) -> None:
    def make() -> EvictionPolicy:
        if policy == "belady":
            return make_policy("belady", ONE_POOL, accesses=run)
        return fresh_policy(policy, ONE_POOL)

    cache = ExpertCache(ONE_POOL, (0, 0, 0), (slots,), make())
    for step in run:
        layer_step(cache, step)
        cache.check_integrity()
    expected = simulate(make(), ONE_POOL, run, slots)
    assert tuple(cache.counters.hits) == expected.hits_by_position
    assert tuple(cache.counters.misses) == expected.misses_by_position
    assert cache.counters.evictions == expected.evictions
    assert cache.counters.rereads == expected.misses - expected.first_uses


@settings(max_examples=60)
@given(
    run=runs(ONE_POOL),
    pinned=st.sets(st.integers(0, ONE_POOL.size - 1), max_size=ONE_POOL.size),
    spare=st.integers(1, 9),
    policy=st.sampled_from(ONLINE),
)
def test_permanent_residents_count_as_in_the_simulator(
    run: list[Access], pinned: set[int], spare: int, policy: str
) -> None:
    slots = min(len(pinned) + spare, ONE_POOL.size)
    cache = ExpertCache(ONE_POOL, (0, 0, 0), (slots,), fresh_policy(policy, ONE_POOL))
    for position, expert in (
        (ONE_POOL.position[layer], expert)
        for layer, expert in map(ONE_POOL.expert_id, sorted(pinned))
    ):
        assert cache.grant(position, [expert]) == [expert]
        cache.commit(position, expert)
        cache.release(position, [expert])
        cache.make_permanent(position, [expert])
    for step in run:
        layer_step(cache, step)
        cache.check_integrity()
        assert pinned <= set(cache.residents().tolist())
    expected = simulate(
        fresh_policy(policy, ONE_POOL), ONE_POOL, run, slots, pinned=np.array(sorted(pinned), int)
    )
    assert tuple(cache.counters.hits) == expected.hits_by_position
    assert tuple(cache.counters.misses) == expected.misses_by_position
    assert cache.counters.permanent_hits.sum() == expected.pinned_hits
    assert cache.counters.evictions == expected.evictions


def test_two_pools_count_as_two_simulations() -> None:
    generator = np.random.default_rng(4)
    run = [
        access(position, generator.choice(count, 3, replace=False).tolist())
        for _ in range(60)
        for position, count in enumerate(GRID.experts)
    ]
    cache = ExpertCache(GRID, GROUP_OF, (7, 4), fresh_policy("lru", GRID))
    for step in run:
        layer_step(cache, step)
    for group, slots in enumerate((7, 4)):
        part = [step for step in run if GROUP_OF[step.position] == group]
        expected = simulate(fresh_policy("lru", GRID), GRID, part, slots)
        for position in (p for p, g in enumerate(GROUP_OF) if g == group):
            assert cache.counters.hits[position] == expected.hits_by_position[position]
            assert cache.counters.misses[position] == expected.misses_by_position[position]


def test_slot_table_follows_the_slots() -> None:
    cache = ExpertCache(ONE_POOL, (0, 0, 0), (18,), fresh_policy("lru", ONE_POOL))
    layer_step(cache, access(1, [3, 5]))
    layer_step(cache, access(1, range(7)))
    table = cache.slot_table(1, torch.clone)
    assert table.tolist() == cache.slots_of(1, range(7))
    assert cache.slot_table(1, torch.clone) is table
    assert sorted(table.tolist()) == sorted(set(table.tolist()))


def test_adopted_slots_are_the_experts_numbers() -> None:
    cache = ExpertCache(GRID, (0, 1, 2, 3), GRID.experts, fresh_policy("lru", GRID))
    cache.adopt_all()
    cache.check_integrity()
    for position, count in enumerate(GRID.experts):
        assert cache.all_resident(position)
        assert cache.slots_of(position, range(count)) == list(range(count))
        layer_step(cache, access(position, [0, count - 1]))
    assert cache.counters.misses.sum() == cache.counters.evictions == cache.counters.rereads == 0


def test_belady_refuses_another_run() -> None:
    run = [access(0, [1]), access(1, [2])]
    cache = ExpertCache(ONE_POOL, (0, 0, 0), (2,), make_policy("belady", ONE_POOL, accesses=run))
    layer_step(cache, run[0])
    with pytest.raises(ConfigError, match="step 1"):
        cache.request(access(1, [3]))
