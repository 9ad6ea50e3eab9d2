"""`Origin`: which model a predictor was made for, and which rows it was fitted to.

Knows no predictor and no file form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["Hashes", "Origin", "require_held_out", "row_hashes"]

Hashes: TypeAlias = NDArray[np.uint64]

KEPT_ROWS = 65_536  # hashes that an origin keeps: the smallest, a uniform sample of the rows
JUDGED_ROWS = 6  # of a sequence that a sample must speak of to be believed
SEEN_SHARE = 0.5  # a sequence with more of its rows among those is not held out


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """What a predictor was made for and from.

    Args:
        layer_ids: absolute index of each MoE layer, in order of execution.
        experts: routed experts of each of these layers.
        top_k: experts chosen for a token in each of these layers.
        model_id, fingerprint, tokenizer_id: the model, as in its traces; "" if unknown.
        fitted_on: hashes of the rows that it was fitted to, ascending; of many a sample.
        figures: what was measured on rows that it was not fitted to; plain data, may be empty.

    Raises:
        PredictorError: the layers are no layers of a model.
    """

    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    model_id: str = ""
    fingerprint: str = ""
    tokenizer_id: str = ""
    fitted_on: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = len(self.layer_ids)
        if not layers or len(self.experts) != layers or len(self.top_k) != layers:
            raise PredictorError(
                f"a predictor needs layers, and experts and top_k for each; found {layers} "
                f"layer_ids, {len(self.experts)} experts, {len(self.top_k)} top_k"
            )
        if len(set(self.layer_ids)) != layers:
            raise PredictorError(f"layer_ids must be distinct, found {self.layer_ids}")
        for layer, count, k in zip(self.layer_ids, self.experts, self.top_k, strict=True):
            if count < 1 or not 0 <= k <= count:
                raise PredictorError(
                    f"layer {layer} has {count} experts and top_k {k}; there must be an expert, "
                    "and no more chosen than there are"
                )

    @cached_property
    def grid(self) -> ExpertGrid:
        """The dense numbering of the experts of these layers."""
        return ExpertGrid(layers=self.layer_ids, experts=self.experts)

    @classmethod
    def of(cls, traces: Sequence[RoutingTrace]) -> Origin:
        """Of a predictor that is fitted to these traces.

        Raises:
            PredictorError: no traces, or traces without rows.
            TraceError: traces of different models or layers.
        """
        rows = sum(len(trace) for trace in traces)
        if not rows:
            raise PredictorError(
                f"nothing to fit a predictor to: {len(traces)} traces with {rows} rows; record "
                "some text with the model"
            )
        first = traces[0]
        for number, trace in enumerate(traces):
            trace.require_like(first, f"trace {number}")
        hashes = np.unique(np.concatenate([row_hashes(trace) for trace in traces]))
        return cls(**first.description(), fitted_on=hashes[:KEPT_ROWS])

    @classmethod
    def empty(cls, trace: RoutingTrace) -> Origin:
        """Of a predictor for the trace's model that is fitted to nothing."""
        return cls(**trace.description())

    def require_trace(self, trace: RoutingTrace, name: str = "the trace") -> None:
        """PredictorError unless a trace has this origin's layers, experts and top-k, and is of its
        model where both are known.
        """
        for what in ("layer_ids", "experts", "top_k"):
            if getattr(trace, what) != getattr(self, what):
                raise PredictorError(
                    f"{name} has {what} {getattr(trace, what)}, the predictor was made for "
                    f"{getattr(self, what)}; use a predictor of the same model"
                )
        if self.fingerprint and trace.fingerprint and trace.fingerprint != self.fingerprint:
            raise PredictorError(
                f"{name} is of a model with fingerprint {trace.fingerprint!r}, the predictor of "
                f"one with {self.fingerprint!r}; use a predictor of the same model"
            )


def row_hashes(trace: RoutingTrace) -> Hashes:
    """uint64 `[N]`: a hash of each row's token, position and experts."""
    ids = np.ascontiguousarray(trace.topk_ids)
    rows = zip(trace.token_ids.tolist(), trace.positions.tolist(), ids, strict=True)
    digests = [
        hashlib.blake2b(f"{token} {place} ".encode() + chosen.tobytes(), digest_size=8).digest()
        for token, place, chosen in rows
    ]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def require_held_out(origin: Origin, trace: RoutingTrace, name: str = "the trace") -> None:
    """PredictorError if a sequence of the trace was among what the predictor was fitted to.

    Rows, not files, are compared, so a part of a trace is recognised. A shared beginning (a chat
    template gives the same rows to all sequences) is allowed: half a sequence has to be known.
    """
    known = origin.fitted_on
    if not len(known) or not len(trace):
        return
    hashes = row_hashes(trace)
    # A full sample says nothing about hashes above its greatest, and of a short sequence it may
    # hold one row, which says nothing where beginnings are shared.
    sampled = len(known) >= KEPT_ROWS
    judged = hashes <= known[-1] if sampled else np.ones(len(hashes), np.bool_)
    least = JUDGED_ROWS if sampled else 1
    seen = np.isin(hashes, known)
    for sequence in np.unique(trace.sequence_ids).tolist():
        mine = (trace.sequence_ids == sequence) & judged
        if mine.sum() >= least and seen[mine].mean() > SEEN_SHARE:
            raise PredictorError(
                f"{name}: {seen[mine].mean():.0%} of the rows of sequence {sequence} are among "
                "those that the predictor was fitted to, so figures would flatter it; give a "
                "trace of other text"
            )
