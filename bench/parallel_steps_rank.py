"""Owns one rank of `parallel_steps.py`: runs the engine's decode over gloo and takes the time.

Does not know plans' origins or links' shapes.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_runtime.placement.plan import Plan
from transformers import AutoConfig, AutoModelForCausalLM

from moe_runtime.parallel import GroupLink, ParallelRun, generate

_PORT = 29501


def main() -> None:
    """`parallel_steps_rank.py TASK.json RANK ADDRESS`; rank 0 writes JSON and a routing trace."""
    task = json.loads(Path(sys.argv[1]).read_text())
    rank, address = int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(task["model"])
    config.num_experts_per_tok = task["top_k"]
    model = AutoModelForCausalLM.from_pretrained(
        task["model"], config=config, dtype=torch.float32
    ).eval()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{_PORT}",
        rank=rank,
        world_size=task["ranks"],
        timeout=timedelta(seconds=120),
    )
    link = GroupLink(latency=task["latency"], timeout=120.0)

    def once(mode: str, plan: Plan, new_tokens: int) -> ParallelRun:
        return generate(
            model,
            task["prompts"],
            plan=plan,
            mode=mode,
            link=link,
            start="ended",
            max_new_tokens=new_tokens,
            stop_tokens=(),
            check="off",
        )

    plans = {name: Plan.load(path) for name, path in task["plans"].items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}
    for number in range(task["rounds"]):
        for name in list(plans) if number % 2 else list(plans)[::-1]:
            mode = name.split(",")[0]
            # What a run of one token takes is prefill: the rest is steps.
            prefill = once(mode, plans[name], 1)
            run = once(mode, plans[name], task["new_tokens"])
            assert run.mode == mode
            found[name].append({
                "step_seconds": (run.seconds - prefill.seconds) / run.steps,
                "sent": list(run.sent),
                "idle_seconds": list(run.idle_seconds),
            })  # fmt: skip
            if rank == 0 and run.routing is not None:
                run.routing.save(Path(task["folder"], f"{name}.trace.safetensors"))
    dist.barrier()
    if rank == 0:
        Path(task["folder"], "out.json").write_text(json.dumps(found))
    os._exit(0)  # gloo's threads may still be closing; nothing is left to do


if __name__ == "__main__":
    main()
