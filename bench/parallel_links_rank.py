"""Owns one rank of `parallel_links.py`: sends what it is told over gloo and takes the time.

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

_PORT = 29500
_REPEATS, _WARM_UP = 15, 3


def exchange(sizes: Any, rank: int, latency: float) -> float:
    """One all-to-all of `sizes [G, G]` bytes; seconds, the stated latency included."""
    others = [other for other in range(len(sizes)) if other != rank]
    sent = [(other, torch.empty(int(sizes[rank, other]), dtype=torch.uint8)) for other in others]
    got = [(other, torch.empty(int(sizes[other, rank]), dtype=torch.uint8)) for other in others]
    began = time.perf_counter()
    work = [dist.irecv(buffer, other) for other, buffer in got if len(buffer)]
    work += [dist.isend(buffer, other) for other, buffer in sent if len(buffer)]
    for one in work:
        one.wait()
    if latency:
        time.sleep(latency)
    return time.perf_counter() - began


def raw(rank: int, ranks: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Even all-to-alls, and gathers (each rank the same bytes to all), of several sizes."""
    rows = []
    for size in sizes:
        for kind in ("all_to_all", "one_sender"):
            matrix = np.full((ranks, ranks), size)
            if kind == "one_sender":  # the most uneven: rank 0 alone has something to say
                matrix[1:] = 8
            seconds = []
            for _ in range(_REPEATS):
                dist.barrier()
                seconds.append(slowest(exchange(matrix, rank, 0.0)))
            rows.append({"kind": kind, "bytes": size, "seconds": median(seconds[_WARM_UP:])})
    return rows


def slowest(seconds: float) -> float:
    """The most that any rank took."""
    taken = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken.item())


def steps(rank: int, task: dict[str, Any], arrays: Any) -> dict[str, Any]:
    """Seconds of every step of every variant, [rounds][steps]; variants take turns. Each round also
    times runs of empty collectives (8 bytes), the stated latency included.
    """
    base = []
    empty = np.full((task["ranks"], task["ranks"]), 8)
    found: dict[str, list[list[float]]] = {name: [] for name in task["variants"]}
    for number in range(task["rounds"]):
        order = task["variants"] if number % 2 else task["variants"][::-1]
        dist.barrier()
        began = time.perf_counter()
        for _ in range(_REPEATS):
            exchange(empty, rank, task["latency"])
        base.append(slowest((time.perf_counter() - began) / _REPEATS))
        for name in order:
            times = []
            for collectives in arrays[name]:
                dist.barrier()
                began = time.perf_counter()
                for sizes in collectives:
                    if sizes.any():  # a collective that no row needs is left out
                        exchange(sizes, rank, task["latency"])
                times.append(slowest(time.perf_counter() - began))
            found[name].append(times)
    return {"steps": found, "base": base[1:]}


def main() -> None:
    """`parallel_links_rank.py TASK.json RANK ADDRESS`; rank 0 prints JSON."""
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
    found: dict[str, Any] = {}
    if task["raw"]:
        found["raw"] = raw(rank, task["ranks"], task["raw"])
    if task["variants"]:
        with np.load(Path(task["folder"], "arrays.npz"), allow_pickle=False) as arrays:
            found |= steps(rank, task, {name: arrays[name] for name in task["variants"]})
    dist.barrier()
    if rank == 0:
        Path(task["folder"], "out.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still be closing; nothing is left to do


if __name__ == "__main__":
    main()
