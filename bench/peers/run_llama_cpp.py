"""Runner: llama.cpp through llama-cpp-python, the checkpoint as BF16 GGUF, memory-mapped.

Does not know the harness. Runs in an environment of its own (numpy and llama-cpp-python).
"""

from __future__ import annotations

import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray

from peers.protocol import Opened, Task, serve


def open_llama(task: Task) -> Opened:
    model = Llama(
        task.gguf,
        n_ctx=task.warmup + task.tokens + 8,
        n_batch=32,
        n_threads=task.threads,
        n_threads_batch=task.threads,
        use_mmap=True,
        use_mlock=False,
        verbose=False,
    )
    vocab = model.n_vocab()

    def step(token: int, _position: int) -> NDArray[np.float32]:
        model.eval([token])
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(vocab,))
        return logits.astype(np.float32)

    return Opened(step=step, packages=("llama_cpp_python", "numpy"))


if __name__ == "__main__":
    serve(open_llama)
