"""Measuring predictors on held-out traces: recall, precision, calibration, cost.

Knows the predictor protocol and traces; knows no command and draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from moe_runtime.predictors.base import Predictor, Probabilities
from moe_runtime.predictors.evaluation import Domain, Evaluation, Figures, PerLayer, Score, Settings
from moe_runtime.predictors.history import multi_hot
from moe_runtime.predictors.origin import Origin, require_held_out
from moe_runtime.predictors.replay import (
    Forecast,
    as_decode,
    put_together,
    replay,
    require_replayable,
)
from moe_runtime.predictors.timing import microseconds
from moe_runtime.predictors.traces import joined
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace
from moe_runtime.trace_summary import summarize

__all__ = ["evaluate"]

BINS = 20
COLUMNS = ("recall_k", "precision_k", "recall_2k", "precision_2k", "experts")


def evaluate(
    predictors: Mapping[str, Predictor],
    domains: Mapping[str, Sequence[RoutingTrace]],
    settings: Settings | None = None,
    *,
    allow_fitted: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Measure predictors on traces of their model, each learning on as it would in a run.

    Args:
        predictors: by the name that the result calls them.
        domains: by name the traces of one kind of text each.
        settings: batch sizes, lookahead and so on.
        allow_fitted: measure also on rows that a predictor was fitted to; the result says so.
        progress: is told what is measured next.

    Raises:
        PredictorError: nothing to measure, traces that were fitted to, or predictors that need
            what the traces do not hold.
        TraceError: traces of different models.
    """
    settings = settings or Settings()
    if not predictors or not any(len(t) for traces in domains.values() for t in traces):
        raise PredictorError(
            f"nothing to evaluate: {len(predictors)} predictors, {len(domains)} domains with "
            "traces; name a predictor and a trace with rows"
        )
    first = next(t for traces in domains.values() for t in traces)
    held_out = _require_fit(predictors, domains, first, allow_fitted)
    made = {name: _rows(traces, settings) for name, traces in domains.items()}
    figures = []
    for domain, trace in made.items():
        for name, predictor in predictors.items():
            progress(f"{name} on {domain}")
            figures.append(_measure(name, predictor, domain, trace, settings))
    return Evaluation(
        model_id=first.model_id,
        fingerprint=first.fingerprint,
        layer_ids=first.layer_ids,
        experts=first.experts,
        top_k=first.top_k,
        settings=settings,
        domains=tuple(_domain(name, trace) for name, trace in made.items()),
        figures=tuple(figures),
        held_out=held_out,
    )


def _require_fit(
    predictors: Mapping[str, Predictor],
    domains: Mapping[str, Sequence[RoutingTrace]],
    first: RoutingTrace,
    allow_fitted: bool,
) -> bool:
    """Whether all traces are held out; an error unless each fits each predictor."""
    held_out = True
    for domain, traces in domains.items():
        for number, trace in enumerate(traces):
            name = f"{domain}, trace {number}"
            trace.require_like(first, name)
            for predictor in predictors.values():
                require_replayable(predictor, trace)
                origin = getattr(predictor, "origin", None)
                if not isinstance(origin, Origin):
                    continue
                origin.require_trace(trace, name)
                try:
                    require_held_out(origin, trace, name)
                except PredictorError:
                    if not allow_fitted:
                        raise
                    held_out = False
    return held_out


def _rows(traces: Sequence[RoutingTrace], settings: Settings) -> RoutingTrace:
    trace = joined(traces)
    if settings.token_by_token:
        trace = as_decode(trace)
    if settings.max_tokens and len(trace) > settings.max_tokens:
        last = trace.step_ids[settings.max_tokens]
        whole = trace.step_ids < last  # a call is not cut, unless it is the only one
        trace = trace.select(rows=whole) if whole.any() else trace[: settings.max_tokens]
    return trace


def _domain(name: str, trace: RoutingTrace) -> Domain:
    summary = summarize(trace)
    return Domain(
        name=name,
        tokens=summary.tokens,
        decoded=summary.decoded_tokens,
        sequences=summary.sequences,
        entropy=tuple(round(value, 6) for value in summary.entropy),
    )


def _measure(
    name: str, predictor: Predictor, domain: str, trace: RoutingTrace, settings: Settings
) -> Figures:
    reliability = _Reliability()
    scores: list[Score] = []
    for batch_size in settings.batch_sizes:
        sums = _Sums(trace, batch_size)
        for one in replay(predictor, put_together(trace, batch_size), settings.lookahead):
            sums.add(one)
            if batch_size == settings.batch_sizes[0] and one.distance == 1:
                reliability.add(one, trace.top_k[one.position])
        scores.extend(sums.scores())
    return Figures(
        predictor=name,
        domain=domain,
        microseconds=microseconds(predictor, trace),
        calibration_error=reliability.error(0),
        calibration_error_top=reliability.error(1),
        said=reliability.said(),
        came_true=reliability.came_true(),
        count=reliability.used(),
        scores=tuple(scores),
    )


def likeliest(probabilities: Probabilities, count: int) -> IntArray:
    """int64 `[T, count]`: the likeliest experts of each row, likeliest first, lowest first."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]


class _Sums:
    """Sums of recall and precision for each phase, distance and layer at one batch size."""

    def __init__(self, trace: RoutingTrace, batch_size: int) -> None:
        self._top_k, self._experts = trace.top_k, trace.experts
        self._batch_size = batch_size
        self._sums: dict[tuple[str, int], FloatArray] = {}
        self._counts: dict[tuple[str, int], IntArray] = {}

    def add(self, one: Forecast) -> None:
        """Take in a forecast; rows that fill no batch are left out, but for a lone one's."""
        rows, size = len(one.topk_ids), self._batch_size
        batches = rows // size
        k, experts = self._top_k[one.position], self._experts[one.position]
        if not batches or not k:
            return
        key = ("decode" if one.decode else "prefill", one.distance)
        layers = len(self._experts)
        sums = self._sums.setdefault(key, np.zeros((layers, len(COLUMNS))))
        counts = self._counts.setdefault(key, np.zeros(layers, np.int64))
        order = likeliest(one.probabilities, min(2 * k, experts))

        def union(ids: IntArray) -> NDArray[np.bool_]:
            hot = multi_hot(ids[: batches * size], experts) > 0
            return np.asarray(hot.reshape(batches, size, experts).any(axis=1))

        truth = union(one.topk_ids)
        ran = truth.any(axis=1)
        size_of = np.maximum(truth.sum(axis=1), 1)
        columns = []
        for ids in (order[:, :k], order):
            said = union(ids)
            both = (said & truth).sum(axis=1)
            columns += [both / size_of, both / said.sum(axis=1)]
        table = np.stack([*columns, size_of], axis=1)
        sums[one.position] += table[ran].sum(axis=0)
        counts[one.position] += int(ran.sum())

    def scores(self) -> list[Score]:
        """One for each phase and distance that was seen."""
        result = []
        for key in sorted(self._sums):
            counts = self._counts[key]
            columns: dict[str, PerLayer] = {
                name: tuple(
                    round(float(self._sums[key][at, column] / counts[at]), 6)
                    if counts[at]
                    else None
                    for at in range(len(counts))
                )
                for column, name in enumerate(COLUMNS)
            }
            result.append(
                Score(
                    phase=key[0],
                    batch_size=self._batch_size,
                    distance=key[1],
                    batches=int(counts.max()),
                    **columns,
                )
            )
        return result


class _Reliability:
    """What was said and what came true, in bins; of all forecasts, and of each row's likeliest."""

    def __init__(self) -> None:
        self._bins = np.zeros((2, 3, BINS))  # all or likeliest; count, said, came true

    def add(self, one: Forecast, k: int) -> None:
        """Take in a forecast."""
        truth = multi_hot(one.topk_ids, one.probabilities.shape[1])
        top = likeliest(one.probabilities, min(2 * k, truth.shape[1]))
        said = (one.probabilities, np.take_along_axis(one.probabilities, top, 1))
        came = (truth, np.take_along_axis(truth, top, 1))
        for which in (0, 1):
            p, y = said[which].ravel(), came[which].ravel()
            at = np.clip((p * BINS).astype(np.int64), 0, BINS - 1)
            for row, weights in enumerate((None, p, y)):
                self._bins[which, row] += np.bincount(at, weights, BINS)

    def error(self, which: int) -> float:
        """Expected calibration error."""
        count, said, came = self._bins[which]
        return round(float(np.abs(said - came).sum() / max(count.sum(), 1)), 6)

    def used(self) -> tuple[int, ...]:
        """Forecasts in each bin that has any."""
        count = self._bins[0, 0]
        return tuple(int(n) for n in count[count > 0])

    def said(self) -> tuple[float, ...]:
        """Mean probability in these bins."""
        return self._means(1)

    def came_true(self) -> tuple[float, ...]:
        """Share that came true in these bins."""
        return self._means(2)

    def _means(self, row: int) -> tuple[float, ...]:
        count = self._bins[0, 0]
        means = self._bins[0, row][count > 0] / count[count > 0]
        return tuple(round(float(value), 6) for value in means)
