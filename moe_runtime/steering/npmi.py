"""Normalised pointwise mutual information of markers and experts, and the counts it is made from.

Knows arrays of routing; does not know tokens, files or what a marker means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.trace import UNUSED

__all__ = ["Tally", "npmi"]

_WAITING = 256  # sequences


def npmi(
    joint: ArrayLike,
    marked: ArrayLike,
    uses: ArrayLike,
    rows: ArrayLike,
    *,
    smoothing: float = 0.0,
) -> FloatArray:
    """Give nPMI of two events from counts: -1 never together, 0 independent, 1 only together.

    With p = count / rows: PMI = log2(p(x, y) / (p(x) p(y))) and nPMI = PMI / -log2 p(x, y), as
    RICE (arXiv 2505.14681, eq. 2 and 3) takes it from Bouma, "Normalized (pointwise) mutual
    information in collocation extraction" (GSCL 2009). Two limits: joint = 0 is -1, whatever the
    rest; joint = rows, where it is 0/0, is 1, the limit of two events that only come together.

    Args:
        joint: rows with both events; at most `marked` and `uses`.
        marked: rows with the one event, a marker.
        uses: rows with the other, an expert's choice.
        rows: all rows; at least the others.
        smoothing: so many marker rows are added that choose experts as all rows do. Without them
            there is a cliff: a pair that came together once may be near 0, one that never did is
            -1. Independent events stay at 0.

    Returns:
        float64, the arguments broadcast.
    """
    together, one, other, total = (
        np.asarray(values, np.float64) for values in (joint, marked, uses, rows)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        if smoothing:
            added = smoothing * np.nan_to_num(other / total)
            together, other = together + added, other + added
            one, total = one + smoothing, total + smoothing
        # Numerator and denominator are differences of logarithms of counts: no share underflows.
        mutual = (np.log2(together) + np.log2(total)) - (np.log2(one) + np.log2(other))
        value = mutual / (np.log2(total) - np.log2(together))
    value = np.where(together >= total, 1.0, value)
    value = np.where(together <= 0, -1.0, value)
    # A rounding error may lead past an end.
    result: FloatArray = np.clip(value, -1.0, 1.0)
    return result


class Tally:
    """Counts of rows, of each expert's uses, and of both among the rows of each marker.

    An entry counts once for its row: an expert that a damaged recording names twice in a row is
    one use. A layer counts the rows in which it ran. With `draws` everything is counted once more
    for each replicate of a bootstrap, sequences weighted as often as they were drawn.

    Args:
        grid: layers and experts.
        markers: number of markers.
        draws: `[B, S]`, how often each replicate has each sequence; None without bootstrap.
        smoothing: of `npmi`.
    """

    def __init__(
        self,
        grid: ExpertGrid,
        markers: int,
        draws: NDArray[np.uint16] | None = None,
        *,
        smoothing: float = 0.0,
    ) -> None:
        self._smoothing = smoothing
        self._grid = grid
        self._draws = draws
        self._offsets = np.asarray(grid.offsets, np.int64)
        self._layer = np.repeat(np.arange(len(grid.layers)), grid.experts)
        # Columns: the experts of all layers, then each layer's rows. Table 0 is of all rows.
        width = grid.size + len(grid.layers)
        self._width = width
        self._tables = np.zeros((markers + 1, width), np.int64)
        replicates = 0 if draws is None else len(draws)
        self._replicates = np.zeros((markers + 1, replicates, width), np.float64)
        # Counts by sequence, not in the replicates yet: few large products cost less than many.
        self._waiting: list[list[tuple[IntArray, IntArray]]] = [[] for _ in self._tables]

    def add(self, ids: NDArray[np.uint16], sequences: IntArray, marked: NDArray[np.bool_]) -> None:
        """Count a block of rows.

        Args:
            ids: `[n, L, K]`, the experts chosen; 65535 where there is none.
            sequences: `[n]`, number of each row's sequence, a column of `draws`.
            marked: `[M, n]`, whether the row ends each marker.
        """
        if not len(ids):
            return
        index = self._index(ids)
        if self._draws is None:
            known, places = np.zeros(1, np.int64), np.zeros(len(ids), np.int64)
        else:
            known, places = np.unique(sequences, return_inverse=True)
        for table, rows in enumerate([np.arange(len(ids)), *map(np.flatnonzero, marked)]):
            if not len(rows):
                continue
            counts = self._count(index[:, rows] if table else index, places[rows], len(known))
            self._tables[table] += counts.sum(axis=0)
            if self._draws is not None:
                there = np.unique(places[rows]) if table else slice(None)
                self._waiting[table].append((known[there], counts[there]))
                if sum(len(some) for some, _ in self._waiting[table]) >= _WAITING:
                    self._settle(table)

    def _settle(self, table: int) -> None:
        """Add what waits to the replicates."""
        waiting = self._waiting[table]
        if self._draws is not None and waiting:
            known = np.concatenate([some for some, _ in waiting])
            counts = np.concatenate([some for _, some in waiting]).astype(np.float64)
            # Sums of whole numbers far below 2^53: exact, in whatever order they are added.
            self._replicates[table] += self._draws[:, known].astype(np.float64) @ counts
            waiting.clear()

    def _index(self, ids: NDArray[np.uint16]) -> NDArray[Any]:
        """int64 `[K + 1, n, L]`: the column of each entry; the last is that of the layer's row.

        What counts nowhere has the column behind the last.
        """
        slots = np.array(np.moveaxis(ids, 2, 0), order="C")  # a copy, to be changed
        ran = (slots != UNUSED).any(axis=0)
        for late in range(1, len(slots)):
            for early in range(late):
                again = slots[late] == slots[early]
                if again.any():
                    slots[late][again] = UNUSED
        index = np.empty((len(slots) + 1, *ran.shape), np.int64)
        np.add(slots, self._offsets, out=index[:-1])
        np.putmask(index[:-1], slots == UNUSED, self._width)
        layers = self._grid.size + np.arange(ran.shape[1])
        index[-1] = np.where(ran, layers, self._width)
        return index

    def _count(self, index: NDArray[Any], places: IntArray, sequences: int) -> IntArray:
        """int64 `[sequences, columns]`: entries of each column in each sequence's rows."""
        width = self._width + 1
        flat = index if sequences == 1 else index + (places * width)[None, :, None]
        counts = np.bincount(flat.ravel(), minlength=sequences * width)
        return counts.reshape(sequences, width)[:, :-1]

    # -- what was counted; by marker [M, ...] where it says so, experts densely numbered ----------

    @property
    def uses(self) -> IntArray:
        """int64 `[experts]`: rows that chose each expert."""
        return self._tables[0, : self._grid.size]

    @property
    def joint(self) -> IntArray:
        """int64 `[M, experts]`: rows of each marker that chose each expert."""
        return self._tables[1:, : self._grid.size]

    @property
    def marked(self) -> IntArray:
        """int64 `[M, experts]`: rows of each marker in which the expert's layer ran."""
        return self._tables[1:, self._grid.size + self._layer]

    @property
    def replicates(self) -> int:
        """Replicates of the bootstrap."""
        return self._replicates.shape[1]

    def npmi(self) -> FloatArray:
        """float64 `[M, experts]`."""
        rows = self._tables[0, self._grid.size + self._layer]
        return npmi(self.joint, self.marked, self.uses, rows, smoothing=self._smoothing)

    def replicate(self, number: int) -> tuple[FloatArray, FloatArray]:
        """The nPMI and joint counts of one replicate, float64 `[M, experts]` each."""
        for place in range(len(self._tables)):
            self._settle(place)
        table = self._replicates[:, number]
        experts, layers = table[:, : self._grid.size], table[:, self._grid.size + self._layer]
        values = npmi(experts[1:], layers[1:], experts[0], layers[0], smoothing=self._smoothing)
        return values, experts[1:]
