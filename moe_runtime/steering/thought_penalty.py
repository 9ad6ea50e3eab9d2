"""The thought-switching penalty (TIP), a control: what ends a thought costs logits for a while.

Knows token ids; not what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

__all__ = ["ThoughtSwitchingPenalty"]

Markers = Sequence[tuple[int, ...]]  # token sequences that all count as one marker


class ThoughtSwitchingPenalty(LogitsProcessor):
    """Lowers the logits of some tokens while a thought is young (arXiv 2501.18585).

    A thought begins after a start marker, and after each of the tokens themselves; it ends with an
    end marker. For the first `span` tokens of a thought, each of the tokens costs `penalty` logits.

    Use for one call of `generate`. What a prompt already holds counts, so a start marker at the end
    of a prompt begins a thought.

    Args:
        tokens: ids that are made less likely.
        start, end: the markers of thinking, as token sequences; without a start marker the first
            thought begins with the first new token.
        new: for each row how many of the tokens that the call starts with are not of its prompt.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        *,
        penalty: float,
        span: int,
        start: Markers,
        end: Markers,
        new: Sequence[int],
    ) -> None:
        self._new = new
        self._tokens, self._penalty, self._span = list(tokens), penalty, span
        self._start, self._end = tuple(start), tuple(end)
        self._switches = frozenset(tokens)
        self._age: list[int | None] = []  # tokens of each row's thought so far; None: no thought

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores `[rows, vocabulary]`, lower for the tokens in rows whose thought is young."""
        rows = input_ids.tolist()
        if not self._age:
            self._age = [self._age_in(row, new) for row, new in zip(rows, self._new, strict=True)]
        else:
            self._age = [
                self._next(age, row, len(row)) for age, row in zip(self._age, rows, strict=True)
            ]
        young = [at for at, age in enumerate(self._age) if age is not None and age < self._span]
        if young and self._tokens:
            scores = scores.clone()  # type: ignore[assignment]
            at = torch.tensor(young, device=scores.device)[:, None]
            scores[at, torch.tensor(self._tokens, device=scores.device)] -= self._penalty
        return scores

    def _age_in(self, row: list[int], new: int) -> int | None:
        """The age after all of a row, gone through token by token."""
        age: int | None = None if self._start else 0
        for length in range(1 if self._start else len(row) - new + 1, len(row) + 1):
            age = self._next(age, row, length)
        return age

    def _next(self, age: int | None, row: list[int], length: int) -> int | None:
        """The age after the token at the end of the first `length` tokens."""
        if _ends_with(row, length, self._start):
            return 0
        if age is None or _ends_with(row, length, self._end):
            return None
        return 0 if row[length - 1] in self._switches else age + 1


def _ends_with(row: list[int], length: int, markers: Markers) -> bool:
    return any(
        row[length - 1] == ids[-1] and row[max(0, length - len(ids)) : length] == list(ids)
        for ids in markers
    )
