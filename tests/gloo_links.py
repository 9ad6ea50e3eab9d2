"""What two gloo processes check about their links; processes that are spawned import it.

Knows links; no models.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_runtime.errors import ParallelError
from moe_runtime.parallel import GroupLink


def rows_of(rank: int, count: int) -> list[torch.Tensor]:
    """Rows of every dtype that say which rank's they are and the how-manieth."""
    names = torch.arange(count) + 100 * rank
    return [
        names.to(torch.float64)[:, None].expand(count, 3) * 0.25,
        names.to(torch.bfloat16),
        (names % 2).bool(),
        names.to(torch.int16)[:, None, None].expand(count, 2, 1),
    ]


def check_gloo_links(rank: int, folder: str) -> None:
    """Both framings, rows short and long, and a call that the other rank never makes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    links = {
        "eager": GroupLink(timeout=20.0),
        "sizes": GroupLink(framing="sizes", timeout=20.0),
        # The first one still waits for a call that never comes: it must not take this one's rows.
        "eager again": GroupLink(timeout=20.0),
    }
    assert links["eager"].framing == "eager"
    for name, link in links.items():
        for count in (0, 5, 90_000):  # the last is longer than a first message
            to = (torch.arange(count) + rank) % 2
            arrived, source = link.exchange("move", 2, rows_of(rank, count), to)
            keep = [torch.arange(count)[(torch.arange(count) + src) % 2 == rank] for src in (0, 1)]
            for place, tensor in enumerate(arrived):
                want = torch.cat([rows_of(s, count)[place][keep[s]] for s in (0, 1)])
                assert torch.equal(tensor, want), (name, count, place)
            assert source.tolist() == [0] * len(keep[0]) + [1] * len(keep[1])
        assert link.agree("name", [name, rank]) == [[name, 0], [name, 1]]
        gathered = link.gather("tokens", None, [torch.full((rank + 1,), rank)])
        assert gathered[0].tolist() == [0, 1, 1]
        entry = next(e for e in link.ledger.entries() if e.kind == "move")
        assert entry.calls == 3
        assert entry.rounds == (6 if name == "sizes" else 3)
    told = Path(folder) / "told"
    if rank == 0:  # it stays until the other has had its error, however slow the machine
        until = time.monotonic() + 90.0
        while not told.exists():
            assert time.monotonic() < until, "rank 1 waits for good"
            time.sleep(0.02)
    else:  # the other rank never calls: an error in time that names the call
        late = GroupLink(framing="sizes", timeout=0.3)
        with pytest.raises(ParallelError, match="agree:fingerprints"):
            late.agree("fingerprints", 1)
        told.touch()
    dist.destroy_process_group()
