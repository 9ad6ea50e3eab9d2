"""Keys and values of groups of sequences, regrouped: rows gathered from one batch into another.

Knows transformers' cache classes; nothing of experts, schedules or tokens.

All rows of a batch end in its last column. A sequence that is shorter than the longest has columns
before its first token, which the attention mask hides; what is in them does not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moe_runtime.errors import UnsupportedModelError

__all__ = ["GroupCache", "check_cache", "gather", "new_cache"]


@dataclass(eq=False, kw_only=True)
class GroupCache:
    """The cache of one batch.

    Attributes:
        members: number of the sequence in each row.
        lengths: tokens of each row in the cache; grows as the rows are decoded.
        cache: transformers' own, rows right-aligned.
    """

    members: list[int]
    lengths: list[int]
    cache: Cache

    @property
    def columns(self) -> int:
        """Tokens that the longest row can have had: columns of the attention mask so far."""
        return int(self.cache.get_seq_length())

    def mask(self, device: torch.device) -> torch.Tensor:
        """int64 `[rows, columns + 1]`: 0 before a row's first token, 1 up to the coming token."""
        columns = self.columns
        first = columns - torch.tensor(self.lengths, device=device)
        return (torch.arange(columns + 1, device=device) >= first[:, None]).long()

    def advance(self) -> None:
        """Each row has one more token."""
        self.lengths = [length + 1 for length in self.lengths]


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache with the layers that the model's configuration asks for.

    Raises:
        UnsupportedModelError: a layer whose state is no keys and values of each token.
    """
    cache = DynamicCache(config=model.config)
    check_cache(cache, type(model).__name__)
    return cache


def check_cache(cache: Any, name: str) -> None:
    """UnsupportedModelError unless each layer keeps keys and values, the last tokens last."""
    if not isinstance(cache, DynamicCache):
        raise UnsupportedModelError(
            f"{name} keeps its past in a {type(cache).__name__}; sequences can be regrouped in a "
            "DynamicCache only. Use model.generate"
        )
    for at, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"{name}: layer {at} keeps its past in a {type(layer).__name__}, from which single "
                "sequences cannot be taken (full and sliding-window attention can). Use "
                "model.generate"
            )


def gather(sources: Sequence[GroupCache], members: Sequence[int]) -> GroupCache:
    """A batch of these sequences, from the batches where they are now; those are left as they are.

    Args:
        sources: batches of one model; every member is in one of them.
        members: numbers of the sequences, in the order of the new rows.
    """
    place = {m: (at, row) for at, one in enumerate(sources) for row, m in enumerate(one.members)}
    lengths = [sources[place[m][0]].lengths[place[m][1]] for m in members]
    used = sorted({place[m][0] for m in members})
    rows = [  # of each source: which of its rows go to which of the new ones
        (
            sources[at].cache,
            torch.tensor([place[m][1] for m in members if place[m][0] == at]),
            torch.tensor([new for new, m in enumerate(members) if place[m][0] == at]),
        )
        for at in used
    ]
    longest = max(lengths)
    cache = copy.copy(sources[used[0]].cache)
    cache.layers = [
        _gathered([(source.layers[at], old, new) for source, old, new in rows], longest)
        for at in range(len(cache.layers))
    ]
    return GroupCache(members=list(members), lengths=lengths, cache=cache)


def _gathered(parts: list[tuple[Any, torch.Tensor, torch.Tensor]], longest: int) -> Any:
    """One layer of the new cache: of each part's layer some rows `old`, to be the rows `new`."""
    layer = copy.copy(parts[0][0])
    columns = longest
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = longest  # of the sequence; fewer columns are kept
        columns = min(longest, layer.sliding_window - 1)
    layer.keys = _rows([(part.keys, old, new) for part, old, new in parts], columns)
    layer.values = _rows([(part.values, old, new) for part, old, new in parts], columns)
    return layer


def _rows(parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], columns: int) -> Any:
    """`[rows, heads, columns, width]` with each part's rows at their places, right-aligned."""
    first = parts[0][0]
    if len(parts) == 1 and first.shape[-2] >= columns:
        return first[..., first.shape[-2] - columns :, :][parts[0][1].to(first.device)]
    count = sum(len(new) for _, _, new in parts)
    whole = first.new_zeros(count, first.shape[1], columns, first.shape[3])
    for tensor, old, new in parts:
        taken = min(columns, tensor.shape[-2])
        tail = tensor[..., tensor.shape[-2] - taken :, :]
        whole[new.to(whole.device), :, columns - taken :] = tail[old.to(whole.device)]
    return whole
