"""Recordings of one model opened together: which of their rows count, and where the markers are.

Knows the short columns of traces; does not read routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import TraceError
from moe_runtime.steering.markers import Marker, near_tokens, occurrences
from moe_runtime.trace import DECODE, PathLike, RoutingTrace
from moe_runtime.trace_reader import TraceReader

__all__ = ["Counted", "counted_rows", "open_recordings"]

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Counted:
    """The rows of all recordings, one recording after another.

    Args:
        keep: `[N]`, whether the row counts.
        sequence: int64 `[N]`, number of the row's sequence among those with rows that count; of
            other rows 0.
        sequences: how many there are.
        marked: `[M, N]`, whether a row that counts ends each marker.
        with_marker: `[M, sequences]`, whether each sequence has such a row.
        unknown: rows left out because their token is not known.
    """

    keep: BoolArray
    sequence: IntArray
    sequences: int
    marked: BoolArray
    with_marker: BoolArray
    unknown: int


def open_recordings(
    trace: RoutingTrace | PathLike | Sequence[RoutingTrace | PathLike],
    *,
    fingerprint: str = "",
    tokenizer: Any = None,
) -> list[TraceReader]:
    """Readers of one or more recordings of one model.

    Args:
        trace: what to read.
        fingerprint: of the model that is meant; "" if that does not matter.
        tokenizer: of the model; token ids that it does not have are refused.

    Raises:
        TraceError: none, a damaged one, recordings of different models, one of another model or
            tokenizer, or one without token ids; names it.
    """
    given = (
        [trace] if isinstance(trace, RoutingTrace | str) or hasattr(trace, "__fspath__") else trace
    )
    readers = [TraceReader(one) for one in given]
    if not readers:
        raise TraceError("no recordings: give one trace at least")
    for number, reader in enumerate(readers):
        if not reader.grid.size:
            raise TraceError(f"{reader.name}: has no MoE layers, so no experts to rank")
        name = reader.name if len(readers) == 1 else f"{reader.name} (number {number + 1})"
        _require_model(reader, readers[0], fingerprint, name)
        _require_tokens(reader, tokenizer, name)
    return readers


def _require_model(reader: TraceReader, first: TraceReader, fingerprint: str, name: str) -> None:
    like = reader.like
    if fingerprint and like.fingerprint and like.fingerprint != fingerprint:
        raise TraceError(
            f"{name}: recorded of {like.model_id or 'a model'} with fingerprint "
            f"{like.fingerprint}, the model at hand has {fingerprint}; record this model"
        )
    theirs = first.like
    if like.fingerprint and theirs.fingerprint and like.fingerprint != theirs.fingerprint:
        raise TraceError(
            f"{name}: recorded of {like.model_id or 'a model'} with fingerprint "
            f"{like.fingerprint}, {first.name} of one with {theirs.fingerprint}; put together "
            "traces of one model only"
        )
    if reader.grid != first.grid:
        raise TraceError(
            f"{name}: has layers {reader.grid.layers} with {reader.grid.experts} experts, "
            f"{first.name} has {first.grid.layers} with {first.grid.experts}; put together traces "
            "of one model only"
        )


def _require_tokens(reader: TraceReader, tokenizer: Any, name: str) -> None:
    tokens = reader.column("token_ids")
    if not len(tokens):
        raise TraceError(f"{name}: has no rows; record some responses")
    if not (tokens >= 0).any():
        raise TraceError(
            f"{name}: has no token ids, so markers cannot be found in it; record the model with "
            "moe-runtime trace, or import a recording that has them"
        )
    if tokenizer is not None and tokens.max() >= len(tokenizer):
        raise TraceError(
            f"{name}: has token id {int(tokens.max())}, the tokenizer has {len(tokenizer)} tokens; "
            "give the tokenizer that it was recorded with"
            + (f" ({reader.like.tokenizer_id})" if reader.like.tokenizer_id else "")
        )


def counted_rows(
    readers: Sequence[TraceReader], markers: Sequence[Marker], *, prompt: bool, tokenizer: Any
) -> Counted:
    """Which rows count, and which of them end a marker.

    Args:
        readers: one or more recordings; their sequences are different ones, whatever their ids.
        markers: M of them.
        prompt: count rows of prefill too.
        tokenizer: to name near tokens for a marker that is not there; may be None.

    Raises:
        TraceError: no row counts, or a marker does not occur in those that do.
    """
    tokens = np.concatenate([reader.column("token_ids") for reader in readers])
    positions = np.concatenate([reader.column("positions") for reader in readers])
    phase = np.concatenate([reader.column("phase") for reader in readers])
    every = _numbered([reader.column("sequence_ids") for reader in readers])
    known = tokens >= 0
    keep = known if prompt else known & (phase == DECODE)
    if not keep.any():
        raise TraceError(
            f"none of {len(tokens)} rows is of decoding, so without the prompt there is nothing to "
            "count; count the prompt too, or record the model while it generates"
        )
    marked = np.zeros((len(markers), len(tokens)), np.bool_)
    for number, marker in enumerate(markers):
        # Looked for in all rows: a marker may begin in the prompt and end after it.
        rows = occurrences(marker, tokens, every, positions)
        marked[number, rows] = True
        if not (marked[number] & keep).any():
            raise _absent(marker, len(rows), tokens[keep], prompt=prompt, tokenizer=tokenizer)
    marked &= keep
    numbers, places = np.unique(every[keep], return_inverse=True)
    sequence = np.zeros(len(tokens), np.int64)
    sequence[keep] = places
    with_marker = np.zeros((len(markers), len(numbers)), np.bool_)
    for inside, ends in zip(with_marker, marked, strict=True):
        inside[sequence[ends]] = True
    return Counted(
        keep=keep,
        sequence=sequence,
        sequences=len(numbers),
        marked=marked,
        with_marker=with_marker,
        unknown=int((~known).sum()),
    )


def _numbered(columns: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Sequence numbers that differ between recordings, `[N]`."""
    found, before = [], 0
    for column in columns:
        ids, inside = np.unique(column, return_inverse=True)
        found.append((inside + before).astype(np.int32))
        before += len(ids)
    return np.concatenate(found)


def _absent(
    marker: Marker, anywhere: int, tokens: NDArray[np.int32], *, prompt: bool, tokenizer: Any
) -> TraceError:
    """A marker does not occur in the rows that count; `anywhere`: rows of any kind with it."""
    text = f"marker {marker.text!r} does not occur in the {len(tokens)} rows that count"
    if anywhere and not prompt:
        return TraceError(
            f"{text}, but {anywhere} times in prompts: count the prompt too (without no-prompt)"
        )
    near = () if tokenizer is None else near_tokens(tokenizer, marker.text, np.unique(tokens))
    if near:
        text += "; tokens near it that do: " + ", ".join(map(repr, near))
    return TraceError(f"{text}. Leave it out, or give a marker that the model writes")
