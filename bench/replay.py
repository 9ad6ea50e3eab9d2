"""Owns replaying a recorded routing on a model with random weights, by hooks on its routers.

The experts that each token goes to are a real model's; what is computed with them is not. Knows
transformers' routers by structure (a module beside the experts that returns logits, weights and
indices) and no runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from torch import nn

from moe_runtime.core import IntArray
from moe_runtime.trace import RoutingTrace

__all__ = ["Oracle", "Replay"]


class Replay:
    """Makes a model's routers choose what a trace says.

    Set `rows` (indices into the trace, one a token in the order of the model's input) before each
    forward call.

    Args:
        device: where the model computes; the trace is copied there once.
    """

    def __init__(
        self, model: nn.Module, trace: RoutingTrace, device: torch.device | str = "cpu"
    ) -> None:
        # Layers first: what a layer gets is in one piece.
        ids = torch.from_numpy(trace.topk_ids.astype(np.int64))
        weights = torch.from_numpy(trace.topk_weights.astype(np.float32))
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
        self._ids = ids.transpose(0, 1).contiguous().to(device)
        self._weights = weights.transpose(0, 1).contiguous().to(device)
        self.rows = np.zeros(0, np.int64)
        routers = [
            getattr(parent, name)
            for parent in model.modules()
            if hasattr(parent, "experts")
            for name in ("gate", "router")
            if isinstance(getattr(parent, name, None), nn.Module)
        ]
        if len(routers) != len(trace.layer_ids):
            raise ValueError(
                f"{len(routers)} routers, but a trace of {len(trace.layer_ids)} layers"
            )
        self.handles = [
            router.register_forward_hook(self._hook(position))
            for position, router in enumerate(routers)
        ]

    @property
    def rows(self) -> IntArray:
        """The rows that the next forward call replays."""
        return self._rows

    @rows.setter
    def rows(self, rows: IntArray) -> None:
        self._rows = rows
        # One transfer a call, not one a layer.
        at = torch.from_numpy(np.ascontiguousarray(rows, np.int64)).to(self._ids.device)
        self._now = self._ids[:, at], self._weights[:, at]

    def _hook(self, position: int) -> Any:
        def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
            logits, weights, _ = output
            ids, chosen = self._now
            return logits, chosen[position].to(weights.dtype), ids[position]

        return replace


class Oracle:
    """The predictor that knows the replayed rows: what perfect prediction would be worth."""

    name: ClassVar[str] = "oracle"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, trace: RoutingTrace, replay: Sequence[Replay]) -> None:
        self.grid = trace.grid
        self._ids = trace.topk_ids.astype(np.int64)
        self._replay = replay  # filled once there is a model

    def begin_step(self, rows: StepRows) -> None:
        pass

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        pass

    def predict(self, position: int) -> Probabilities:
        chosen = self._ids[self._replay[0].rows, position]
        found = np.zeros((len(chosen), self.grid.experts[position]), np.float32)
        np.put_along_axis(found, chosen, 1.0, axis=1)
        return found

    def reset(self) -> None:
        pass
