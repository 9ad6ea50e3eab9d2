"""Links between ranks: rows arrive as they were sent, in order, counted to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing

from gloo_links import check_gloo_links, rows_of
from moe_runtime.errors import ConfigError, ParallelError
from moe_runtime.parallel import GroupLink, Link, run_ranks
from moe_runtime.parallel.traffic import Traffic, add_traffic


@settings(max_examples=25)
@given(data=st.data(), size=st.integers(1, 4))
def test_every_row_arrives_once_in_order_with_its_source(data: st.DataObject, size: int) -> None:
    to = [
        data.draw(st.lists(st.integers(0, size - 1), max_size=9), label=f"rank {rank}")
        for rank in range(size)
    ]

    def work(link: Link) -> tuple[list[torch.Tensor], torch.Tensor, tuple[Traffic, ...]]:
        mine = torch.tensor(to[link.rank], dtype=torch.long)
        arrived, source = link.exchange("move", 3, rows_of(link.rank, len(mine)), mine)
        return arrived, source, link.ledger.entries()

    results = run_ranks(work, size)
    width = 3 * 8 + 2 + 1 + 2 * 2
    for rank, (arrived, source, entries) in enumerate(results):
        expected = [
            (src, at) for src in range(size) for at, target in enumerate(to[src]) if target == rank
        ]
        assert source.tolist() == [src for src, _ in expected]
        for place, tensor in enumerate(arrived):
            want = [rows_of(src, len(to[src]))[place][at] for src, at in expected]
            assert tensor.dtype == rows_of(0, 1)[place].dtype
            assert len(tensor) == len(want)
            assert all(torch.equal(a, b) for a, b in zip(tensor, want, strict=True))
        (entry,) = entries
        kept = to[rank].count(rank)
        leaving = len(to[rank]) - kept
        assert (entry.rows, entry.bytes) == (leaving, leaving * width)
        assert (entry.kept_rows, entry.kept_bytes) == (kept, kept * width)
        assert entry.frame_bytes == 8 * (size - 1)
        assert (entry.kind, entry.layer, entry.calls) == ("move", 3, 1)


def test_gather_gives_all_ranks_the_same_rows_by_rank() -> None:
    def work(link: Link) -> list[torch.Tensor]:
        return link.gather("tokens", None, rows_of(link.rank, link.rank * 2))

    results = run_ranks(work, 3)
    want = [torch.cat(parts) for parts in zip(*(rows_of(r, 2 * r) for r in range(3)), strict=True)]
    for gathered in results:
        assert all(torch.equal(a, b) for a, b in zip(gathered, want, strict=True))


def test_agree_and_notes_tell_every_rank_of_every_other() -> None:
    def work(link: Link) -> tuple[list[dict[str, int]], tuple[int, ...]]:
        values = link.agree("plan", {"rank": link.rank})
        none = torch.zeros(0, dtype=torch.long)
        arrival = link.exchange_noted("move", 0, rows_of(0, 0), none, note=link.rank + 7)
        return values, arrival.notes

    for values, notes in run_ranks(work, 3):
        assert values == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert notes == (7, 8, 9)


def test_a_rank_that_fails_ends_the_others_calls() -> None:
    def work(link: Link) -> None:
        if link.rank == 1:
            raise ValueError("rank 1 has had enough")
        link.agree("anything", 1)

    with pytest.raises(ValueError, match="had enough"):
        run_ranks(work, 3)


def test_a_rank_that_never_comes_is_an_error_in_time() -> None:
    def work(link: Link) -> None:
        if link.rank == 0:
            link.agree("plan", 1)

    # "In time" is the 0.3 s that the error names; a call that waited for good would hang here.
    with pytest.raises(ParallelError, match=r"rank 0: agree:plan .* 0\.3 s"):
        run_ranks(work, 2, timeout=0.3)


def test_latency_is_slept_and_counted_apart_from_waiting() -> None:
    def work(link: Link) -> tuple[float, float]:
        for _ in range(5):
            link.gather("tokens", None, rows_of(0, 1))
        return link.ledger.slept_seconds, link.ledger.idle_seconds

    for slept, _ in run_ranks(work, 2, latency=0.01):
        assert slept >= 0.05


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="process group"):
        GroupLink()
    with pytest.raises(ConfigError, match="latency"):
        run_ranks(lambda link: link.rank, 2, latency=-1.0)
    with pytest.raises(ParallelError, match="plain data"):
        run_ranks(lambda link: link.agree("x", {1, 2}), 1)


def test_traffic_adds_up_rows_but_not_the_calls_that_ranks_share() -> None:
    one = Traffic(kind="move", layer=1, calls=2, rounds=2, rows=3, bytes=30, frame_bytes=8)
    two = Traffic(kind="move", layer=1, calls=2, rounds=2, rows=5, bytes=50, frame_bytes=8)
    (summed,) = add_traffic([one, two], alike=True)
    assert (summed.calls, summed.rounds, summed.rows, summed.cross_bytes) == (2, 2, 8, 96)
    assert add_traffic([one, two])[0].calls == 4


@pytest.mark.slow
def test_gloo_processes_exchange_as_threads_do(tmp_path: Path) -> None:
    multiprocessing.spawn(check_gloo_links, args=(str(tmp_path),), nprocs=2)
