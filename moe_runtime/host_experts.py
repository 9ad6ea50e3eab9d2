"""Experts computed on the host, on a thread of its own, while the device computes others.

Weights stay where they lie. Knows rows and tensors; which experts come here is `hosting`'s choice,
and no cache is known.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from moe_runtime.kernels import ExpertForm, expert_mlp

__all__ = ["HostBatch", "HostExpert", "HostExperts"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HostExpert:
    """One expert and the rows that it works on.

    Args:
        tensors: its weights in host memory, as the model has them.
        rows: int64 `[n]`, rows of the batch's hidden states.
    """

    tensors: tuple[torch.Tensor, ...]
    rows: torch.Tensor


@dataclass(eq=False)
class HostBatch:
    """Experts of one layer step that the host computes; made by `HostExperts.submit`.

    Attributes:
        seconds: that computing took, once it is done.
    """

    experts: Sequence[HostExpert]
    form: ExpertForm
    hidden: Callable[[], torch.Tensor]
    seconds: float = 0.0
    _outputs: torch.Tensor | None = None
    _error: BaseException | None = None
    _dropped: bool = False
    _done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Block until nothing of it is computed any more."""
        self._done.wait()

    def outputs(self) -> torch.Tensor:
        """`[n, D']` in host memory, expert by expert in the order given; waits for them.

        Raises:
            Exception: what went wrong on the thread.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._outputs is not None, "it was dropped"
        return self._outputs

    def drop(self) -> None:
        """Nobody wants it any more: what is not computed yet is not computed."""
        self._dropped = True

    def run(self) -> None:
        """Compute, on the calling thread."""
        try:
            hidden = self.hidden()
            began = time.perf_counter()
            parts = []
            for expert in self.experts:
                if self._dropped:
                    return
                parts.append(expert_mlp(hidden[expert.rows], expert.tensors, self.form))
            self._outputs = torch.cat(parts)
            self.seconds = time.perf_counter() - began
        except BaseException as error:  # noqa: BLE001  raised again by whoever wants the outputs
            self._error = error
        finally:
            self._done.set()


class HostExperts:
    """One thread that computes batches in the order in which they come.

    Args:
        threads: PyTorch's compute threads for it. The bits of a product can depend on them.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        self._work: queue.SimpleQueue[HostBatch | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(
        self, experts: Sequence[HostExpert], form: ExpertForm, hidden: Callable[[], torch.Tensor]
    ) -> HostBatch:
        """Have experts computed; returns at once.

        Args:
            form: how they compute, `activation` and all on host tensors.
            hidden: called on the thread: waits for the hidden states `[T, D]` and returns them.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moe-host-experts", daemon=True)
            self._thread.start()
        batch = HostBatch(experts, form, hidden)
        self._work.put(batch)
        return batch

    def leave(self) -> None:
        """Tell the thread to end after what it has been given; waits for nothing."""
        if self._thread is not None:
            self._work.put(None)

    def close(self) -> None:
        """End the thread, after what it has been given."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        # The number of threads is each thread's own once it has been asked for (see `prefetch`).
        torch.get_num_threads()
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while (batch := self._work.get()) is not None:
                batch.run()
