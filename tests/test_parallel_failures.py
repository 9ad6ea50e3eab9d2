"""A rank that raises amid a run: the others know in time, in its words, and the link says so."""

from __future__ import annotations

import copy
import json
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from failing_ranks import ERRORS, PLACES, RANKS, Said, main, run_failing, said_of
from moe_runtime.errors import ParallelError
from moe_runtime.parallel import GroupLink, Link, run_ranks, thread_links
from moe_runtime.parallel.agreement import together
from moe_runtime.parallel.failures import (
    Failure,
    OthersFailedError,
    failure_of,
    failures_as_bytes,
    failures_from_bytes,
)
from moe_runtime.parallel.waiting import came_other
from parallel_models import tiny
from parallel_ranks import some_ranks

TIMEOUT = 60.0
SOON = 10.0  # seconds; milliseconds on a machine that does nothing else
WORDS = {
    name: f"{type(error).__name__}: {error}".removesuffix(": ") for name, error in ERRORS.items()
}
LONE = {
    **dict.fromkeys(PLACES, (1, WORDS["memory"])),
    "assertion": (1, WORDS["assertion"]),
    "interrupt": (1, WORDS["interrupt"]),
    "sizes": (1, WORDS["memory"]),
    "amid a call, eager": (1, "MemoryError: no room for what arrives"),
    "amid a call, sizes": (1, "MemoryError: no room for what arrives"),
    "no last word": (1, WORDS["memory"]),
    "interrupted read": (1, "KeyboardInterrupt"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Said]]:
    """What three gloo processes said in each scenario, by rank."""
    found: dict[str, list[Said]] = {}
    with some_ranks(RANKS, main, "all", TIMEOUT, tmp_path_factory.mktemp("ranks")) as ranks:
        for rank in ranks:
            code, errors = rank.ended()
            assert code == 0, errors
        for rank in ranks:
            for line in rank.output("out").splitlines():
                one = json.loads(line)
                found.setdefault(one.pop("scenario"), []).append(Said(**one))
    return found


def assert_others_know(said: list[Said], failed: int, words: str, *, soon: float = SOON) -> None:
    own = said[failed]
    assert f"{own.kind}: {own.text}".removesuffix(": ") == words
    for one in said:
        assert one.at - own.at < soon
        if one.rank != failed:
            assert one.kind == "OthersFailedError"
            assert f"rank {one.rank} stops in " in one.text
            assert one.text.endswith(f": rank {failed} failed: {words}")
        for later in one.later:
            assert later.startswith("ParallelError: ")
            assert "of no use" in later
            assert f"rank {failed} failed: {words}" in later


@pytest.mark.slow
@pytest.mark.parametrize("scenario", LONE)
def test_a_rank_that_raises_is_known_to_all_soon_in_its_words(
    told: dict[str, list[Said]], scenario: str
) -> None:
    assert_others_know(told[scenario], *LONE[scenario])


@pytest.mark.slow
def test_of_two_at_once_each_says_its_own_and_the_third_rank_the_first(
    told: dict[str, list[Said]],
) -> None:
    said = told["two at once"]
    assert (said[0].kind, said[2].kind) == ("OutOfMemoryError", "AssertionError")
    assert said[1].kind == "OthersFailedError"
    known = {f"rank 0 failed: {WORDS['memory']}", f"rank 2 failed: {WORDS['assertion']}"}
    assert any(one in said[1].text for one in known)
    assert "ParallelError" not in said[1].text
    assert max(one.at for one in said) - min(one.at for one in said) < SOON


@pytest.mark.slow
def test_what_ranks_agree_on_leaves_the_link_of_use(told: dict[str, list[Said]]) -> None:
    for one in told["alike"]:
        assert one.kind == "ConfigError"
        assert one.later == ["fine", "fine"]
    for one in told["unread shard"]:
        assert one.kind == ("ExpertReadError" if one.rank == 1 else "ParallelError")
        assert "the disk is gone" in one.text
        assert one.later == ["fine", "fine"]


@pytest.mark.parametrize("place", PLACES)
def test_threads_whose_errors_are_caught_know_too(place: str) -> None:
    links = thread_links(RANKS, timeout=TIMEOUT)
    models = [copy.deepcopy(MODEL) for _ in links]
    said: list[Any] = [None] * RANKS

    def work(link: Link) -> None:
        said[link.rank] = said_of(
            link,
            lambda: run_failing(link, models[link.rank], place, {1: "memory"}),
            [lambda: link.agree("anything", 1)],
        )

    threads = [threading.Thread(target=work, args=(link,)) for link in links]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert_others_know(said, 1, WORDS["memory"])


def test_the_first_failure_is_what_a_run_on_threads_raises() -> None:
    def work(link: Link) -> None:
        if link.rank == 2:
            raise KeyError("first")
        if link.rank == 0:
            time.sleep(0.2)
            raise ValueError("second")
        link.agree("anything", 1)

    with pytest.raises(KeyError, match="first"):
        run_ranks(work, RANKS)


def test_an_error_of_all_is_everyones_own_and_the_next_call_goes_well() -> None:
    def refuse(link: Link) -> None:
        raise ValueError(f"rank {link.rank} sees it too")

    def work(link: Link) -> list[int]:
        with pytest.raises(ValueError, match=f"rank {link.rank} sees"), link.telling():
            together(link, "looking", lambda: refuse(link))
        return link.agree("ranks", link.rank)

    assert run_ranks(work, RANKS) == [[0, 1, 2]] * RANKS


def test_after_agreed_errors_and_calls_a_rank_alone_is_heard_again() -> None:
    def work(link: Link) -> None:
        with pytest.raises((OSError, ParallelError)), link.telling():
            together(link, "reading", lambda: (_ for _ in ()).throw(OSError("gone")))
        with link.telling():
            if link.rank == 1:
                raise KeyError("alone")
            with pytest.raises(OthersFailedError, match="rank 1 failed: KeyError: 'alone'"):
                link.agree("more", 1)

    with pytest.raises(KeyError, match="alone"):
        run_ranks(work, RANKS)


def test_a_call_that_was_interrupted_spoils_its_link_though_nobody_was_told() -> None:
    def work(link: Link) -> None:
        if link.rank == 0:
            with pytest.raises(ParallelError, match="did not come to an end"):
                link.agree("plan", 1)
            with pytest.raises(ParallelError, match="of no use for agree:again"):
                link.agree("again", 1)

    run_ranks(work, 2, timeout=0.2)


def test_word_of_failures_reads_back_and_stays_short() -> None:
    said = (
        Failure(rank=3, text="OSError: kein Platz für 'x'"),
        failure_of(0, ValueError("y" * 9000)),
    )
    assert failures_from_bytes(failures_as_bytes(said)) == said
    assert len(said[1].text) < 2100
    assert str(failure_of(2, KeyboardInterrupt())) == "rank 2 failed: KeyboardInterrupt"
    for damaged in (b"", b"{}", b"[1]", b'[{"rank": 1}]', b"\xff"):
        assert failures_from_bytes(damaged) == ()


class Late:
    """A collective that has ended when it has been looked at so often."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_collective_that_cannot_be_waited_for_in_parts_is_looked_at() -> None:
    assert came_other(Late(5), 60.0)
    late = Late(10**9)
    began = time.monotonic()
    assert not came_other(late, 0.05)
    assert 0.05 <= time.monotonic() - began < SOON
    assert 10**9 - late.looks < 1000  # it sleeps in between


def test_a_link_does_not_keep_the_default_group_from_ending(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    link = GroupLink()
    with pytest.raises(KeyError), link.telling():
        raise KeyError("alone")
    with pytest.raises(ParallelError, match="process group is of no use any more: rank 0 failed"):
        GroupLink()
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/new", rank=0, world_size=1)
    assert GroupLink().agree("anything", 1) == [1]
    dist.destroy_process_group()


MODEL = tiny(4)
