"""Owns one rank of `parallel_links.py`: sends what it is told over the engine's link, takes times.

Does not know models, plans or what the bytes stand for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_runtime.parallel import GroupLink
from moe_runtime.parallel.link import Parcel

_PORT = 29500
_REPEATS, _WARM_UP = 15, 3


class SizedLink(GroupLink):
    """The engine's link, told only how many bytes go to each rank."""

    sent = 0

    def parcels(self, sizes: Any) -> list[Parcel]:
        """What this rank sends in a collective of `sizes [G, G]` bytes, frames included."""
        lengths = [max(0, int(size) - self.frame_bytes) for size in sizes[self.rank]]
        return [Parcel(payload=torch.empty(length, dtype=torch.uint8)) for length in lengths]

    def call(self, parcels: list[Parcel]) -> None:
        """One collective, the stated latency included."""
        self._timed("a collective", parcels)
        others = [one for rank, one in enumerate(parcels) if rank != self.rank]
        self.sent += sum(len(one.payload) + self.frame_bytes for one in others)


def posted_late(link: GroupLink, sizes: Any) -> None:
    """One all-to-all of `sizes [G, G]` bytes whose receives are posted within it."""
    rank, others = link.rank, [other for other in range(link.size) if other != link.rank]
    sent = [(other, torch.empty(int(sizes[rank, other]), dtype=torch.uint8)) for other in others]
    got = [(other, torch.empty(int(sizes[other, rank]), dtype=torch.uint8)) for other in others]
    work = [dist.irecv(buffer, other) for other, buffer in got]
    work += [dist.isend(buffer, other) for other, buffer in sent]
    for one in work:
        one.wait()


def raw(link: SizedLink, sizes: list[int]) -> list[dict[str, Any]]:
    """All-to-alls of several sizes: even ones, the most uneven one (rank 0 alone has something to
    say), and even ones that do without receives posted ahead.
    """
    rows = []
    for size in sizes:
        even = np.full((link.size, link.size), size)
        uneven = even.copy()
        uneven[1:] = 8
        for kind, matrix in (
            ("all_to_all", even), ("one_sender", uneven), ("receives_posted_late", even),
        ):  # fmt: skip
            parcels, seconds = link.parcels(matrix), []
            for _ in range(_REPEATS):
                dist.barrier()
                began = time.perf_counter()
                if kind == "receives_posted_late":
                    posted_late(link, matrix)
                else:
                    link.call(parcels)
                seconds.append(slowest(time.perf_counter() - began))
            seconds = sorted(seconds[_WARM_UP:])
            rows.append({
                "kind": kind, "bytes": size, "seconds": median(seconds),
                "seconds_range": [seconds[0], seconds[-1]],
            })  # fmt: skip
    return rows


def slowest(seconds: float) -> float:
    """The most that any rank took."""
    taken = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken.item())


def in_all(number: int) -> int:
    """The sum over the ranks."""
    total = torch.tensor([number])
    dist.all_reduce(total)
    return int(total.item())


def steps(link: SizedLink, variants: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of every step of every variant, [rounds][steps]; variants take turns. Each round also
    times runs of empty collectives (8 bytes), the stated latency included.

    Args:
        variants: int64 `[steps, collectives, G, G]` bytes. One that no row needs is left out.
    """
    base = []
    empty = link.parcels(np.full((link.size, link.size), 8))
    calls = {
        name: [[link.parcels(sizes) for sizes in step if sizes.any()] for step in array]
        for name, array in variants.items()
    }
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    sent = {}
    for number in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(_REPEATS):
            link.call(empty)
        base.append(slowest((time.perf_counter() - began) / _REPEATS))
        for name in list(variants)[:: 1 if number % 2 else -1]:
            times, before = [], link.sent
            for collectives in calls[name]:
                dist.barrier()
                began = time.perf_counter()
                for parcels in collectives:
                    link.call(parcels)
                times.append(slowest(time.perf_counter() - began))
            found[name].append(times)
            sent[name] = in_all(link.sent - before)
    return {"steps": found, "base": base[1:], "sent": sent}


def main() -> None:
    """`parallel_links_rank.py TASK.json RANK ADDRESS`; rank 0 writes JSON."""
    task = json.loads(Path(sys.argv[1]).read_text())
    rank, address = int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{_PORT}",
        rank=rank,
        world_size=task["ranks"],
        timeout=timedelta(seconds=60),
    )
    found = {"raw": raw(SizedLink(timeout=60.0), task["raw"])}
    link = SizedLink(latency=task["latency"], timeout=60.0)
    with np.load(Path(task["folder"], "arrays.npz"), allow_pickle=False) as arrays:
        found["cases"] = [
            steps(link, {name: arrays[f"{at} {name}"] for name in names}, task["rounds"])
            for at, names in enumerate(task["cases"])
        ]
    dist.barrier()
    if rank == 0:
        Path(task["folder"], "out.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still be closing; nothing is left to do


if __name__ == "__main__":
    main()
