"""What every token was routed to on this rank, and all ranks' together as a trace.

Knows rows as they are told of; no models.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_runtime.model_spec import MoESpec
from moe_runtime.parallel.link import Link
from moe_runtime.trace import DECODE, PREFILL, UNUSED, RoutingTrace

__all__ = ["RoutingLog"]

RECORD = "record"


class RoutingLog:
    """Collects (prompt, place, layer) -> experts of the rows that this rank routes."""

    def __init__(self, spec: MoESpec) -> None:
        self._spec = spec
        self._table = torch.zeros(0, 5, dtype=torch.long)
        self._calls = 0
        self._columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._width = max(layer.top_k for layer in spec.layers)

    def place(self, rows: list[tuple[int, int, int]], decode: bool) -> None:
        """A call is to come; see `decode.Place`. Rows as `heard` numbers them."""
        named = torch.tensor(rows, dtype=torch.long).reshape(-1, 3)
        call = torch.tensor([self._calls, int(decode)]).expand(len(named), 2)
        self._table = torch.cat([call, named], 1)
        self._calls += 1  # all ranks make the same calls

    def heard(
        self, position: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Some rows of the call, by their place in what `place` told of."""
        table = self._table[rows.to("cpu")]
        count = len(table)
        where = torch.full((count, 1), position)
        padded = torch.full((count, self._width), -1, dtype=torch.long)
        padded[:, : ids.shape[1]] = ids.to("cpu")
        heavy = torch.zeros(count, self._width)
        heavy[:, : weights.shape[1]] = weights.to("cpu", torch.float32)
        self._columns.append((torch.cat([table, where], 1), padded, heavy))

    def gathered(self, link: Link) -> RoutingTrace:
        """All ranks' rows: in the order of calls, then of prompts and places."""
        empty = (
            torch.zeros(0, 6, dtype=torch.long),
            torch.zeros(0, self._width, dtype=torch.long),
            torch.zeros(0, self._width),
        )
        mine = [torch.cat(parts) for parts in zip(*self._columns, empty, strict=True)]
        sent = [one.to(link.device) for one in mine]
        names, ids, weights = (one.to("cpu") for one in link.gather(RECORD, None, sent))
        call, decode, prompt, place, token, position = names.unbind(1)
        keys = np.stack([one.numpy() for one in (call, prompt, place, decode)], 1)
        rows, where = np.unique(keys, axis=0, return_inverse=True)
        layers = len(self._spec.layers)
        topk = np.full((len(rows), layers, self._width), UNUSED, np.uint16)
        heavy = np.zeros((len(rows), layers, self._width), np.float32)
        tokens = np.zeros(len(rows), np.int32)
        where = where.reshape(-1)
        at = position.numpy()
        chosen = ids.numpy()
        topk[where, at] = np.where(chosen < 0, UNUSED, chosen).astype(np.uint16)
        heavy[where, at] = weights.numpy()
        # Traces keep 16 bits of a weight, in which two may be alike: the heaviest first.
        order = np.argsort(-heavy, axis=2, kind="stable")
        topk = np.take_along_axis(topk, order, 2)
        heavy = np.take_along_axis(heavy, order, 2)
        tokens[where] = token.numpy()
        return self._trace(rows, tokens, topk, heavy)

    def _trace(
        self, rows: np.ndarray, tokens: np.ndarray, topk: np.ndarray, heavy: np.ndarray
    ) -> RoutingTrace:
        spec = self._spec
        return RoutingTrace(
            topk_ids=topk,
            topk_weights=heavy.astype(np.float16),
            token_ids=tokens,
            sequence_ids=rows[:, 1].astype(np.int32),
            positions=rows[:, 2].astype(np.int32),
            phase=np.where(rows[:, 3] == 1, DECODE, PREFILL).astype(np.uint8),
            step_ids=rows[:, 0].astype(np.int32),
            layer_ids=spec.grid.layers,
            experts=spec.grid.experts,
            top_k=tuple(layer.top_k for layer in spec.layers),
            model_id=spec.model_id,
            fingerprint=spec.fingerprint,
            tokenizer_id=spec.model_id,
        )
