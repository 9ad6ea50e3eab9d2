"""Rows of a trace from SGLang's `per_token` dumps.

Knows the recorder's records; the file around them is opened elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import TraceError
from moe_runtime.importers.facts import Facts, Note, Piece, choose_layers, experts_of
from moe_runtime.importers.rows import Layers, checked_ids
from moe_runtime.importers.sglang_dump import Dump, array_of, load_dump, whole_numbers
from moe_runtime.trace import DECODE, PREFILL, RoutingTrace

__all__ = ["read_tokens"]

IntArray = NDArray[np.int64]
_BATCH_ROWS = 8192  # rows that are worked out together: passes of decoding are short
_LARGEST_INT = np.iinfo(np.int32).max
_NO_WEIGHTS = "the recording has no routing weights: what is weighted by them cannot be worked out"
_SEQUENCES = (
    "the recorder keeps no request ids: sequences are put together by position, in batch order"
)


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One forward pass: `ids [L, T, K]` physical, tokens and places int64 `[T]`."""

    where: str
    ids: NDArray[Any]
    tokens: IntArray
    positions: IntArray
    lengths: tuple[int, ...] | None  # tokens of each sequence; None where each has one

    @property
    def decode(self) -> bool:
        return self.lengths is None


def read_tokens(paths: Sequence[Path], facts: Facts, note: Note) -> Iterator[Piece]:
    """The tokens of all files, one file after another; ranks that saw the same tokens count once.

    Args:
        paths: `per_token` dumps, of several ranks or runs.
        facts: of the model; what it says must fit.
        note: told about what was left out.

    Raises:
        TraceError: a damaged dump, numbers out of range, dumps of different models.
    """
    kept: list[Path] = []
    seen: dict[bytes, Path] = {}
    for path in paths:
        dump = load_dump(path)
        if dump.mode != "per_token":
            raise TraceError(f"{path}: a dump of mode {dump.mode}, the first is of per_token")
        digest = dump.digest()
        if digest in seen:
            note(f"{path}: the same tokens as {seen[digest].name}, imported once")
        else:
            seen[digest] = path
            kept.append(path)
    positions, layers, width = _layers(kept, facts)
    note(_NO_WEIGHTS)
    note(_SEQUENCES)
    sequences = 0
    for path in kept:
        linker = _Sequences(sequences)
        dump = load_dump(path)
        table = dump.physical_to_logical()
        batch: list[_Pass] = []
        rows = 0
        for one in _passes(dump):
            batch.append(one)
            rows += len(one.tokens)
            if rows >= _BATCH_ROWS:
                yield Piece(path, _rows(batch, table, positions, layers, width, linker, facts))
                batch, rows = [], 0
        if batch:
            yield Piece(path, _rows(batch, table, positions, layers, width, linker, facts))
        sequences = linker.count


def _layers(paths: Sequence[Path], facts: Facts) -> tuple[IntArray, Layers, int]:
    """Layers with experts and the experts a token in each: a first pass over the files."""
    shape: tuple[int, int] | None = None
    chosen = np.zeros(0, np.int64)  # for each layer the most experts of any token
    for path in paths:
        dump = load_dump(path)
        table = dump.physical_to_logical()
        found = (len(table), int(table.max()) + 1)
        if shape is None:
            shape, chosen = found, np.zeros(len(table), np.int64)
        if found != shape:
            raise TraceError(
                f"{path}: has [layers, experts] {list(found)}, the first file {list(shape)}; "
                "import recordings of one model together"
            )
        for one in _passes(dump):
            if one.ids.shape[0] != shape[0]:
                raise TraceError(
                    f"{one.where} has {one.ids.shape[0]} layers, the map of experts {shape[0]}"
                )
            if one.ids.size:
                np.maximum(chosen, (one.ids >= 0).sum(axis=2).max(axis=1), out=chosen)
    assert shape is not None
    path = paths[0]
    positions, layer_ids = choose_layers(path, shape[0], chosen > 0, facts)
    experts = experts_of(path, layer_ids, facts, shape[1])
    top_k = tuple(int(k) for k in chosen[positions])
    if facts.top_k and any(k != facts.top_k for k in top_k):
        at = next(at for at, k in enumerate(top_k) if k != facts.top_k)
        raise TraceError(
            f"{path}: layer {layer_ids[at]} chooses {top_k[at]} experts a token, but top-k "
            f"{facts.top_k} is said (SGLang records 8 at most)"
        )
    return positions, Layers(layer_ids=layer_ids, experts=experts, top_k=top_k), max(top_k)


def _passes(dump: Dump) -> Iterator[_Pass]:
    """The records of a dump, each checked by itself; empty passes are left out."""
    for number, record in enumerate(dump.records()):
        where = f"{dump.path}: record {number}"
        ids = array_of(record["topk_ids_of_layer"], "i", (3,), f"{where}: topk_ids_of_layer")
        tokens = whole_numbers(record.get("input_ids"), f"{where}: input_ids")
        places = whole_numbers(record.get("positions"), f"{where}: positions")
        if not ids.shape[1] == len(tokens) == len(places):
            raise TraceError(
                f"{where}: topk_ids_of_layer has {ids.shape[1]} tokens, input_ids {len(tokens)}, "
                f"positions {len(places)}"
            )
        if not len(tokens):
            continue
        if places.min() < 0 or places.max() > _LARGEST_INT:
            wrong = places[(places < 0) | (places > _LARGEST_INT)][0]
            raise TraceError(f"{where}: position {wrong} is out of range")
        extend = record.get("extend_seq_lens")
        lengths = None
        if extend is not None:
            values = whole_numbers(extend, f"{where}: extend_seq_lens")
            if (len(values) and values.min() < 0) or values.sum() != len(tokens):
                raise TraceError(
                    f"{where}: extend_seq_lens {values.tolist()!s:.60} are not its {len(tokens)} "
                    "tokens"
                )
            lengths = tuple(values[values > 0].tolist())
        yield _Pass(where=where, ids=ids, tokens=tokens, positions=places, lengths=lengths)


class _Sequences:
    """Numbers for sequences, found again by the place that their next token must have."""

    def __init__(self, first: int) -> None:
        self.count = first
        self._next: dict[int, deque[int]] = {}

    def number(self, one: _Pass) -> IntArray:
        """Sequence of each token of a pass, int64 `[T]`."""
        lengths = one.lengths if one.lengths is not None else (1,) * len(one.tokens)
        if not lengths:
            return np.zeros(0, np.int64)
        ends = np.cumsum(lengths)
        begins: list[int] = one.positions[ends - lengths].tolist()
        after: list[int] = (one.positions[ends - 1] + 1).tolist()
        found: list[int] = []
        for begin in begins:
            waiting = self._next.get(begin) if begin else None
            if waiting:
                found.append(waiting.popleft())
            else:
                found.append(self.count)
                self.count += 1
        if one.decode:  # all that are alive take part in a pass of decoding: the rest has ended
            self._next = {}
        for sequence, place in zip(found, after, strict=True):
            self._next.setdefault(place, deque()).append(sequence)
        return np.repeat(np.array(found, np.int64), lengths)


def _rows(
    batch: Sequence[_Pass],
    table: IntArray,
    positions: IntArray,
    layers: Layers,
    width: int,
    linker: _Sequences,
    facts: Facts,
) -> RoutingTrace:
    """The rows of some passes, with logical experts."""
    counts = [len(one.tokens) for one in batch]
    physical = np.concatenate([one.ids[positions] for one in batch], axis=1)
    slots = table.shape[1]
    if physical.min() < -1 or physical.max() >= slots:
        at, row, _ = (int(i) for i in np.argwhere((physical < -1) | (physical >= slots))[0])
        number = int(np.searchsorted(np.cumsum(counts), row, side="right"))
        bad = physical[at, row][(physical[at, row] < -1) | (physical[at, row] >= slots)][0]
        raise TraceError(
            f"{batch[number].where}: layer {layers.layer_ids[at]}: physical expert {int(bad)}, but "
            f"there are {slots}"
        )
    # -1 takes the last column of its layer's table, which is -1 again.
    wide = np.concatenate([table[positions], np.full((len(positions), 1), -1)], axis=1)
    dense = wide.astype(np.int32)
    logical = np.empty((physical.shape[1], len(positions), physical.shape[2]), np.int32)
    for at in range(len(positions)):
        np.take(dense[at], physical[at], out=logical[:, at], mode="wrap")
    if logical.shape[2] > width:
        # The unused places are the last ones of a token; sort them there where they are not.
        if (logical[:, :, width:] >= 0).any():
            order = np.argsort(logical < 0, axis=2, kind="stable")
            logical = np.take_along_axis(logical, order, axis=2)
        logical = logical[:, :, :width]
    tokens = np.concatenate([one.tokens for one in batch])
    return RoutingTrace(
        topk_ids=checked_ids(f"{batch[0].where} on", logical, layers),
        topk_weights=np.zeros(logical.shape, np.float16),
        token_ids=np.where((tokens < 0) | (tokens > _LARGEST_INT), -1, tokens).astype(np.int32),
        sequence_ids=np.concatenate([linker.number(one) for one in batch]).astype(np.int32),
        positions=np.concatenate([one.positions for one in batch]).astype(np.int32),
        phase=np.repeat([DECODE if one.decode else PREFILL for one in batch], counts).astype(
            np.uint8
        ),
        step_ids=np.repeat(np.arange(len(batch)), counts).astype(np.int32),
        layer_ids=layers.layer_ids,
        experts=layers.experts,
        top_k=layers.top_k,
        model_id=facts.model_id,
        fingerprint=facts.fingerprint,
    )
