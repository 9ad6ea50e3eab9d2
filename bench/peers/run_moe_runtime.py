"""Runner: this project. Options: `expert_budget`, `policy`, and `threads_io` where it is asked for.

Does not know the harness.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import moe_runtime
from peers.protocol import Opened, Task, serve
from peers.run_transformers import stepper


def open_ours(task: Task) -> Opened:
    torch.set_num_threads(task.threads)
    model = moe_runtime.from_pretrained(
        task.checkpoint,
        expert_budget=task.options["expert_budget"],
        policy=task.options.get("policy", "lru"),
        device="cpu",
    ).eval()

    def extra() -> dict[str, Any]:
        report = moe_runtime.report(model)
        try:
            content: dict[str, Any] = json.loads(json.dumps(report, default=vars))
        except TypeError:
            content = {"text": str(report)}
        return {"report": content}

    return Opened(step=stepper(model), extra=extra, packages=("torch", "transformers"))


if __name__ == "__main__":
    serve(open_ours)
