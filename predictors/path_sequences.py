"""Sequences of token ids with their routing, split by sequence, and the batches of a training run.

Knows traces; knows no network. A batch is a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import TraceError
from moe_runtime.trace import DECODE, UNUSED, RoutingTrace

__all__ = [
    "PathBatch",
    "PathSequence",
    "Piece",
    "Vocabulary",
    "epoch_packs",
    "multi_hot",
    "padded",
    "sequences_of",
    "token_counts",
]

Piece: TypeAlias = tuple[IntArray, IntArray, NDArray[np.uint16]]  # prompt ids, token ids, routing


@dataclass(frozen=True, kw_only=True, eq=False)
class PathSequence:
    """One sequence of a trace, in the order of positions.

    Args:
        token_ids: int64 `[n]`.
        topk_ids: uint16 `[n, L, K]`, 65535 where nothing was chosen.
        prompt: how many tokens come before the first that was generated; n if none was.
    """

    token_ids: IntArray
    topk_ids: NDArray[np.uint16]
    prompt: int

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    def cut(self) -> int:
        """Where what is measured begins: after the prompt, half-way in a text that was read."""
        return self.prompt if 0 < self.prompt < len(self) else len(self) // 2


def sequences_of(traces: Sequence[RoutingTrace]) -> list[PathSequence]:
    """The sequences of traces of one model; those of different traces are kept apart.

    Raises:
        TraceError: no traces, no rows, traces of different models or layers, or rows without
            token ids.
    """
    if not traces:
        raise TraceError("no traces to train on; give one at least")
    found: list[PathSequence] = []
    for number, trace in enumerate(traces):
        trace.require_like(traces[0], f"trace {number}")
        unknown = int((trace.token_ids < 0).sum())
        if unknown:
            raise TraceError(
                f"trace {number} ({trace.model_id or 'unnamed model'}) has {unknown:,} of "
                f"{len(trace):,} rows without token ids, and a routing path is forecast from "
                "them; record it again from token ids (`moe-runtime trace record`)"
            )
        order = np.lexsort((trace.positions, trace.sequence_ids))
        ends = np.flatnonzero(np.diff(trace.sequence_ids[order])) + 1
        found += [
            PathSequence(
                token_ids=trace.token_ids[rows].astype(np.int64),
                topk_ids=trace.topk_ids[rows],
                prompt=_prompt(trace.phase[rows]),
            )
            for rows in np.split(order, ends)
            if len(rows)
        ]
    if not found:
        raise TraceError("the traces have no rows; record some text")
    return found


def _prompt(phase: NDArray[np.uint8]) -> int:
    generated = np.flatnonzero(phase == DECODE)
    return int(generated[0]) if len(generated) else len(phase)


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The token ids that were seen in training, each with a row; all others share the last row.

    Args:
        ids: int64 `[V]`, ascending.
    """

    ids: IntArray

    @classmethod
    def of(cls, sequences: Sequence[PathSequence]) -> Vocabulary:
        """The ids of these sequences."""
        return cls(ids=np.unique(np.concatenate([one.token_ids for one in sequences])))

    def __len__(self) -> int:
        """Number of ids, V."""
        return len(self.ids)

    def rows(self, token_ids: IntArray) -> IntArray:
        """Row of each id, V for unknown ones; any shape."""
        at = np.searchsorted(self.ids, token_ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[at] == token_ids, at, len(self.ids))


def multi_hot(topk_ids: NDArray[np.uint16], grid: ExpertGrid) -> NDArray[np.float32]:
    """Which experts each row chose, `[..., G]` of 0 and 1, from `[..., L, K]`."""
    flat = topk_ids.astype(np.int64) + np.asarray(grid.offsets)[:, None]
    flat = np.where(topk_ids == UNUSED, grid.size, flat)
    hot = np.zeros((*topk_ids.shape[:-2], grid.size + 1), np.float32)
    np.put_along_axis(hot, flat.reshape(*topk_ids.shape[:-2], -1), 1.0, axis=-1)
    return hot[..., :-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class PathBatch:
    """Sequences of about one length, padded on the right.

    Args:
        prompt: int64 `[B, P]`, rows of the vocabulary that the encoder reads; P is 0 without one.
        prompt_lengths: int64 `[B]`.
        tokens: int64 `[B, S]`, rows of the vocabulary that the decoder reads.
        topk_ids: uint16 `[B, S, L, K]`, their routing; nothing chosen in padding.
    """

    prompt: IntArray
    prompt_lengths: IntArray
    tokens: IntArray
    topk_ids: NDArray[np.uint16]


def epoch_packs(
    sequences: Sequence[PathSequence],
    *,
    encoder: bool,
    tokens: int,
    longest: int,
    seed: int,
    epoch: int,
) -> list[list[Piece]]:
    """The batches of one pass over the sequences, before padding; each pass cuts anew.

    With an encoder a sequence is cut after its prompt, or at a random place if it was all read,
    and 20 to 100 % of what follows is kept (as ExpertFlow (He)'s code does). Without one the
    decoder reads everything. What is longer than `longest` is taken from a random place on.

    Args:
        tokens: in a batch, padding included, about.
        longest: tokens of a sequence that are read at once, by each side.
        seed, epoch: decide everything that is random.
    """
    rng = np.random.default_rng([seed, epoch])
    pieces = [piece for one in sequences for piece in _pieces(one, encoder, longest, rng)]
    lengths = np.array([len(piece[1]) for piece in pieces], np.int64)
    # Sorted by length within some batches' worth, shuffled over all: little padding, and random.
    order = rng.permutation(len(pieces))
    together = 16 * max(1, tokens // longest)
    packs: list[list[int]] = []
    for start in range(0, len(order), together):
        some = order[start : start + together]
        packs += _packed(some[np.argsort(lengths[some], kind="stable")], lengths, tokens)
    return [[pieces[n] for n in packs[at]] for at in rng.permutation(len(packs)).tolist()]


def _pieces(
    one: PathSequence, encoder: bool, longest: int, rng: np.random.Generator
) -> Iterator[Piece]:
    nothing = one.token_ids[:0]
    if not encoder:
        # A random first piece, so that the cuts of a long text fall elsewhere each time.
        start = -int(rng.integers(longest)) if len(one) > longest else 0
        for first in range(start, len(one), longest):
            part = slice(max(first, 0), first + longest)
            yield nothing, one.token_ids[part], one.topk_ids[part]
        return
    known = 0 < one.prompt < len(one)
    cut = one.prompt if known else int(rng.integers(1, max(2, len(one))))
    kept = max(1, round((len(one) - cut) * rng.uniform(0.2, 1.0)))
    part = slice(cut, cut + min(kept, longest))
    if 0 < cut < len(one):
        yield one.token_ids[max(0, cut - longest) : cut], one.token_ids[part], one.topk_ids[part]


def _packed(order: IntArray, lengths: IntArray, tokens: int) -> list[list[int]]:
    """Neighbours in the order together, as many as fit when padded."""
    packs: list[list[int]] = [[]]
    for number in order.tolist():
        if packs[-1] and lengths[number] * (len(packs[-1]) + 1) > tokens:
            packs.append([])
        packs[-1].append(number)
    return [pack for pack in packs if pack]


def padded(pieces: list[Piece], vocabulary: Vocabulary) -> PathBatch:
    """Pieces as one batch."""
    count, length = len(pieces), max(len(piece[1]) for piece in pieces)
    prompts = np.array([len(piece[0]) for piece in pieces], np.int64)
    prompt = np.zeros((count, int(prompts.max())), np.int64)
    tokens = np.full((count, length), len(vocabulary), np.int64)
    topk_ids = np.full((count, length, *pieces[0][2].shape[1:]), UNUSED, np.uint16)
    for at, (before, ids, routing) in enumerate(pieces):
        prompt[at, : len(before)] = vocabulary.rows(before)
        tokens[at, : len(ids)] = vocabulary.rows(ids)
        topk_ids[at, : len(ids)] = routing
    return PathBatch(prompt=prompt, prompt_lengths=prompts, tokens=tokens, topk_ids=topk_ids)


def token_counts(
    sequences: Sequence[PathSequence], vocabulary: Vocabulary, grid: ExpertGrid
) -> tuple[FloatArray, FloatArray]:
    """How often each token chose each expert `[V, G]`, and how often each layer routed it `[V, L]`.

    Tokens that the vocabulary does not know are left out.
    """
    counts = np.zeros((len(vocabulary) + 1, grid.size))
    rows = np.zeros((len(vocabulary) + 1, len(grid.layers)))
    for one in sequences:
        at = vocabulary.rows(one.token_ids)
        flat = one.topk_ids.astype(np.int64) + np.asarray(grid.offsets)[:, None]
        used = one.topk_ids != UNUSED
        where = np.broadcast_to(at[:, None, None], flat.shape)
        np.add.at(counts, (where[used], flat[used]), 1.0)
        np.add.at(rows, at, used.any(axis=2).astype(float))
    return counts[:-1], rows[:-1]
