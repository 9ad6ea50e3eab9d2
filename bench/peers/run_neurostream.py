"""Runner: neurostream, the BF16 GGUF, streamed from disk with some tensors kept in memory.

Does not know the harness. Options: `mem_budget` (buffers of reads in flight), `ram_budget`
(tensors kept in memory), `block_rows`, `workers`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from neurostream import NeuroStream
from neurostream.model.qwen3 import KVCache
from numpy.typing import NDArray

from peers.protocol import Opened, Task, serve


def open_neurostream(task: Task) -> Opened:
    torch.set_num_threads(task.threads)
    engine = NeuroStream.load(
        task.gguf,
        device="cpu",
        mem_budget=task.options["mem_budget"],
        ram_budget=task.options["ram_budget"],
        n_workers=task.options["workers"],
    )
    cache = KVCache(engine.cfg.n_layer)

    def step(token: int, position: int) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits = engine.model.forward(torch.tensor([token]), cache, start_pos=position)
        values: NDArray[np.float32] = logits[-1].float().numpy()
        return values

    def extra() -> dict[str, Any]:
        return {"report": engine.report(), "bytes_read": engine.source.stats.bytes_read}

    return Opened(step=step, extra=extra, packages=("neurostream", "torch"))


if __name__ == "__main__":
    serve(open_neurostream)
