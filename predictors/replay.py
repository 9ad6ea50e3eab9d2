"""A routing trace as the calls that a predictor gets while a model runs.

Knows no predictor's insides and no figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from moe_runtime.predictors.base import Predictor, Probabilities, StepRows

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import DECODE, UNUSED, RoutingTrace

__all__ = ["Forecast", "as_decode", "chosen_experts", "put_together", "replay", "steps_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """What a predictor said about one layer of one step, and what came of it.

    Args:
        position: of the layer in `grid.layers`.
        distance: layers from the one observed last to this one; the first layer of a call has
            distance 1 at the call's beginning.
        rows: row numbers `[T]` in the trace.
        decode: the step decoded.
        probabilities: float32 `[T, E]`.
        topk_ids: int64 `[T, K]`, -1 where nothing was chosen.
    """

    position: int
    distance: int
    rows: IntArray
    decode: bool
    probabilities: Probabilities
    topk_ids: IntArray


def chosen_experts(trace: RoutingTrace, position: int) -> IntArray:
    """int64 `[N, K]` of a layer, -1 where nothing was chosen."""
    ids = trace.topk_ids[:, position].astype(np.int64)
    ids[ids == UNUSED] = -1
    return ids


def steps_of(trace: RoutingTrace) -> Iterator[tuple[StepRows, slice]]:
    """Each forward call: its rows as a predictor is told them, and where they stand."""
    starts: list[int] = np.flatnonzero(np.diff(trace.step_ids, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(trace)], strict=True):
        here = slice(start, stop)
        yield (
            StepRows(
                token_ids=trace.token_ids[here].astype(np.int64),
                sequence_ids=trace.sequence_ids[here].astype(np.int64),
                positions=trace.positions[here].astype(np.int64),
                decode=bool(trace.phase[start] == DECODE),
            ),
            here,
        )


def replay(
    predictor: Predictor,
    trace: RoutingTrace,
    lookahead: int = 1,
    hidden: Sequence[torch.Tensor] | None = None,
) -> Iterator[Forecast]:
    """Run a predictor over a trace from a fresh start and yield all that it forecasts.

    A layer is forecast from each of the up to `lookahead` layers before it, as they are observed.
    Layers in which a call chose nothing did not run: they are neither forecast nor observed.
    `hidden` are the experts' inputs, for each layer `[N, D]`, where they are known.

    Raises:
        PredictorError: the predictor needs hidden states, or tokens that the trace does not know,
            or gives something else than probabilities.
    """
    require_replayable(predictor, trace, hidden is not None)
    predictor.reset()
    chosen = [chosen_experts(trace, position) for position in range(len(trace.layer_ids))]
    for rows, here in steps_of(trace):
        predictor.begin_step(rows)
        ran = [at for at, ids in enumerate(chosen) if (ids[here] >= 0).any()]
        numbers = np.arange(here.start, here.stop)
        for place in range(-1, len(ran) - 1):
            if place >= 0:
                at = ran[place]
                predictor.observe(
                    at, chosen[at][here], None if hidden is None else hidden[at][here]
                )
            for distance, position in enumerate(ran[place + 1 : place + 1 + lookahead], start=1):
                yield Forecast(
                    position=position,
                    distance=distance,
                    rows=numbers,
                    decode=rows.decode,
                    probabilities=_checked(predictor, position, len(rows)),
                    topk_ids=chosen[position][here],
                )
        if ran:
            predictor.observe(ran[-1], chosen[ran[-1]][here])


def require_replayable(
    predictor: Predictor, trace: RoutingTrace, hidden_known: bool = False
) -> None:
    """PredictorError unless a trace holds what a predictor needs."""
    if predictor.needs_hidden and not hidden_known:
        raise PredictorError(
            f"a {predictor.name} predictor needs hidden states, which traces do not hold; measure "
            "it on a live model"
        )
    if predictor.needs_token_ids and len(trace) and (trace.token_ids < 0).all():
        raise PredictorError(
            f"a {predictor.name} predictor needs token ids, and the trace knows none; record one "
            "with moe_runtime.record, or use another kind"
        )
    if predictor.grid != trace.grid:
        raise PredictorError(
            f"the {predictor.name} predictor was made for layers {predictor.grid.layers} with "
            f"{predictor.grid.experts} experts, the trace has layers {trace.grid.layers} with "
            f"{trace.grid.experts}; use traces of the predictor's model"
        )


def as_decode(trace: RoutingTrace) -> RoutingTrace:
    """The same rows, each a forward call of its own, all decoded but each sequence's first."""
    order = np.lexsort((trace.positions, trace.sequence_ids))
    columns: dict[str, Any] = {n: column[order] for n, column in trace.columns().items()}
    columns["step_ids"] = np.arange(len(trace), dtype=np.int32)
    first = np.diff(columns["sequence_ids"], prepend=-1) != 0
    columns["phase"] = np.where(first, 0, DECODE).astype(np.uint8)
    return RoutingTrace(**columns, **trace.description())


def put_together(trace: RoutingTrace, batch_size: int) -> RoutingTrace:
    """As if `batch_size` sequences had run together: their calls side by side, one after another.

    Sequences are taken in the order of their numbers. Call number n of the batch holds call
    number n of each of its sequences that has that many; a call decodes if all of its rows do.
    """
    if batch_size < 1:
        raise PredictorError(f"a batch needs a sequence, found batch size {batch_size}")
    if not len(trace):
        return trace
    _, sequence = np.unique(trace.sequence_ids, return_inverse=True)
    call = _call_numbers(trace, sequence)
    batch = sequence // batch_size
    order = np.lexsort((trace.positions, sequence, call, batch))
    columns: dict[str, Any] = {n: column[order] for n, column in trace.columns().items()}
    new = (np.diff(call[order], prepend=-1) != 0) | (np.diff(batch[order], prepend=-1) != 0)
    columns["step_ids"] = (np.cumsum(new) - 1).astype(np.int32)
    starts = np.flatnonzero(new)
    phases = np.minimum.reduceat(columns["phase"], starts)
    columns["phase"] = np.repeat(phases, np.diff([*starts, len(trace)]))
    return replace(trace, **columns)


def _call_numbers(trace: RoutingTrace, sequence: IntArray) -> IntArray:
    """For each row which of its sequence's forward calls it is in, from 0."""
    result = np.zeros(len(trace), np.int64)
    for one in range(int(sequence.max()) + 1):
        mine = np.flatnonzero(sequence == one)
        steps = trace.step_ids[mine]
        result[mine] = np.cumsum(np.diff(steps, prepend=steps[0]) != 0)
    return result


def _checked(predictor: Predictor, position: int, rows: int) -> Probabilities:
    found = predictor.predict(position)
    shape = (rows, predictor.grid.experts[position])
    if found.shape != shape or not np.isfinite(found).all():
        raise PredictorError(
            f"the {predictor.name} predictor gave {found.shape} values for layer "
            f"{predictor.grid.layers[position]}, expected finite ones of shape {shape}; fit it "
            "again"
        )
    return found
