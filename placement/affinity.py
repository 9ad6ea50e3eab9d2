"""`Affinity`: what a routing trace says about which experts follow and accompany each other.

Counts and nothing else: no devices, no plans. Source of the idea: ExFlow (arXiv 2401.08383),
conditional probabilities of consecutive MoE layers, here for top-k and aggregated, so that their
size does not grow with the trace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import PlanError, TraceError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["Affinity", "Support", "affinity_of", "repeated_tokens", "shuffled", "support_of"]

_CHUNK_CELLS = 1 << 24  # pairs of experts counted at once: bounds the memory of a long trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Affinity:
    """Counts over the tokens of a trace. L layers, E experts of a layer.

    A token that chose k experts in one layer and k' in the next makes k x k' pairs.

    Args:
        layer_ids: absolute index of each MoE layer, in order of execution.
        experts: experts of each layer.
        load: for each layer float64 `[E]`, uses of each expert.
        hops: for each lag h = 1, 2, ... the pairs between layer position s and s + h, for each s
            float64 `[E_s, E_(s+h)]`; empty if only counts were recorded.
        together: for each layer float64 `[E, E]`, symmetric with zero diagonal: tokens that chose
            both; empty likewise, or if they were not counted.
        tokens: tokens counted; 0 if unknown.
        top_k: experts a token in each layer; 0 if unknown.
        weighted: whether each use counted by the router's weight instead of one.
        model_id, fingerprint: of the model.
    """

    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    load: tuple[FloatArray, ...]
    hops: tuple[tuple[FloatArray, ...], ...] = ()
    together: tuple[FloatArray, ...] = ()
    tokens: int = 0
    top_k: tuple[int, ...] = ()
    weighted: bool = False
    model_id: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        grid = ExpertGrid(layers=self.layer_ids, experts=self.experts)  # checks both
        object.__setattr__(self, "top_k", tuple(self.top_k) or (0,) * len(grid.layers))
        for layer, count, load in zip(self.layer_ids, self.experts, self.load, strict=True):
            if load.shape != (count,):
                raise PlanError(f"layer {layer}: load has shape {load.shape} for {count} experts")
            if not np.isfinite(load).all() or (load < 0).any():
                expert = int(np.argmax(~np.isfinite(load) | (load < 0)))
                raise PlanError(
                    f"layer {layer} expert {expert}: a load must be a finite number, 0 or more, "
                    f"found {load[expert]}"
                )

    @property
    def transitions(self) -> tuple[FloatArray, ...]:
        """Pairs between consecutive MoE layers.

        Raises:
            PlanError: only counts were recorded, or there is a single layer.
        """
        if not self.hops:
            raise PlanError(
                "affinity needs routing per token in two MoE layers at least; this is "
                + ("one layer" if len(self.layer_ids) < 2 else "counts without tokens")
                + ": plan with --objective load, or record a trace (moe-runtime trace)"
            )
        return self.hops[0]

    @cached_property
    def pairs(self) -> float:
        """Pairs of consecutive layers, all together."""
        return float(sum(hop.sum() for hop in self.transitions))


def affinity_of(
    trace: RoutingTrace | RoutingCounts,
    *,
    weighted: bool = False,
    lags: int = 1,
    token_weights: FloatArray | None = None,
    within: bool = True,
) -> Affinity:
    """Count a trace; of counts without tokens only the load is known.

    Args:
        weighted: count each use by the router's weight.
        lags: count pairs of layers up to so many layers apart.
        token_weights: float64 `[N]`, how much each row counts; 1 if not given.
        within: count pairs inside each layer too (half of the time that counting takes).

    Raises:
        TraceError: no tokens, or weights that are not finite.
    """
    if isinstance(trace, RoutingCounts):
        return Affinity(
            layer_ids=trace.layer_ids,
            experts=trace.experts,
            load=tuple(np.asarray(count, dtype=np.float64) for count in trace.counts),
            top_k=trace.top_k,
            model_id=trace.model_id,
            fingerprint=trace.fingerprint,
        )
    if not len(trace):
        raise TraceError("the trace has no tokens; record or import more")
    uses = _router_weights(trace) if weighted else None
    rows = _row_weights(trace, token_weights)
    positions = range(len(trace.layer_ids))
    hops = tuple(
        tuple(
            _count_pairs(trace, s, s + lag, uses, rows) for s in positions if s + lag in positions
        )
        for lag in range(1, min(lags, len(positions) - 1) + 1)
    )
    together = []
    for s in positions if within else ():
        pairs = _count_pairs(trace, s, s, uses, rows)
        np.fill_diagonal(pairs, 0.0)
        together.append(pairs)
    return Affinity(
        layer_ids=trace.layer_ids,
        experts=trace.experts,
        load=tuple(_count_uses(trace, s, uses, rows) for s in positions),
        hops=hops,
        together=tuple(together),
        tokens=len(trace),
        top_k=trace.top_k,
        weighted=weighted,
        model_id=trace.model_id,
        fingerprint=trace.fingerprint,
    )


def _router_weights(trace: RoutingTrace) -> FloatArray:
    """float64 `[N, L, K]`: the router's weight of each use."""
    weights = trace.topk_weights.astype(np.float64)
    bad = ~np.isfinite(weights) | (weights < 0)
    if bad.any():
        row, at, _ = (int(i) for i in np.argwhere(bad)[0])
        raise TraceError(
            f"the router's weight in row {row}, layer {trace.layer_ids[at]} is "
            f"{weights[bad][0]}; count without weights, or record again"
        )
    if not weights.any():
        raise TraceError(
            "the recording has no routing weights (all are 0: its engine does not write them); "
            "count without weights"
        )
    return weights


def _row_weights(trace: RoutingTrace, token_weights: FloatArray | None) -> FloatArray | None:
    """float64 `[N]`: what each row counts; None if all count one."""
    if token_weights is not None and token_weights.shape != (len(trace),):
        raise PlanError(
            f"token_weights need one number for each of {len(trace)} rows, found shape "
            f"{token_weights.shape}"
        )
    return token_weights


def _count_uses(
    trace: RoutingTrace, position: int, uses: FloatArray | None, rows: FloatArray | None
) -> FloatArray:
    """float64 `[E]`."""
    ids = trace.topk_ids[:, position]
    chosen = ids != UNUSED
    weights = None if uses is None else uses[:, position]
    if rows is not None:
        weights = np.broadcast_to(rows[:, None], ids.shape) * (1.0 if weights is None else weights)
    counts = np.bincount(
        ids[chosen],
        None if weights is None else weights[chosen],
        minlength=trace.experts[position],
    )
    return counts.astype(np.float64)


def _count_pairs(
    trace: RoutingTrace,
    first: int,
    second: int,
    uses: FloatArray | None,
    row_weights: FloatArray | None,
) -> FloatArray:
    """float64 `[E_first, E_second]`: (expert, expert) pairs of all tokens."""
    rows, columns = trace.experts[first], trace.experts[second]
    total = np.zeros(rows * columns)
    width = trace.topk_ids.shape[2]
    step = max(1, _CHUNK_CELLS // (width * width))
    for start in range(0, len(trace), step):
        part = slice(start, start + step)
        a = trace.topk_ids[part, first].astype(np.int64)
        b = trace.topk_ids[part, second].astype(np.int64)
        cells = a[:, :, None] * columns + b[:, None, :]
        known = (a != UNUSED)[:, :, None] & (b != UNUSED)[:, None, :]
        weights = None
        if uses is not None:
            weights = uses[part, first, :, None] * uses[part, second, None, :]
        if row_weights is not None:  # once for a pair, whatever its uses weigh
            of_row = np.broadcast_to(row_weights[part, None, None], cells.shape)
            weights = of_row if weights is None else weights * of_row
        whole = bool(known.all())
        total += np.bincount(
            cells.ravel() if whole else cells[known],
            None if weights is None else weights.ravel() if whole else weights[known],
            minlength=rows * columns,
        )
    return total.reshape(rows, columns)


def repeated_tokens(trace: RoutingTrace) -> FloatArray:
    """float64 `[N]`: one over the root of how often the row's token occurs in the trace.

    A text repeats its own words; routing follows the word, so a short trace over-counts what it
    happened to be about. Rows without a token id (-1) count one.
    """
    _, inverse, counts = np.unique(trace.token_ids, return_inverse=True, return_counts=True)
    weights: FloatArray = counts[inverse].astype(np.float64) ** -0.5
    weights[trace.token_ids < 0] = 1.0
    return weights


def shuffled(trace: RoutingTrace, seed: int = 0) -> RoutingTrace:
    """The same trace with each layer's rows in another order: popularity stays, affinity goes.

    The control for what affinity is worth: a plan made from this one knows the load only.
    """
    rng = np.random.default_rng(seed)
    ids, weights = trace.topk_ids.copy(), trace.topk_weights.copy()
    for position in range(ids.shape[1]):
        order = rng.permutation(len(trace))
        ids[:, position] = ids[order, position]
        weights[:, position] = weights[order, position]
    return replace(trace, topk_ids=ids, topk_weights=weights)


@dataclass(frozen=True, kw_only=True)
class Support:
    """How far the counts can be trusted.

    Args:
        tokens: tokens counted.
        sequences: sequences that they came from.
        pairs_a_cell: mean number of pairs behind a cell of a transition matrix.
        excess: mean over hops of the share of pairs beyond what popularity alone gives (total
            variation between the transitions and the product of their margins), 0 to 1.
        excess_shuffled: the same on the shuffled control: what noise alone gives.
        interval: 95 % bootstrap interval of `excess` over sequences (over blocks of 32 rows where
            there are fewer than 8 sequences), moved by the bootstrap's own bias: drawing rows twice
            looks like affinity.
    """

    tokens: int
    sequences: int
    pairs_a_cell: float
    excess: float
    excess_shuffled: float
    interval: tuple[float, float]


def support_of(trace: RoutingTrace, *, seed: int = 0, samples: int = 40) -> Support:
    """Measure how much affinity a trace carries and how sure that is.

    At most 8,000 rows and 12 pairs of layers are used, evenly spread: the figures settle before.
    """
    if len(trace.layer_ids) < 2 or not len(trace):
        raise PlanError("affinity needs tokens in two MoE layers at least; record more")
    rows = np.unique(np.linspace(0, len(trace) - 1, min(len(trace), 8_000)).astype(np.int64))
    small = trace.select(rows=rows)
    groups = _groups(small)
    drawn_from = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        drawn = np.bincount(rng.integers(drawn_from, size=drawn_from), minlength=drawn_from)
        values.append(_excess(small, drawn[groups].astype(np.float64)))
    excess = _excess(small)
    low, high = np.quantile(values, [0.025, 0.975]) - (np.mean(values) - excess)
    used = (trace.topk_ids != UNUSED).sum(2, dtype=np.int64)
    pairs = int((used[:, :-1] * used[:, 1:]).sum())
    cells = sum(a * b for a, b in zip(trace.experts[:-1], trace.experts[1:], strict=True))
    return Support(
        tokens=len(trace),
        sequences=len(np.unique(trace.sequence_ids)),
        pairs_a_cell=pairs / cells,
        excess=excess,
        excess_shuffled=_excess(shuffled(small, seed)),
        interval=(float(max(low, 0.0)), float(min(high, 1.0))),
    )


def _groups(trace: RoutingTrace) -> IntArray:
    """int64 `[N]`: the unit that each row is drawn with in a bootstrap."""
    _, groups = np.unique(trace.sequence_ids, return_inverse=True)
    if groups.max(initial=0) + 1 < 8:
        groups = np.arange(len(trace)) // 32
    return np.asarray(groups, dtype=np.int64)


def _excess(trace: RoutingTrace, token_weights: FloatArray | None = None) -> float:
    """Mean over pairs of layers of the total variation between pairs and their margins' product."""
    last = len(trace.layer_ids) - 2
    values = []
    for s in np.unique(np.linspace(0, last, min(last + 1, 12)).astype(np.int64)).tolist():
        hop = _count_pairs(trace, s, s + 1, None, token_weights)
        if hop.sum() > 0:
            joint = hop / hop.sum()
            free = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
            values.append(0.5 * float(np.abs(joint - free).sum()))
    return float(np.mean(values)) if values else 0.0
