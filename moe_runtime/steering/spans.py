"""Thinking spans: which positions of each row lie between a start and an end marker.

Knows token ids and how sequences go on from call to call; no models, no experts.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from moe_runtime.errors import AttachError

__all__ = ["ThinkingSpans", "Variants"]

Variants: TypeAlias = tuple[tuple[int, ...], ...]
_NO_TOKEN = -1


class ThinkingSpans:
    """Follows sequences from call to call.

    A position is inside from the one that completes a start marker (that one included) up to the
    one that completes an end marker (that one not). A marker of several tokens is completed by its
    last one: nothing that comes later is looked at. Where both end, the end counts.

    Args:
        start: the start marker as sequences of token ids, each of which counts.
        end: the end marker likewise.
    """

    def __init__(self, start: Variants, end: Variants) -> None:
        self._start, self._end = start, end
        self._memory = max(len(ids) for ids in (*start, *end)) - 1
        self._starts = frozenset(ids[0] for ids in start if len(ids) == 1)
        self._ends = frozenset(ids[0] for ids in end if len(ids) == 1)
        self._inside: dict[int, bool] = {}
        self._tails: dict[int, list[int]] = {}  # the last tokens, where markers have several
        self._counts: dict[int, int] = {}
        self._rows: tuple[int, ...] = ()
        self._columns = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """Positions inside so far, of the sequence in each row of the last call."""
        return tuple(self._counts[name] for name in self._rows)

    def advance(
        self,
        ids: torch.Tensor,
        *,
        past: int,
        real: torch.Tensor | None = None,
        names: tuple[int, ...] | None = None,
    ) -> bool | torch.Tensor:
        """Take in one call.

        Args:
            ids: int64 `[rows, length]` on the CPU.
            past: columns in the key/value cache before it; sequences begin where there are none.
            real: bool `[rows, length]`, False for padding; None if there is none.
            names: of the sequence in each row, kept from call to call; None if rows stay in place.

        Returns:
            Which positions are inside and no padding, bool `[rows, length]`; True if all of them
            are, False if none is.

        Raises:
            AttachError: the call goes on with sequences whose beginning was not seen here, or from
                a place before what was seen.
        """
        rows, length = ids.shape
        self._rows = self._begin(rows, length, past, names)
        if rows == length == 1 and not self._memory and real is None:
            return self._advance_one(self._rows[0], int(ids))
        if real is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        inside = self._unfold(ids, real) & real
        for name, count in zip(self._rows, inside.sum(1).tolist(), strict=True):
            self._counts[name] += count
        if not bool(inside.any()):
            return False
        return True if bool(inside.all()) else inside

    def _begin(
        self, rows: int, length: int, past: int, names: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        """Names of the rows' sequences; new ones start outside."""
        if names is None:
            names = tuple(range(rows))
            if not past:
                self._inside.clear()
                self._tails.clear()
                self._counts.clear()
                self._columns = 0
            if past < self._columns:
                raise AttachError(
                    f"thinking spans cannot be told: a call goes on from position {past}, after "
                    f"{self._columns} were seen. Decoding that takes tokens back (assisted) cannot "
                    "be steered by thinking spans"
                )
            if past and self._inside and rows != len(self._inside):
                raise AttachError(
                    f"thinking spans cannot be told: {len(self._inside)} rows began, {rows} go on"
                )
            self._columns = past + length
        if not past:
            for name in names:
                self._inside[name], self._counts[name] = False, 0
                self._tails[name] = [_NO_TOKEN] * self._memory
        unseen = [name for name in names if name not in self._inside]
        if unseen:
            raise AttachError(
                f"thinking spans cannot be told: {len(unseen)} of {rows} rows go on from a cache "
                "whose beginning was not seen; enter moe_runtime.steer(..., thinking=...) before "
                "the prompt is run"
            )
        return names

    def _advance_one(self, name: int, token: int) -> bool:
        inside = self._inside[name]
        if token in self._ends:
            inside = False
        elif token in self._starts:
            inside = True
        self._inside[name] = inside
        self._counts[name] += inside
        return inside

    def _unfold(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Bool `[rows, length]`; what it says of padding has no meaning. Updates the states."""
        memory = self._memory
        tails = torch.tensor([self._tails[name] for name in self._rows], dtype=torch.int64)
        tokens = torch.cat([tails.view(len(ids), memory), ids], dim=1)
        present = torch.cat([tails.view(len(ids), memory) != _NO_TOKEN, real], dim=1)
        # Padding to the left, tokens in their order: so markers are whole and the last is last.
        order = present.to(torch.int8).argsort(dim=1, stable=True)
        packed = tokens.masked_fill(~present, _NO_TOKEN).gather(1, order)
        ended = _completed(packed, self._end)
        began = _completed(packed, self._start) & ~ended
        # What a call before has seen counted then.
        events = (began | ended) & (order >= memory)
        places = torch.arange(packed.shape[1]).expand_as(packed)
        latest = places.masked_fill(~events, -1).cummax(dim=1).values
        before = torch.tensor([self._inside[name] for name in self._rows])
        inside = began.gather(1, latest.clamp_min(0)).where(latest >= 0, before[:, None])
        for row, name in enumerate(self._rows):
            self._inside[name] = bool(inside[row, -1])
            self._tails[name] = packed[row, packed.shape[1] - memory :].tolist()
        return torch.empty_like(inside).scatter(1, order, inside)[:, memory:]


def _completed(tokens: torch.Tensor, marker: Variants) -> torch.Tensor:
    """Bool like `tokens [rows, length]`: whether the last token of a variant is here."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for variant in marker:
        whole = torch.ones_like(found)
        for back, token in enumerate(reversed(variant)):
            here = torch.zeros_like(found)
            here[:, back:] = tokens[:, : tokens.shape[1] - back] == token
            whole &= here
        found |= whole
    return found
