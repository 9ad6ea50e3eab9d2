"""A table by token id: a token tends to be routed as the same token was before.

Knows neither what came before a token nor what other layers chose.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from moe_runtime.predictors.base import StepRows
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.fitted import Constants, FittedPredictor, positive
from moe_runtime.predictors.frequency import popularity, take_popularity
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.rates import Rates
from moe_runtime.predictors.replay import chosen_experts
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["TokenTablePredictor"]

KEPT_BYTES = 64 * 2**20  # of a run's own counts; tokens not seen for longest are forgotten
STRENGTHS = tuple(
    {"strength": 256.0, "token_strength": token} for token in (0.25, 0.5, 1.0, 2.0, 4.0)
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """Counts by layer and token, without the zeros.

    Args:
        tokens: int64 `[V]`, ascending token ids that were seen.
        seen: int64 `[V]`, how often.
        starts: int64 `[L * V + 1]`: entries of layer l and token v are `starts[l * V + v]` to the
            next of `starts`.
        experts: int32 `[entries]`.
        counts: int32 `[entries]`.
    """

    tokens: IntArray
    seen: IntArray
    starts: IntArray
    experts: NDArray[np.int32]
    counts: NDArray[np.int32]

    def add_to(self, row: NDArray[np.float64], position: int, token: int) -> int:
        """Add a token's counts at a layer to `[E]`; how often the token was seen."""
        at = int(np.searchsorted(self.tokens, token))
        if at == len(self.tokens) or self.tokens[at] != token:
            return 0
        start, stop = self.starts[position * len(self.tokens) + at :][:2]
        row[self.experts[start:stop]] += self.counts[start:stop]
        return int(self.seen[at])


class TokenTablePredictor(FittedPredictor):
    """Share of a token's occurrences that chose each expert, drawn to popularity when few."""

    name: ClassVar[str] = "token table"
    kind: ClassVar[str] = "token-table"
    needs_token_ids: ClassVar[bool] = True
    candidates: ClassVar[tuple[dict[str, Any], ...]] = STRENGTHS

    def __init__(
        self, origin: Origin, constants: Constants, shares: Sequence[NDArray[Any]], table: _Table
    ) -> None:
        super().__init__(origin, constants)
        self._popularity = Rates(shares, [positive(constants, "strength")] * len(shares))
        self._strength = positive(constants, "token_strength")
        self._table = table
        # A token's experts in this run; the last entry of a layer's row counts the token.
        self._run: OrderedDict[int, dict[int, NDArray[np.float64]]] = OrderedDict()
        self._kept = max(16, KEPT_BYTES // (8 * (origin.grid.size + len(shares))))
        self._tokens: tuple[IntArray, IntArray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        return cls(origin, constants, popularity(origin, trace), _table_of(origin, trace))

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`."""
        super().begin_step(rows)
        self._tokens = np.unique(rows.token_ids, return_inverse=True)
        for token in self._tokens[0].tolist():
            if token in self._run:
                self._run.move_to_end(token)
        while len(self._run) > self._kept:
            self._run.popitem(last=False)

    def learn(self, position: int, topk_ids: IntArray) -> None:
        """See `FittedPredictor`."""
        now = self.rows_hot(position, topk_ids)
        self._popularity.count(position, now.sum(axis=0), len(now))
        experts = self.grid.experts[position]
        for row, token in enumerate(self.history.rows.token_ids.tolist()):
            if token >= 0:
                layers = self._run.setdefault(token, {})
                counts = layers.setdefault(position, np.zeros(experts + 1))
                counts[:experts] += now[row]
                counts[experts] += 1

    def forget(self) -> None:
        """See `FittedPredictor`."""
        self._popularity.reset()
        self._run.clear()

    def score(self, position: int) -> NDArray[Any]:
        """See `FittedPredictor`."""
        tokens, of_row = self._tokens
        experts = self.grid.experts[position]
        counts = np.zeros((len(tokens), experts))
        seen = np.zeros((len(tokens), 1))
        for at, token in enumerate(tokens.tolist()):
            if token < 0:
                continue
            seen[at] = self._table.add_to(counts[at], position, token)
            run = self._run.get(token, {}).get(position)
            if run is not None:
                counts[at] += run[:experts]
                seen[at] += run[experts]
        prior = self._popularity.of(position)
        result: NDArray[Any] = ((counts + self._strength * prior) / (seen + self._strength))[of_row]
        return result

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """See `FittedPredictor`."""
        table = self._table
        return {
            "popularity": np.concatenate(self._popularity.prior).astype(np.float32),
            "tokens": table.tokens,
            "seen": table.seen,
            "starts": table.starts,
            "experts": table.experts,
            "counts": table.counts,
        }

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        tokens = take_array(arrays, "tokens", (None,), np.int64)
        seen = take_array(arrays, "seen", (len(tokens),), np.int64)
        layers = len(origin.layer_ids)
        starts = take_array(arrays, "starts", (layers * len(tokens) + 1,), np.int64)
        experts = take_array(arrays, "experts", (None,), np.int32)
        counts = take_array(arrays, "counts", (len(experts),), np.int32)
        ordered = (np.diff(tokens) > 0).all() and (np.diff(starts) >= 0).all()
        if not ordered or starts[0] != 0 or starts[-1] != len(experts):
            raise PredictorError("the token table's tokens or starts are out of order")
        limits = np.repeat(origin.experts, np.diff(starts[:: max(len(tokens), 1)]))
        if len(tokens) and ((experts < 0).any() or (experts >= limits).any()):
            raise PredictorError("the token table names experts that the model does not have")
        if (counts < 1).any() or (seen < 1).any():
            raise PredictorError("the token table's counts must be above 0")
        table = _Table(tokens=tokens, seen=seen, starts=starts, experts=experts, counts=counts)
        return cls(origin, constants, take_popularity(origin, arrays), table)


def _table_of(origin: Origin, trace: RoutingTrace | None) -> _Table:
    """Counts of a trace; of None an empty table."""
    ids = np.zeros(0, np.int64) if trace is None else trace.token_ids.astype(np.int64)
    tokens, at, seen = np.unique(ids, return_inverse=True, return_counts=True)
    experts, counts, lengths = [], [], []
    for position, count in enumerate(origin.experts):
        if trace is None:
            continue
        chosen = chosen_experts(trace, position)
        cells, times = np.unique((at[:, None] * count + chosen)[chosen >= 0], return_counts=True)
        experts.append(cells % count)
        counts.append(times)
        lengths.append(np.bincount(cells // count, minlength=len(tokens)))
    none = np.zeros(0, np.int64)
    return _Table(
        tokens=tokens,
        seen=seen.astype(np.int64),
        starts=np.concatenate([[0], np.cumsum(np.concatenate([none, *lengths]))]).astype(np.int64),
        experts=np.concatenate([none, *experts]).astype(np.int32),
        counts=np.concatenate([none, *counts]).astype(np.int32),
    )
