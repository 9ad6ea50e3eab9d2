"""Owns one rank of `parallel_steps.py`: runs the engine's decode over gloo and takes the time.

Does not know plans' origins or links' shapes.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from moe_runtime.placement.plan import Plan
from transformers import AutoConfig, AutoModelForCausalLM

from moe_runtime.parallel import GroupLink, ParallelRun, generate

_PORT = 29501


def loaded(path: str, top_k: int) -> Any:
    """The model with so many experts a token."""
    config = AutoConfig.from_pretrained(path)
    config.num_experts_per_tok = top_k
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()


def waiting(run: ParallelRun) -> float:
    """Seconds in which a rank waited or slept, the mean."""
    return fmean(map(sum, zip(run.idle_seconds, run.slept_seconds, strict=True)))


def measured(case: dict[str, Any], task: dict[str, Any], link: GroupLink) -> dict[str, Any]:
    """Every variant's runs, by turns; rank 0 keeps what their tokens were routed to."""
    model = loaded(task["model"], case["top_k"])
    plans = {name: Plan.load(path) for name, path in case["plans"].items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}

    def once(name: str, new_tokens: int) -> ParallelRun:
        mode = name.split(",")[0]
        run = generate(
            model,
            task["prompts"],
            plan=plans[name],
            mode=mode,
            link=link,
            start="ended",
            max_new_tokens=new_tokens,
            stop_tokens=(),
            check="off",
        )
        assert run.mode == mode
        return run

    for number in range(task["rounds"]):
        for name in list(plans)[:: 1 if number % 2 else -1]:
            # What a run of one token takes is prefill: the rest is steps.
            prefill, run = once(name, 1), once(name, task["new_tokens"])
            found[name].append({
                "step_seconds": (run.seconds - prefill.seconds) / run.steps,
                "waiting_seconds": (waiting(run) - waiting(prefill)) / run.steps,
                "sent": list(run.sent),
            })  # fmt: skip
            if link.rank == 0 and run.routing is not None:
                run.routing.save(Path(task["folder"], f"{case['top_k']} {name}.trace.safetensors"))
    return found


def main() -> None:
    """`parallel_steps_rank.py TASK.json RANK ADDRESS`; rank 0 writes JSON and routing traces."""
    task = json.loads(Path(sys.argv[1]).read_text())
    rank, address = int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{_PORT}",
        rank=rank,
        world_size=task["ranks"],
        timeout=timedelta(seconds=120),
    )
    link = GroupLink(latency=task["latency"], timeout=120.0)
    found = [measured(case, task, link) for case in task["cases"]]
    dist.barrier()
    if rank == 0:
        Path(task["folder"], "out.json").write_text(json.dumps(found))
    os._exit(0)  # gloo's threads may still be closing; nothing is left to do


if __name__ == "__main__":
    main()
