"""Where the rows of a stored range go in an expert's tensor, whole or in blocks of rows.

Knows shapes and strides; reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_runtime.checkpoint import Segment

__all__ = ["fill"]

Parts = Iterator[tuple[torch.Tensor, torch.Tensor]]


def fill(
    target: torch.Tensor,
    segment: Segment,
    first: int,
    stored: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Copy rows of a range to their places.

    Args:
        target: the expert's tensor. One with a dimension more than `segment` has its dimension of
            outputs in two, `[blocks, width]`, in memory `[blocks, in, width]`.
        first: which row of the range `stored` begins with; even in an interleaved range.
        stored: `[rows, ...]` of the range, in its dtype.
        scratch: uint8, at least as large as `stored`.
    """
    blocked = target.dim() > len(segment.shape)
    for into, part in (_blocked if blocked else _whole)(target, segment, first, stored):
        _copy(into, part, scratch)


def _whole(target: torch.Tensor, segment: Segment, first: int, stored: torch.Tensor) -> Parts:
    into = segment.target(target)
    if segment.interleaved:
        stored = stored.unflatten(0, (-1, 2))
        first //= 2
    yield into[first : first + len(stored)], stored


def _blocked(target: torch.Tensor, segment: Segment, first: int, stored: torch.Tensor) -> Parts:
    in_first = target.stride(-1) == 1  # the model's own tensor is [in, out], not [out, in]
    blocks = target.permute(1, 2, 0) if in_first else target  # [blocks, width, in]
    if segment.interleaved:
        size = target.shape[0] if in_first else blocks.shape[0] * blocks.shape[1]
        starts = [first // 2, (size + first) // 2]
        parts = stored.unflatten(0, (-1, 2)).unbind(1)
    else:
        starts, parts = [segment.row + first], (stored,)
    for start, part in zip(starts, parts, strict=True):
        if segment.transposed != in_first:  # a stored row is one input's
            into = blocks[:, :, start : start + len(part)].permute(2, 0, 1)
            yield into, part.unflatten(1, into.shape[1:])
        else:
            yield from _outputs(blocks, start, part)


def _outputs(blocks: torch.Tensor, start: int, part: torch.Tensor) -> Parts:
    """Stored rows are outputs from `start` on: cut where blocks end."""
    width = blocks.shape[1]
    done = 0
    while done < len(part):
        block, inside = divmod(start + done, width)
        count = min(width - inside, len(part) - done)
        yield blocks[block, inside : inside + count], part[done : done + count]
        done += count


def _copy(into: torch.Tensor, part: torch.Tensor, scratch: torch.Tensor) -> None:
    if into.dim() != 2 or into.stride(0) != 1 or into.stride(1) == 1:
        into.copy_(part)
    elif into.mT.is_contiguous() and part.is_contiguous():
        into.mT.copy_(part.mT)
    else:
        # Transposing is fast between contiguous blocks only.
        size = part.numel() * part.element_size()
        turned = scratch[:size].view(part.dtype).view(part.shape[::-1])
        turned.copy_(part.mT)
        into.mT.copy_(turned)
