"""Where misses are computed: against every schedule, and by what must hold of any choice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import ConfigError
from moe_runtime.places import Busy, MissCost, Placing, choose_place

# Whole numbers of milliseconds, so that sums are exact and equal times are equal.
TIMES = st.integers(0, 20).map(float)
MISSES = st.builds(MissCost, fetch=TIMES, device=TIMES, host=TIMES)
BUSY = st.builds(Busy, link=TIMES, host=TIMES, device=TIMES)


def walked(misses: Sequence[MissCost], fetch: Sequence[int], host: Sequence[int], b: Busy) -> float:
    """Seconds of a schedule, one event after another."""
    link, device, hosts = b.link, b.device, b.host
    done = b.device
    for index in fetch:
        link += misses[index].fetch
        device = max(device, link) + misses[index].device
        done = max(done, device)
    for index in host:
        hosts += misses[index].host
        done = max(done, hosts)
    return done


def shortest(misses: Sequence[MissCost], busy: Busy) -> float:
    """The best of all assignments and all orders."""
    best = float("inf")
    for places in product([False, True], repeat=len(misses)):
        host = [i for i, hosted in enumerate(places) if hosted]
        fetched = [i for i, hosted in enumerate(places) if not hosted]
        best = min(best, *(walked(misses, order, host, busy) for order in permutations(fetched)))
    return best


def check(misses: Sequence[MissCost], busy: Busy, placing: Placing) -> None:
    assert sorted(placing.fetch + placing.host) == list(range(len(misses)))
    assert placing.seconds == pytest.approx(walked(misses, placing.fetch, placing.host, busy))
    assert placing.seconds <= min(placing.if_fetched, placing.if_hosted)


@settings(max_examples=150, deadline=None)
@given(misses=st.lists(MISSES, max_size=5), busy=BUSY)
def test_few_misses_are_placed_as_well_as_can_be(misses: list[MissCost], busy: Busy) -> None:
    placing = choose_place(misses, busy)
    check(misses, busy, placing)
    assert placing.proved
    assert placing.seconds == shortest(misses, busy)


@settings(max_examples=100, deadline=None)
@given(misses=st.lists(MISSES, min_size=1, max_size=5), busy=BUSY)
def test_the_search_for_many_is_near_the_best(misses: list[MissCost], busy: Busy) -> None:
    """The search that serves more misses, made to serve few: at most 1.25 times the best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_runtime.places._ALL_TRIED", 0)
        placing = choose_place(misses, busy)
    check(misses, busy, placing)
    assert not placing.proved
    assert placing.seconds <= 1.25 * shortest(misses, busy)


@settings(max_examples=60, deadline=None)
@given(misses=st.lists(MISSES, min_size=9, max_size=40), busy=BUSY)
def test_many_misses_are_no_worse_than_either_place_alone(
    misses: list[MissCost], busy: Busy
) -> None:
    placing = choose_place(misses, busy)
    check(misses, busy, placing)
    assert placing == choose_place(misses, busy)
    fetched = sum(miss.fetch for miss in misses)
    hosted = sum(miss.host for miss in misses)
    assert placing.if_hosted == max(busy.host + hosted, busy.device)
    assert placing.if_fetched >= busy.link + fetched


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=9, max_size=60),
    link=st.floats(0, 3e-3),
    slope=st.floats(0, 0.3),
)
def test_a_quick_choice_of_experts_of_one_size_is_near_the_thorough_one(
    rows: list[int], link: float, slope: float
) -> None:
    misses = [
        MissCost(fetch=4e-4, device=1e-5 * (1 + n // 16), host=2.5e-4 * (1 + slope * n))
        for n in rows
    ]
    busy = Busy(link=link, device=1e-4)
    quick = choose_place(misses, busy, thorough=False)
    check(misses, busy, quick)
    assert not quick.proved
    assert quick.seconds <= 1.1 * choose_place(misses, busy).seconds


def test_work_is_shared_where_both_are_as_quick() -> None:
    misses = [MissCost(fetch=2.0, device=0.0, host=2.0)] * 8
    placing = choose_place(misses)
    assert (len(placing.fetch), len(placing.host), placing.seconds) == (4, 4, 8.0)
    assert placing.if_fetched == placing.if_hosted == 16.0


def test_what_is_in_flight_decides() -> None:
    misses = [MissCost(fetch=3.0, device=1.0, host=5.0)]
    assert choose_place(misses).host == ()
    assert choose_place(misses, Busy(link=2.0)).host == (0,)
    assert choose_place(misses, Busy(link=2.0, host=3.0)).host == ()
    # Where residents keep the device busy longer than the host takes, a tie is no reason to move.
    assert choose_place(misses, Busy(device=9.0)).host == (0,)
    assert choose_place([MissCost(fetch=3.0, device=0.0, host=5.0)], Busy(device=9.0)).host == ()


def test_a_place_that_cannot_be_is_not_taken() -> None:
    forever = float("inf")
    for count in (3, 20):
        pinned = MissCost(fetch=1.0, device=1.0, host=forever)
        stuck = MissCost(fetch=forever, device=1.0, host=50.0)
        free = MissCost(fetch=2.0, device=1.0, host=2.0)
        placing = choose_place([pinned, stuck, *[free] * (count - 2)])
        assert 0 in placing.fetch
        assert 1 in placing.host
        assert placing.seconds < forever


def test_nothing_missing_takes_what_the_residents_take() -> None:
    assert choose_place([], Busy(device=3.0, link=9.0)).seconds == 3.0


@pytest.mark.parametrize("times", [(-1.0, 0.0, 0.0), (0.0, float("nan"), 0.0)])
def test_times_that_cannot_be_are_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="0 s or more"):
        MissCost(fetch=times[0], device=times[1], host=times[2])


def test_no_place_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        MissCost(fetch=float("inf"), device=0.0, host=float("inf"))
    with pytest.raises(ConfigError, match="finite"):
        Busy(link=float("inf"))
