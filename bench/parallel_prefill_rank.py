"""Owns one rank of `parallel_prefill.py`: lets the engine read prompts over gloo.

Does not know plans' origins or links' shapes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_runtime.placement.links import Link, Links
from moe_runtime.placement.plan import Plan
from transformers import AutoModelForCausalLM

from moe_runtime.parallel import GroupLink, generate

_PORT = 29502
_BARE_ROUNDS = 5


def bare(link: GroupLink, nbytes: int, calls: int) -> list[float]:
    """Seconds of as many calls with as many bytes, both ways alike and no model between them."""
    rows = torch.zeros(nbytes // calls // link.size, dtype=torch.uint8)
    to = torch.full((len(rows),), 1 - link.rank)
    taken = []
    for _ in range(_BARE_ROUNDS):
        link.agree("ready", 1)
        began = time.perf_counter()
        for _ in range(calls):
            link.exchange("bare", 0, [rows], to)
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    """`parallel_prefill_rank.py TASK.json RANK ADDRESS`; rank 0 writes JSON."""
    task = json.loads(Path(sys.argv[1]).read_text())
    rank, address = int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{_PORT}",
        rank=rank,
        world_size=task["ranks"],
        timeout=timedelta(seconds=120),
    )
    link = GroupLink(latency=task["latency"], timeout=120.0)
    bandwidth, latency = task["link"]
    links = Links(near=Link(bandwidth=bandwidth, latency=latency))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in task["variants"]}
    for number in range(task["rounds"]):
        variants = list(task["variants"].items())
        for name, (mode, path) in variants if number % 2 else variants[::-1]:
            run = generate(
                model,
                task["prompts"],
                plan=Plan.load(path),
                mode=mode,
                link=link,
                links=links,
                max_new_tokens=task["new_tokens"][mode],
                stop_tokens=(),
                check="off",
            )
            found[name].append({
                "foretold": run.predicted["prefill"],
                "waits": list(run.prefill_wait_seconds),
                "seconds": run.prefill_seconds,
                "cross_bytes": sum(
                    one.cross_bytes for one in run.traffic if one.kind.startswith("prefill.")
                ),
            })  # fmt: skip
    for runs in found.values():
        last = runs[-1]
        last["bare_seconds"] = bare(link, last["cross_bytes"], last["foretold"]["calls"])
    dist.barrier()
    if rank == 0:
        Path(task["folder"], "out.json").write_text(json.dumps(found))
    os._exit(0)  # gloo's threads may still be closing; nothing is left to do


if __name__ == "__main__":
    main()
