"""The virtual link: time only goes on, what is needed goes first, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.virtual_link import LinkModel, VirtualClock, VirtualLink

SIZES = (100, 300)
RATE = 100.0  # bytes a second: an expert of the first layer takes a second


def link_of(latency: float = 0.0, parallel: int = 1) -> tuple[VirtualLink, VirtualClock]:
    clock = VirtualClock()
    model = LinkModel(bytes_per_second=RATE, latency=latency, parallel=parallel)
    return VirtualLink(model, clock, SIZES), clock


def take(link: VirtualLink) -> tuple[int, int]:
    arrival, _ = link.next_finished()
    return arrival.position, arrival.expert


def test_a_needed_expert_waits_for_the_one_under_way_and_for_no_other() -> None:
    link, clock = link_of()
    for expert in range(3):
        link.start(1, expert, ahead=True)  # three seconds each
    clock.pass_(1.0)
    link.start(0, 7, ahead=False)
    assert not link.has_finished()
    assert [take(link) for _ in range(4)] == [(1, 0), (0, 7), (1, 1), (1, 2)]
    assert clock.now == pytest.approx(10.0)


def test_promoted_ones_go_first() -> None:
    link, _ = link_of()
    for expert in range(3):
        link.start(0, expert, ahead=True)
    link.start(0, 8, ahead=False)
    link.promote(0, 2)
    assert [take(link) for _ in range(4)] == [(0, 0), (0, 2), (0, 8), (0, 1)]


def test_called_off_before_its_turn_it_takes_no_time_and_after_it_ends() -> None:
    link, clock = link_of()
    for expert in range(3):
        link.start(0, expert, ahead=True)
    assert link.withdraw(0, 1)
    assert not link.withdraw(0, 0)
    assert link.in_flight == 2
    assert [take(link) for _ in range(2)] == [(0, 0), (0, 2)]
    assert clock.now == pytest.approx(2.0)
    assert link.in_flight == 0


def test_latencies_overlap_and_bytes_do_not() -> None:
    link, clock = link_of(latency=0.5, parallel=2)
    for expert in range(3):
        link.start(0, expert, ahead=False)
    ends = []
    for _ in range(3):
        link.next_finished()
        ends.append(clock.now)
    # The third begins when the first has ended, so its latency passes beside the second.
    assert ends == pytest.approx([1.5, 2.5, 3.5])
    serial, clock = link_of(latency=0.5)
    for expert in range(3):
        serial.start(0, expert, ahead=False)
    for _ in range(3):
        serial.next_finished()
    assert clock.now == pytest.approx(4.5)


def test_its_rate_is_measured_while_it_is_busy() -> None:
    link, clock = link_of()
    assert link.rate is None
    link.start(0, 0, ahead=False)
    clock.pass_(5.0)
    assert link.rate == pytest.approx(RATE)  # of the one second, not of five
    assert link.busy_seconds == pytest.approx(1.0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["need", "ahead", "promote", "withdraw", "take", "pass"]),
        st.integers(0, 7),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, parallel=st.integers(1, 3), latency=st.sampled_from([0.0, 0.3]))
def test_whatever_is_asked_time_goes_on_and_nothing_is_lost(
    steps: list[tuple[str, int]], parallel: int, latency: float
) -> None:
    link, clock = link_of(latency, parallel)
    ahead: set[tuple[int, int]] = set()
    needed: dict[tuple[int, int], float] = {}  # since when
    ended: list[tuple[float, float | None]] = []  # when, and since when it was needed

    def take_one() -> None:
        arrival, waited = link.next_finished()
        assert waited >= 0
        assert arrival.end <= clock.now
        key = (arrival.position, arrival.expert)
        ended.append((arrival.end, needed.pop(key, None)))
        ahead.discard(key)

    for act, expert in [*steps, *[("take", 0)] * 8]:
        key, before = (expert % 2, expert), clock.now
        if act in {"need", "ahead"} and key not in ahead and key not in needed:
            link.start(*key, ahead=act == "ahead")
            if act == "ahead":
                ahead.add(key)
            else:
                needed[key] = clock.now
        elif act == "promote" and key in ahead:
            link.promote(*key)
            ahead.discard(key)
            needed[key] = clock.now
        elif act == "withdraw" and key in ahead and link.withdraw(*key):
            ahead.discard(key)
        elif act == "take" and link.in_flight:
            take_one()
        elif act == "pass":
            clock.pass_(0.3 * expert)
        assert clock.now >= before
        assert link.in_flight == len(ahead) + len(needed)
    assert not ahead
    assert not needed
    ends = [end for end, _ in ended]
    assert ends == sorted(ends)
    for end, since in ended:
        if since is not None:
            first = [one for one, wanted in ended if wanted is None and since < one < end]
            assert len(first) <= parallel, "it waited for more loads ahead than were under way"
