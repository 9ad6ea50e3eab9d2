"""Record a model's routing into a `RoutingTrace` while it runs.

Listens to the executor; knows the trace's columns, not its file form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_runtime.errors import TraceError
from moe_runtime.model_spec import MoESpec
from moe_runtime.steps import SequenceNumbers, Step
from moe_runtime.trace import DECODE, PREFILL, UNUSED, RoutingTrace

__all__ = ["Recorder"]


@dataclass
class _Rows:
    """One forward call's rows while its layers run."""

    step: Step | None
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Recorder:
    """Collects rows of forward calls; `trace` is what has been recorded so far.

    Padding is left out. A sequence gets a new number when a call starts with an empty key/value
    cache; later calls are taken to go on with the same sequences in the same order, unless they
    say whose rows they have (`Step.sequence_ids`). Layers that did not run in a call (another
    tower's) are unused in its rows.

    Args:
        spec: the model's MoE structure.
        tokenizer_id: the tokenizer's name; the model's if not given.
        sink: takes each forward call's rows; they are kept in memory if there is none.
        stop_tokens: a sequence ends where decoding feeds one of these; `generate` goes on feeding
            them to sequences that have ended while others of their batch have not.
    """

    def __init__(
        self,
        spec: MoESpec,
        tokenizer_id: str = "",
        *,
        sink: Callable[[RoutingTrace], None] | None = None,
        stop_tokens: Collection[int] = (),
    ) -> None:
        self._spec = spec
        self._tokenizer_id = tokenizer_id
        self._sink = sink
        self._stop_tokens = np.array(sorted(stop_tokens), np.int64)
        self._ended: set[int] = set()
        self.rows = 0
        self._open: _Rows | None = None
        self._parts: list[RoutingTrace] = []
        self._steps = 0
        self._numbers = SequenceNumbers()

    def __call__(
        self, position: int, index: torch.Tensor, weights: torch.Tensor, step: Step | None
    ) -> None:
        """Take in one layer's routing: `index [T, K]`, `weights [T, K]`."""
        current = self._open
        if current is None or current.step is not step or position in current.layers:
            # A layer may run again in one call, and then has rows of their own.
            self.flush(under_way=current is not None and current.step is step)
            current = self._open = _Rows(step)
        current.layers[position] = (
            index.detach().to("cpu", copy=True),
            weights.detach().to("cpu", torch.float32, copy=True),
        )

    def discard_step(self) -> None:
        """A forward call failed: its rows are not kept."""
        self._open = None

    def flush(self, *, under_way: bool = False) -> None:
        """Turn what the latest forward call has told into rows.

        Args:
            under_way: the call goes on. Otherwise one that has not ended well was cut off by
                Ctrl-C, of which nobody is told: layers are missing, and it leaves no rows.
        """
        rows, self._open = self._open, None
        step = None if rows is None else rows.step
        if step is not None and step.ended is False and not under_way:
            return
        if rows is not None and rows.layers:
            part = self._rows(rows)
            self.rows += len(part)
            if self._sink is None:
                self._parts.append(part)
            else:
                self._sink(part)

    @property
    def trace(self) -> RoutingTrace:
        """Everything recorded so far.

        Raises:
            TraceError: nothing has been recorded, or the rows went to a file.
        """
        self.flush()
        if self._sink is not None:
            raise TraceError("this recording goes to a file; read it with RoutingTrace.load")
        if not self._parts:
            raise TraceError("nothing was recorded: no MoE layer ran inside record(model)")
        if len(self._parts) > 1:
            self._parts = [RoutingTrace.concat(self._parts)]
        return self._parts[0]

    def _rows(self, rows: _Rows) -> RoutingTrace:
        spec = self._spec
        count = next(iter(rows.layers.values()))[0].shape[0]
        width = max(
            [layer.top_k for layer in spec.layers]
            + [index.shape[1] for index, _ in rows.layers.values()]
        )
        ids = np.full((count, len(spec.layers), width), UNUSED, np.uint16)
        weights = np.zeros(ids.shape, np.float16)
        for position, (index, weight) in rows.layers.items():
            chosen = index.numpy()
            valid = chosen < spec.layers[position].num_experts
            k = chosen.shape[1]
            ids[:, position, :k] = np.where(valid, chosen, UNUSED)
            weights[:, position, :k] = np.where(valid, weight.numpy(), 0)
        keep, columns = self._columns(rows.step, count)
        keep = self._not_ended(keep, columns)
        self._steps += 1
        return RoutingTrace(
            topk_ids=ids[keep],
            topk_weights=weights[keep],
            step_ids=np.full(int(keep.sum()), self._steps - 1, np.int32),
            layer_ids=spec.grid.layers,
            experts=spec.grid.experts,
            top_k=tuple(layer.top_k for layer in spec.layers) if self._fits(width) else (),
            model_id=spec.model_id,
            fingerprint=spec.fingerprint,
            tokenizer_id=self._tokenizer_id or spec.model_id,
            **{name: values[keep] for name, values in columns.items()},
        )

    def _not_ended(
        self, keep: NDArray[np.bool_], columns: dict[str, NDArray[Any]]
    ) -> NDArray[np.bool_]:
        """Rows to keep, without those of sequences that have ended."""
        if not len(self._stop_tokens) or columns["phase"][0] != DECODE:
            return keep
        stopped = np.isin(columns["token_ids"], self._stop_tokens) & keep
        self._ended.update(columns["sequence_ids"][stopped].tolist())
        return keep & ~np.isin(columns["sequence_ids"], list(self._ended))

    def _fits(self, width: int) -> bool:
        return all(layer.top_k <= width for layer in self._spec.layers)

    def _columns(
        self, step: Step | None, count: int
    ) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        if step is None:
            step = Step(rows=count, batch=1)
        if not step.past and step.sequence_ids is None:
            self._ended.clear()
        sequences = np.array(self._numbers.of(step)).repeat(count // max(step.batch, 1))
        tokens = np.full(count, -1) if step.token_ids is None else step.token_ids.to("cpu").numpy()
        keep = np.ones(count, np.bool_) if step.real is None else step.real.numpy()
        phase = DECODE if step.decode else PREFILL
        return keep, {
            "token_ids": tokens.astype(np.int32),
            "sequence_ids": sequences.astype(np.int32),
            "positions": step.positions().numpy().astype(np.int32),
            "phase": np.full(count, phase, np.uint8),
        }
