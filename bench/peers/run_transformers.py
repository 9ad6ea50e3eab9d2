"""Runner: plain transformers, everything in memory. Option `experts`: the implementation's name.

Does not know the harness.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache

from peers.protocol import Opened, Step, Task, serve


def stepper(model: Any) -> Step:
    """Batch-1 decode of a transformers model with its ordinary dynamic cache."""
    cache = DynamicCache(config=model.config)

    def step(token: int, _position: int) -> NDArray[np.float32]:
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        logits: NDArray[np.float32] = out.logits[0, -1].float().numpy()
        return logits

    return step


def open_plain(task: Task) -> Opened:
    torch.set_num_threads(task.threads)
    model = AutoModelForCausalLM.from_pretrained(
        task.checkpoint, dtype=torch.bfloat16, experts_implementation=task.options["experts"]
    ).eval()
    return Opened(step=stepper(model), packages=("torch", "transformers"))


if __name__ == "__main__":
    serve(open_plain)
