"""Batch-1 decode on the CPU: several experts on one token, bound by the weights' bandwidth.

`decode_loop` takes weights as they are: two products for each expert.

`decode_bags` wants them `[in, out]`. A product of one row and a matrix is then a weighted sum of
the matrix's rows, which is what `embedding_bag` computes: over a table of rows, by row numbers,
with a weight for each. With the whole pool as the table, *one* call reads exactly the rows of all
active experts, gathers nothing and pays no start-up for each expert. Wide rows are cut into blocks,
`[out / width, in, width]`, so that a sum stays in registers and reads memory in one run: that alone
makes it half as fast again. One bag is one block of one expert and is summed by one thread in
float32, so an expert's bits do not depend on the others.

Knows no routing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from moe_runtime.kernels.reference import ExpertForm, expert_mlp, project

__all__ = ["Table", "bags_are_fast", "decode_bags", "decode_loop", "rows_of_experts"]

Table = tuple[torch.Tensor, int]


def bags_are_fast(dtype: torch.dtype) -> bool:
    """Whether this machine's `embedding_bag` has a vectorised kernel for the dtype."""
    vector = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return vector and dtype in (torch.float32, torch.float16, torch.bfloat16)


def decode_bags(
    hidden: torch.Tensor,
    slots: Sequence[int],
    tables: Sequence[Table],
    stacked: Sequence[torch.Tensor],
    form: ExpertForm,
) -> torch.Tensor:
    """Some experts on one token, or each on a row of its own; weights in blocks of rows.

    Args:
        hidden: `[1, D]` or `[n, D]`.
        slots: slots of the `n` experts; one may stand several times.
        tables: for each tensor of an expert, all slots as `[rows, width]` and the rows of a slot.
        stacked: for each tensor of an expert, `[slots, ...]`.

    Returns:
        `[n, D']`, before routing weights.
    """
    places = torch.tensor(slots)
    up, down = stacked[form.up].shape[1], stacked[form.down].shape[1]
    inner = _bags(tables[form.up], places, hidden.expand(len(slots), -1), up)
    if form.up_bias is not None:
        inner = inner + stacked[form.up_bias][places]
    inner = _activate(inner, form)
    out = _bags(tables[form.down], places, inner, down)
    if form.down_bias is not None:
        out = out + stacked[form.down_bias][places]
    if form.finish is not None:
        out = torch.cat([form.finish(row) for row in out.split(1)])
    return out


# Bags read an expert once for each of its rows: measured, two are quicker so than by a product.
_FEW = 2


def rows_of_experts(
    inputs: torch.Tensor,
    counts: Sequence[int],
    slots: Sequence[int],
    tables: Sequence[Table],
    stacked: Sequence[torch.Tensor],
    form: ExpertForm,
) -> torch.Tensor:
    """Some experts, each on rows of its own, weights in blocks of rows.

    How an expert is computed depends on the number of its rows alone, so its bits do too.

    Args:
        inputs: `[n, D]`, first the first expert's rows.
        counts: rows of each expert.
        slots: their slots.
        tables, stacked: as for `decode_bags`.

    Returns:
        `[n, D']`, before routing weights.
    """
    few = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)
           if count <= _FEW]  # fmt: skip
    if len(few) == len(inputs):
        return decode_bags(inputs, few, tables, stacked, form)
    parts = inputs.split(list(counts))
    by_bags = [part for part in parts if len(part) <= _FEW]
    quick: Iterator[torch.Tensor] = iter(())
    if by_bags:
        sums = decode_bags(torch.cat(by_bags), few, tables, stacked, form)
        quick = iter(sums.split([len(part) for part in by_bags]))
    return torch.cat([
        next(quick) if len(part) <= _FEW
        else expert_mlp(part, tuple(stack[slot] for stack in stacked), form)
        for part, slot in zip(parts, slots, strict=True)
    ])  # fmt: skip


# Element-wise kernels take whole vectors and finish with single elements, whose last bits may
# differ, and share more than this many elements among threads.
_VECTORS = 128
_SHARED = 32768
_INT32 = torch.iinfo(torch.int32).max


def _activate(rows: torch.Tensor, form: ExpertForm) -> torch.Tensor:
    """The activation of `[n, U]`, of as many rows at once as leave a row's bits its own."""
    width = rows.shape[1]
    together = max(1, _SHARED // width) if width % _VECTORS == 0 else 1
    if len(rows) <= together:
        return form.activation(rows)
    return torch.cat([form.activation(part) for part in rows.split(together)])


def _bags(table: Table, places: torch.Tensor, inputs: torch.Tensor, blocks: int) -> torch.Tensor:
    """`inputs [n, in]`, each row times the matrix in its slot: `[n, out]`."""
    rows, per_slot = table
    count, size = inputs.shape
    # Numbers of half the size are half the bytes to write and to read.
    dtype = torch.int32 if len(rows) <= _INT32 else torch.int64
    within, bounds = _counting(count, blocks, size, dtype)
    numbers = ((places.to(dtype) * per_slot).unsqueeze(1) + within).view(-1)
    weights = inputs.unsqueeze(1).expand(count, blocks, size).reshape(-1)
    # The operator itself: what `functional.embedding_bag` checks before it holds here.
    sums = torch.embedding_bag(rows, numbers, bounds, False, 0, False, weights, False, None)[0]
    return sums.view(count, -1)


@lru_cache(maxsize=256)
def _counting(
    count: int, blocks: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row numbers within a slot, and where each of `count * blocks` bags begins."""
    bounds = torch.arange(0, count * blocks * size, size, dtype=dtype)
    return torch.arange(blocks * size, dtype=dtype), bounds


def decode_loop(
    hidden: torch.Tensor, experts: Sequence[tuple[torch.Tensor, ...]], form: ExpertForm
) -> torch.Tensor:
    """Some experts on one token, in any layout: `hidden [1, D]`, `[n, D']`.

    What comes between the products is done for all experts at once.
    """
    up, down = form.up_bias, form.down_bias
    inner = torch.cat(
        [
            project(hidden, held[form.up], None if up is None else held[up], form.transposed)
            for held in experts
        ]
    )
    parts = zip(experts, _activate(inner, form).split(1), strict=True)
    outputs = [
        project(row, held[form.down], None if down is None else held[down], form.transposed)
        for held, row in parts
    ]
    if form.finish is not None:
        outputs = [form.finish(row) for row in outputs]
    return torch.cat(outputs)
