"""`ExpertCache`: which expert lies in which slot of the fast tier.

Residency, pins and counters only: it moves no bytes, and which expert leaves is the policy's
choice. Every mutation happens under the executor's lock.

An expert is absent, *loading* (it owns a slot whose bytes are not there yet) or *resident*. Only
residents without a pin are evicted. A *permanent* resident is never evicted and no candidate of the
policy; there has to be one slot that none of them owns, unless they are all experts of its pool.
One step of one layer goes:

    hits, late, misses = cache.request(access)   # pins the hits
    granted = cache.grant(position, misses)      # slots, evicting; now loading
    cache.commit(...) for each that has arrived  # now resident and pinned, the late ones too
    cache.release(...) once they are computed    # evictable again

An expert loaded *ahead* of its need goes through `load_ahead` and `settle_ahead` (or `drop_ahead`)
between and during the steps of other layers. A step that needs it while it is loading finds it
*late*: not a hit, and not another read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_runtime.access import Access
from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.eviction import EvictionPolicy, choose_victims

__all__ = ["CacheCounters", "ExpertCache"]

_ABSENT = -1


@dataclass
class CacheCounters:
    """Events since the last reset, by layer position.

    `permanent_hits` are those of `hits` that permanent residents served. `late` are those of
    `misses` that were already on their way. Of the loads ahead of need, `ahead` in all, `in_time`
    became hits at their first use, `late` had to be waited for, `unused` left without a use,
    `withdrawn` were called off; the rest is still there. `ahead_evictions` made room for them.
    """

    hits: IntArray
    misses: IntArray
    permanent_hits: IntArray
    late: IntArray
    ahead: IntArray
    in_time: IntArray
    unused: IntArray
    withdrawn: IntArray
    ahead_evictions: int = 0
    evictions: int = 0
    rereads: int = 0
    seen: set[int] = field(default_factory=set)

    @classmethod
    def empty(cls, layers: int) -> CacheCounters:
        """All zero."""
        return cls(*np.zeros((8, layers), np.int64))


class ExpertCache:
    """Residency of the experts of a grid in pools of slots.

    Args:
        grid: all experts.
        group_of: pool number of each layer position (layers with experts of one shape share one).
        slots: slots of each pool.
        policy: ranks the residents when a slot is wanted.
    """

    def __init__(
        self,
        grid: ExpertGrid,
        group_of: Sequence[int],
        slots: Sequence[int],
        policy: EvictionPolicy,
    ) -> None:
        self.grid = grid
        self.policy = policy
        self.slots = tuple(slots)
        self._group_of = tuple(group_of)
        self._offsets = grid.offsets
        # Python lists where single elements are looked up (faster), arrays where many are.
        self._slot_of = [_ABSENT] * grid.size
        self._owner = [np.full(count, _ABSENT, np.int64) for count in slots]
        self._pinned = [np.zeros(count, np.bool_) for count in slots]
        self._free = [list(range(count))[::-1] for count in slots]
        self._loading: dict[int, None] = {}
        self._pins: dict[int, None] = {}
        # Loaded ahead and not used yet: on their way, and arrived.
        self._ahead: dict[int, None] = {}
        self._unused: dict[int, None] = {}
        # Expected to be needed soon: what else there is leaves first. Empty while nobody predicts.
        self._expected = np.zeros(grid.size, np.bool_)
        self._expecting = False
        # Permanent residents: by slot for the choice of victims, by expert number for counting.
        self._permanent = [np.zeros(count, np.bool_) for count in slots]
        self._permanent_of: list[dict[int, int]] = [{} for _ in grid.layers]  # how many times
        self.counters = CacheCounters.empty(len(grid.layers))
        self._tables: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}

    # -- queries: never mutate ------------------------------------------------------------------

    def slot(self, position: int, expert: int) -> int:
        """Slot of a loading or resident expert, -1 if absent."""
        return self._slot_of[self._offsets[position] + expert]

    def slots_of(self, position: int, experts: Sequence[int]) -> list[int]:
        """Slots of experts that are loading or resident."""
        offset = self._offsets[position]
        return [self._slot_of[offset + expert] for expert in experts]

    def is_resident(self, position: int, expert: int) -> bool:
        """Whether the expert's bytes are in its slot."""
        index = self._offsets[position] + expert
        return self._slot_of[index] != _ABSENT and index not in self._loading

    def residents(self) -> IntArray:
        """Dense indices of all residents, ascending."""
        owners = np.concatenate([owner[owner >= 0] for owner in self._owner])
        return np.sort(owners[~np.isin(owners, list(self._loading))])

    def permanent(self, position: int) -> frozenset[int]:
        """Experts of a layer that are never evicted."""
        return frozenset(self._permanent_of[position])

    def group(self, position: int) -> int:
        """Pool number of a layer position."""
        return self._group_of[position]

    def all_resident(self, position: int) -> bool:
        """Whether the whole layer is resident."""
        first = self._offsets[position]
        span = range(first, first + self.grid.experts[position])
        return all(self._slot_of[i] != _ABSENT and i not in self._loading for i in span)

    def free_slots(self, position: int) -> int:
        """Slots of the layer's pool that hold nothing."""
        return len(self._free[self._group_of[position]])

    def would_stay(self, position: int, expert: int) -> bool:
        """Whether an absent expert, given a slot now, would not be the first to leave it."""
        group, index = self._group_of[position], self._offsets[position] + expert
        if self._free[group]:
            return True
        candidates = np.append(self._candidates(group), index)
        return int(choose_victims(self.policy, candidates, 1)[0]) != index

    def resident_slots(self, position: int) -> tuple[int, ...]:
        """The slot of each of a layer's experts, -1 where its bytes are not there."""
        first = self._offsets[position]
        slots = self._slot_of[first : first + self.grid.experts[position]]
        for index in self._loading:
            if first <= index < first + len(slots):
                slots[index - first] = _ABSENT
        return tuple(slots)

    def slot_table(
        self, position: int, upload: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """int64 `[experts]`: `resident_slots`, on the device where `upload` puts it."""
        slots = self.resident_slots(position)
        known = self._tables.get(position)
        if known is None or known[0] != slots:
            known = (slots, upload(torch.tensor(slots)))
            self._tables[position] = known
        return known[1]

    def loading_ahead(self, position: int) -> list[int]:
        """Experts of a layer that are on their way ahead of need, in the order of their asking."""
        first = self._offsets[position]
        last = first + self.grid.experts[position]
        return [index - first for index in self._ahead if first <= index < last]

    def expected(self) -> IntArray:
        """Dense indices of the experts that are expected to be needed soon, ascending."""
        return np.flatnonzero(self._expected)

    # -- mutators: never decide -----------------------------------------------------------------

    def request(self, access: Access) -> tuple[list[int], list[int], list[int]]:
        """Take in one layer step: tell the policy, count, pin the hits.

        Late experts are no longer ahead: they arrive through `commit` like granted misses.

        Returns:
            (hits, late, misses), expert numbers, each ascending.
        """
        position = access.position
        self.policy.observe(position, access.experts, access.tokens)
        offset = self._offsets[position]
        hits, late, misses, slots = [], [], [], []
        for expert in access.experts.tolist():
            index = offset + expert
            slot = self._slot_of[index]
            if slot == _ABSENT:
                misses.append(expert)
            elif index in self._loading:
                late.append(expert)
                del self._ahead[index]
            else:
                hits.append(expert)
                slots.append(slot)
                self._pins[index] = None
        self._pinned[self._group_of[position]][slots] = True
        self.counters.hits[position] += len(hits)
        self.counters.misses[position] += len(misses) + len(late)
        self.counters.late[position] += len(late)
        self._count_used(position, hits)
        return hits, late, misses

    def take_hits(self, access: Access, experts: Sequence[int]) -> list[int] | None:
        """Take in a layer step whose experts are all resident, without pinning them.

        For a caller that computes them before it asks for anything else.

        Args:
            experts: the experts of `access` in any order.

        Returns:
            Their slots in that order; None, and nothing is changed, if one of them is absent.
        """
        offset = self._offsets[access.position]
        slots = [self._slot_of[offset + expert] for expert in experts]
        if min(slots) < 0 or (self._ahead and any(offset + e in self._ahead for e in experts)):
            return None
        self.policy.observe(access.position, access.experts, access.tokens)
        self.counters.hits[access.position] += len(slots)
        self._count_used(access.position, experts)
        return slots

    def grant(self, position: int, experts: Sequence[int]) -> list[int]:
        """Give slots to as many of these absent experts as can have one, in order.

        Evicts residents of the pool that are neither pinned nor permanent, lowest rank first. The
        granted experts are loading (and pinned) afterwards; the others stay absent.
        """
        group = self._group_of[position]
        free = self._free[group]
        lacking = len(experts) - len(free)
        if lacking > 0:
            self._evict(group, lacking)
        granted = list(experts[: len(free)])
        for expert in granted:
            self._give(group, self._offsets[position] + expert)
        return granted

    def load_ahead(self, position: int, expert: int) -> bool:
        """Give an absent expert a slot before it is needed; False, and nothing changed, if none.

        Takes a free slot, or evicts the resident of lowest rank that is neither pinned, permanent
        nor expected. The expert is loading afterwards.
        """
        index, group = self._offsets[position] + expert, self._group_of[position]
        assert self._slot_of[index] == _ABSENT, "it has a slot already"
        if not self._free[group]:
            candidates = self._candidates(group)
            if self._expecting:
                candidates = candidates[~self._expected[candidates]]
            if not len(candidates):
                return False
            self._leave(group, choose_victims(self.policy, candidates, 1))
            self.counters.ahead_evictions += 1
        self._give(group, index)
        self._ahead[index] = None
        self.counters.ahead[position] += 1
        return True

    def settle_ahead(self, position: int, expert: int) -> None:
        """The bytes of an expert that is loading ahead have arrived: it is resident."""
        index = self._offsets[position] + expert
        del self._ahead[index]
        del self._loading[index]
        self._pinned[self._group_of[position]][self._slot_of[index]] = False
        self._unused[index] = None
        self._arrived(index)

    def drop_ahead(self, position: int, expert: int) -> None:
        """An expert that is loading ahead does not come: it is absent, its slot free."""
        index, group = self._offsets[position] + expert, self._group_of[position]
        del self._ahead[index]
        del self._loading[index]
        slot = self._slot_of[index]
        self._slot_of[index] = _ABSENT
        self._owner[group][slot] = _ABSENT
        self._pinned[group][slot] = False
        self._free[group].append(slot)
        self.counters.withdrawn[position] += 1

    def expect(self, position: int, experts: Sequence[int]) -> None:
        """These experts of a layer, and no others of it, are expected to be needed soon.

        While there are others to evict, they stay. An expectation is no pin.
        """
        first = self._offsets[position]
        self._expected[first : first + self.grid.experts[position]] = False
        self._expected[[first + expert for expert in experts]] = True
        self._expecting = self._expecting or len(experts) > 0

    def expect_nothing(self) -> None:
        """Forget all expectations."""
        if self._expecting:
            self._expected[:] = False
            self._expecting = False

    def adopt_all(self) -> None:
        """Slots are the experts' own memory: expert `i` of a layer lies in slot `i` of its pool."""
        for position, count in enumerate(self.grid.experts):
            first = self._offsets[position]
            group = self._group_of[position]
            assert self.slots[group] == count, "one slot for each expert of the layer"
            self._owner[group][:] = np.arange(first, first + count)
            self._slot_of[first : first + count] = range(count)
            self._free[group].clear()
            self.counters.seen.update(range(first, first + count))

    def commit(self, position: int, expert: int) -> None:
        """The bytes of a loading expert have arrived: it is resident, and pinned."""
        index = self._offsets[position] + expert
        del self._loading[index]
        self._pins[index] = None
        self._arrived(index)

    def pin(self, position: int, expert: int) -> None:
        """A resident expert is needed: it is not evicted until released."""
        index = self._offsets[position] + expert
        self._pins[index] = None
        self._pinned[self._group_of[position]][self._slot_of[index]] = True

    def release(self, position: int, experts: Sequence[int]) -> None:
        """These experts have been computed: they may be evicted."""
        offset = self._offsets[position]
        slots = []
        for expert in experts:
            self._pins.pop(offset + expert, None)
            slots.append(self._slot_of[offset + expert])
        self._pinned[self._group_of[position]][slots] = False

    def abandon(self) -> None:
        """After a failed step: whatever was loading is absent, nothing is pinned.

        Works from the state as it is, wherever the step was interrupted.
        """
        for group, owner in enumerate(self._owner):
            for slot in range(len(owner)):
                index = int(owner[slot])
                if index != _ABSENT and (index in self._loading or self._slot_of[index] != slot):
                    owner[slot] = _ABSENT
                    if self._slot_of[index] == slot:
                        self._slot_of[index] = _ABSENT
            self._pinned[group][:] = False
            self._free[group] = [slot for slot in range(len(owner)) if owner[slot] == _ABSENT][::-1]
        for index, slot in enumerate(self._slot_of):
            position = self._position(index)
            if slot != _ABSENT and self._owner[self._group_of[position]][slot] != index:
                self._slot_of[index] = _ABSENT
        for index in self._ahead:
            self.counters.withdrawn[self._position(index)] += 1
        for held in (self._loading, self._pins, self._ahead):
            held.clear()
        self.expect_nothing()
        self._unused = {i: None for i in self._unused if self._slot_of[i] != _ABSENT}

    def make_permanent(self, position: int, experts: Sequence[int]) -> None:
        """These residents stay: they are never evicted, not after a failed step either.

        For good, or until `end_permanent` has been called for each time that this was.
        """
        slots = self.slots_of(position, experts)
        assert all(self.is_resident(position, expert) for expert in experts), "not resident"
        self._permanent[self._group_of[position]][slots] = True
        for expert in experts:
            self._permanent_of[position][expert] = self._permanent_of[position].get(expert, 0) + 1

    def end_permanent(self, position: int, experts: Sequence[int]) -> None:
        """Undo one `make_permanent` of each of these experts."""
        times, flags = self._permanent_of[position], self._permanent[self._group_of[position]]
        for expert in experts:
            times[expert] -= 1
            if not times[expert]:
                del times[expert]
                flags[self.slot(position, expert)] = False

    def reset_counters(self) -> None:
        """Start counting anew; residency stays."""
        seen = self.counters.seen
        self.counters = CacheCounters.empty(len(self.grid.layers))
        self.counters.seen = seen
        for index in [*self._ahead, *self._unused]:  # their end will be counted, so their begin is
            self.counters.ahead[self._position(index)] += 1

    def _count_used(self, position: int, hits: Sequence[int]) -> None:
        permanent = self._permanent_of[position]
        if permanent:
            self.counters.permanent_hits[position] += sum(expert in permanent for expert in hits)
        if self._unused:
            offset = self._offsets[position]
            for expert in hits:
                if offset + expert in self._unused:
                    del self._unused[offset + expert]
                    self.counters.in_time[position] += 1

    def _arrived(self, index: int) -> None:
        if index in self.counters.seen:
            self.counters.rereads += 1
        else:
            self.counters.seen.add(index)

    def _give(self, group: int, index: int) -> None:
        slot = self._free[group].pop()
        self._owner[group][slot] = index
        self._pinned[group][slot] = True
        self._loading[index] = None
        self._slot_of[index] = slot

    def _candidates(self, group: int) -> IntArray:
        owner = self._owner[group]
        return owner[(owner >= 0) & ~(self._pinned[group] | self._permanent[group])]

    def _evict(self, group: int, count: int) -> None:
        candidates = self._candidates(group)
        count = min(count, len(candidates))
        if not count:
            return
        if self._expecting:
            # What is expected leaves only when there is nothing else, and by rank even then.
            flags = self._expected[candidates]
            others = candidates[~flags]
            first = choose_victims(self.policy, others, min(count, len(others)))
            self._leave(group, first)
            candidates, count = candidates[flags], count - len(first)
        self._leave(group, choose_victims(self.policy, candidates, count))

    def _leave(self, group: int, victims: IntArray) -> None:
        for victim in victims.tolist():
            slot = self._slot_of[victim]
            self._slot_of[victim] = _ABSENT
            self._owner[group][slot] = _ABSENT
            self._free[group].append(slot)
            if victim in self._unused:
                del self._unused[victim]
                self.counters.unused[self._position(victim)] += 1
        self.counters.evictions += len(victims)

    def _position(self, index: int) -> int:
        position = len(self._offsets) - 1
        while self._offsets[position] > index:
            position -= 1
        return position

    # -- integrity ------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert every invariant of the bookkeeping; for tests and after faults."""
        for group, owner in enumerate(self._owner):
            free = self._free[group]
            assert len(set(free)) == len(free), "a slot is free twice"
            assert all(owner[slot] == _ABSENT for slot in free), "a free slot has an owner"
            held = [int(index) for index in owner if index != _ABSENT]
            assert len(held) + len(free) == self.slots[group], "a slot is lost"
            assert len(set(held)) == len(held), "an expert has two slots"
            for slot, index in enumerate(owner.tolist()):
                if index != _ABSENT:
                    assert self._slot_of[index] == slot, "owner and slot disagree"
                    assert self._group_of[self._position(index)] == group, "wrong pool"
                    wanted = index in self._loading or index in self._pins
                    assert bool(self._pinned[group][slot]) == wanted, "pin flags disagree"
                else:
                    assert not self._pinned[group][slot], "an empty slot is pinned"
        for position, permanent in enumerate(self._permanent_of):
            slots = self.slots_of(position, sorted(permanent))
            flags = self._permanent[self._group_of[position]]
            assert all(self.is_resident(position, e) for e in permanent), "a permanent one is gone"
            assert flags[slots].all(), "flags of permanent residents disagree"
        for group, flags in enumerate(self._permanent):
            known = sum(
                len(self._permanent_of[position])
                for position, its_group in enumerate(self._group_of)
                if its_group == group
            )
            assert int(flags.sum()) == known, "flags of permanent residents disagree"
        owned = {int(i) for owner in self._owner for i in owner if i != _ABSENT}
        placed = {i for i, slot in enumerate(self._slot_of) if slot != _ABSENT}
        assert owned == placed, "slots and owners differ"
        assert set(self._loading) <= placed, "a loading expert has no slot"
        assert set(self._pins) <= placed, "a pinned expert has no slot"
        assert set(self._ahead) <= set(self._loading), "what loads ahead is not loading"
        assert set(self._unused) <= placed - set(self._loading), "an unused one is not resident"
        assert not set(self._loading) & set(self._pins), "loading and pinned at once"
