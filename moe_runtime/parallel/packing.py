"""Rows of several tensors as bytes, and back: one tensor after the other, aligned.

Knows tensors; no ranks, and not what rows are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["packed", "row_bytes", "unpacked"]


def _widths(rows: Sequence[torch.Tensor]) -> list[int]:
    """Bytes that one row of each tensor takes."""
    return [
        tensor[:1].numel() * tensor.itemsize if len(tensor) else _empty(tensor) for tensor in rows
    ]


def _empty(tensor: torch.Tensor) -> int:
    count = tensor.itemsize
    for size in tensor.shape[1:]:
        count *= size
    return count


def row_bytes(rows: Sequence[torch.Tensor]) -> int:
    """Bytes that one row of all tensors together takes."""
    width = sum(_widths(rows))
    assert width > 0, "a row has bytes"
    return width


def _by_alignment(rows: Sequence[torch.Tensor]) -> list[int]:
    """Places of the tensors, wide elements first, so that each begins at a multiple of its own."""
    return sorted(range(len(rows)), key=lambda at: -rows[at].itemsize)


def packed(rows: Sequence[torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
    """uint8 `[bytes]`: the chosen rows of each tensor, one tensor after the other."""
    return torch.cat(
        [
            rows[at].detach().index_select(0, chosen).contiguous().view(-1).view(torch.uint8)
            for at in _by_alignment(rows)
        ]
    )


def unpacked(
    rows: Sequence[torch.Tensor], payloads: list[torch.Tensor], numbers: list[int]
) -> list[torch.Tensor]:
    """The tensors `[n, ...]` of all payloads, in their order."""
    widths = _widths(rows)
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    for payload, count in zip(payloads, numbers, strict=True):
        if payload.storage_offset() % 16:  # a part of a longer buffer: elements want alignment
            payload = payload.clone()  # noqa: PLW2901
        start = 0
        for at in _by_alignment(rows):
            end = start + widths[at] * count
            like = rows[at]
            parts[at].append(payload[start:end].view(like.dtype).view(count, *like.shape[1:]))
            start = end
    return [torch.cat(one) for one in parts]
