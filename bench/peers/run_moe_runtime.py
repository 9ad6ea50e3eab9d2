"""Runner: this project. Its options are keyword arguments of `moe_runtime.from_pretrained`.

Does not know the harness.
"""

from __future__ import annotations

from typing import Any

import torch

import moe_runtime
from peers.protocol import Opened, Task, serve
from peers.run_transformers import stepper


def open_ours(task: Task) -> Opened:
    torch.set_num_threads(task.threads)
    model = moe_runtime.from_pretrained(task.checkpoint, device="cpu", **task.options)

    def extra() -> dict[str, Any]:
        run = moe_runtime.runtime_of(model).run_record()
        return {name: run[name] for name in ("budget", "counters", "memory", "simulation")}

    return Opened(step=stepper(model), extra=extra, packages=("torch", "transformers"))


if __name__ == "__main__":
    serve(open_ours)
