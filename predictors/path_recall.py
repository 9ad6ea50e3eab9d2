"""Recall and precision of forecast paths, and the token-id table as logits.

Knows arrays; knows no network and no trace.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, FloatArray
from moe_runtime.trace import UNUSED

__all__ = ["PathRecall", "RecallSum", "table_logits"]

FLOOR = 1e-4  # least probability that a table gives: no expert is impossible


@dataclass(frozen=True, kw_only=True)
class PathRecall:
    """How much of the routing was among the likeliest experts; each layer counts alike.

    Args:
        recall_k, recall_2k: share of the chosen experts among the k, the 2k likeliest.
        precision_k, precision_2k: share of these k, 2k that were chosen.
        by_layer: recall at 2k of each layer.
        rows: tokens that were measured.
    """

    recall_k: float
    recall_2k: float
    precision_k: float
    precision_2k: float
    by_layer: tuple[float, ...]
    rows: int


class RecallSum:
    """Counts hits over rows that come in parts.

    Args:
        top_k: experts chosen in each layer.
    """

    def __init__(self, grid: ExpertGrid, top_k: tuple[int, ...]) -> None:
        self._grid, self._top_k = grid, top_k
        self._hits = np.zeros((2, len(grid.layers)))
        self._chosen = np.zeros(len(grid.layers))
        self._ranked = np.zeros((2, len(grid.layers)))
        self.rows = 0

    def add(self, logits: NDArray[np.floating], topk_ids: NDArray[np.uint16]) -> None:
        """Rows' logits (or probabilities) `[N, G]` and routing `[N, L, K]`. Mutates."""
        self.rows += len(logits)
        for at, (offset, count) in enumerate(
            zip(self._grid.offsets, self._grid.experts, strict=True)
        ):
            ids = topk_ids[:, at].astype(np.int64)
            routed = (ids != UNUSED).any(axis=1)
            hot = np.zeros((int(routed.sum()), count + 1), np.bool_)
            np.put_along_axis(hot, np.where(ids == UNUSED, count, ids)[routed], True, axis=1)
            hot = hot[:, :count]
            # Stable, so that equal logits are ranked alike everywhere.
            order = np.argsort(-logits[routed, offset : offset + count], axis=1, kind="stable")
            self._chosen[at] += hot.sum()
            for which, factor in enumerate((1, 2)):
                first = order[:, : factor * self._top_k[at]]
                self._hits[which, at] += np.take_along_axis(hot, first, axis=1).sum()
                self._ranked[which, at] += first.size

    def result(self) -> PathRecall:
        """The shares; layers without routing left out."""
        used = self._chosen > 0
        if not used.any():
            return PathRecall(
                recall_k=0.0, recall_2k=0.0, precision_k=0.0, precision_2k=0.0, by_layer=(), rows=0
            )
        recall = self._hits[:, used] / self._chosen[used]
        precision = (self._hits[:, used] / self._ranked[:, used]).mean(axis=1)
        return PathRecall(
            recall_k=float(recall[0].mean()),
            recall_2k=float(recall[1].mean()),
            precision_k=float(precision[0]),
            precision_2k=float(precision[1]),
            by_layer=tuple(recall[1].round(5).tolist()),
            rows=self.rows,
        )


def table_logits(
    counts: FloatArray, rows: FloatArray, grid: ExpertGrid, strength: float = 2.0
) -> FloatArray:
    """Log odds of each expert for each token, smoothed by popularity: the token-id table.

    Args:
        counts: `[V, G]`, how often each token chose each expert.
        rows: `[V, L]`, how often each layer routed each token.
        strength: what popularity weighs, in tokens.

    Returns:
        `[V + 1, G]`; the last row is popularity itself, for unknown tokens.
    """
    layer = np.repeat(np.arange(len(grid.layers)), grid.experts)
    popular = counts.sum(axis=0) / np.maximum(rows.sum(axis=0)[layer], 1.0)
    shares = (counts + strength * popular) / (rows[:, layer] + strength)
    shares = np.vstack([shares, popular]).clip(FLOOR, 1 - FLOOR)
    logits: FloatArray = np.log(shares / (1 - shares))
    return logits
