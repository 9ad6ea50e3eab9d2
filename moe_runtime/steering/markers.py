"""Markers such as `<think>`: from their text to token ids, and from there to rows of a recording.

Knows tokenizers as they encode and decode; does not know routing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import ConfigError

__all__ = ["Marker", "marker_of", "near_tokens", "occurrences"]

_BEFORE = ("", " ", "\n")  # what a marker may follow; tokenizers encode it differently after each
_NEAR = 5  # suggestions at most


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A text to look for among tokens.

    Args:
        text: as it was given.
        variants: token id sequences that all count as the marker, none empty.
    """

    text: str
    variants: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.variants or not all(self.variants):
            raise ConfigError(f"marker {self.text!r} has no tokens; give a text with some")


def marker_of(tokenizer: Any, text: str) -> Marker:
    """The token ids of a marker, as the tokenizer encodes it in running text.

    "Alternatively" and " Alternatively" are different tokens for most tokenizers, so the marker
    counts as it is encoded at the start of a text, after a space and after a new line.

    Raises:
        ConfigError: an empty text, or one that the tokenizer can only give as unknown; near tokens
            of its vocabulary are named.
    """
    if not text.strip():
        raise ConfigError(f"a marker needs a text, found {text!r}; write for example '<think>'")
    found: dict[tuple[int, ...], None] = {}
    for before in _BEFORE:
        ids = _encode(tokenizer, before + text)
        start = _encode(tokenizer, before)
        # What stands before is cut off where it has tokens of its own.
        ids = ids[len(start) :] if start and ids[: len(start)] == start else ids
        if ids:
            found[tuple(ids)] = None
    unknown = getattr(tokenizer, "unk_token_id", None)
    known = [ids for ids in found if unknown is None or unknown not in ids]
    if not known:
        near = near_tokens(tokenizer, text)
        raise ConfigError(
            f"marker {text!r} is not in the tokenizer's vocabulary"
            + (f"; near it are {_listed(near)}" if near else "; give a text that the model writes")
        )
    # A longer variant that ends like a shorter one says nothing more: the last token counts.
    kept = [
        ids
        for ids in known
        if not any(other != ids and ids[-len(other) :] == other for other in known)
    ]
    return Marker(text=text, variants=tuple(kept))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(one) for one in tokenizer.encode(text, add_special_tokens=False)] if text else []


def near_tokens(tokenizer: Any, text: str, among: Iterable[int] | None = None) -> tuple[str, ...]:
    """Texts of up to five single tokens that read like `text`, nearest first.

    Args:
        tokenizer: a transformers tokenizer.
        text: what was looked for.
        among: token ids to choose from; the whole vocabulary if not given.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) if among is None else set(among))
    texts: dict[str, str] = {}  # compared without space and case -> as it reads
    for one in ids:
        shown = tokenizer.decode([one]).strip()
        if shown and abs(len(shown) - len(text)) <= max(3, len(text) // 2):
            texts.setdefault(shown.lower(), shown)
    close = difflib.get_close_matches(text.strip().lower(), list(texts), n=_NEAR, cutoff=0.5)
    return tuple(texts[one] for one in close)


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(repr(text) for text in texts)


def occurrences(
    marker: Marker,
    token_ids: NDArray[np.int32],
    sequence_ids: NDArray[np.int32],
    positions: NDArray[np.int32],
) -> IntArray:
    """The rows at which a marker ends, ascending: a marker is attributed to its last token.

    Rows may stand in any order: the tokens of a longer marker are those at consecutive positions
    of one sequence. Each row counts once, however many variants end there.

    Args:
        marker: what is looked for.
        token_ids, sequence_ids, positions: `[N]` each, as in a routing trace.

    Returns:
        int64 `[n]`.
    """
    rows: list[IntArray] = []
    order: IntArray | None = None
    for ids in marker.variants:
        if len(ids) == 1:
            rows.append(np.flatnonzero(token_ids == ids[0]))
            continue
        if not (token_ids == ids[-1]).any():
            continue
        if order is None:
            order = np.lexsort((positions, sequence_ids))
        rows.append(_runs(ids, order, token_ids, sequence_ids, positions))
    return np.unique(np.concatenate(rows)) if rows else np.zeros(0, np.int64)


def _runs(
    ids: tuple[int, ...],
    order: IntArray,
    token_ids: NDArray[np.int32],
    sequence_ids: NDArray[np.int32],
    positions: NDArray[np.int32],
) -> IntArray:
    """Rows at which a variant of several tokens ends; `order` sorts by sequence and position."""
    # Ends among the sorted rows, thinned out token by token from the last one.
    ends = np.flatnonzero(token_ids[order] == ids[-1])
    ends = ends[ends >= len(ids) - 1]
    for back in range(1, len(ids)):
        last, one = order[ends], order[ends - back]
        ends = ends[
            (token_ids[one] == ids[-1 - back])
            & (sequence_ids[one] == sequence_ids[last])
            & (positions[one].astype(np.int64) == positions[last].astype(np.int64) - back)
        ]
    found: IntArray = order[ends].astype(np.int64)
    return found
