"""Many tokens over a pool of slots, in Triton: grouped products on tensor cores.

Pairs are sorted by slot and cut into tiles on the device; a program computes one tile and a block
of outputs, and neighbouring programs share weights or rows in the cache. Gate and up are one
product with the activation at its end. Contributions go to their own places and are summed later,
so nothing is added concurrently and a row's bits do not depend on which experts are here.

Knows no residency.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from moe_runtime.kernels.tiles import cut
from moe_runtime.kernels.triton_parts import (
    Experts,
    activated,
    interpreted,
    power_of_two,
    projected,
    scope,
    tile_and_block,
)

if TYPE_CHECKING:
    from triton import language as tl

__all__ = ["prefill_parts"]

_GROUP = 8  # tiles whose programs for one block of outputs run next to each other


def _up(
    hidden: tl.tensor,
    order: tl.tensor,
    ranked: tl.tensor,
    starts: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    inner: tl.tensor,
    tiles: tl.tensor,
    pairs: tl.tensor,
    K: tl.tensor,
    D: tl.tensor,
    width: tl.tensor,
    hidden_stride: tl.tensor,
    slot_stride: tl.tensor,
    n_stride: tl.tensor,
    k_stride: tl.tensor,
    bias_stride: tl.tensor,
    limit: tl.tensor,
    alpha: tl.tensor,
    shift: tl.tensor,
    ROWS: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CLAMP: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """`inner [P, I]` in sorted order: up's product and the activation of one tile."""
    tile, block = tile_and_block(tiles, tl.cdiv(width, COLUMNS), GROUP)
    start = tl.load(starts + tile)
    if start >= pairs:
        return
    slot = tl.load(ranked + start)
    place = start + tl.arange(0, ROWS)
    own = tl.load(ranked + place, mask=place < pairs, other=-1) == slot
    token = tl.load(order + place, mask=own, other=0) // K
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    N: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
    if GATED:
        n = tl.arange(0, N)
        if INTERLEAVED:
            row = block * N + n
            used = row < 2 * width
        else:
            local = block * COLUMNS + n % COLUMNS
            row = local + (n // COLUMNS) * width
            used = local < width
    else:
        row = column
        used = column < width
    base = weight + slot * slot_stride + row.to(tl.int64)[:, None] * n_stride
    total = tl.zeros((ROWS, N), dtype=tl.float32)
    for first in range(0, D, DEPTH):
        k = first + tl.arange(0, DEPTH)
        left = tl.load(
            hidden + token[:, None] * hidden_stride + k[None, :],
            mask=own[:, None] & (k < D)[None, :],
            other=0.0,
        )
        right = tl.load(
            base + k[None, :] * k_stride, mask=used[:, None] & (k < D)[None, :], other=0.0
        )
        total = projected(left, right, total, False, UPCAST)
    if bias is not None:
        added = tl.load(bias + slot * bias_stride + row, mask=used, other=0.0)
        total += added.to(tl.float32)[None, :]
    value = activated(
        total, ROWS, COLUMNS, FUNCTION, GATED, INTERLEAVED, CLAMP, limit, alpha, shift
    )
    tl.store(
        inner + place[:, None] * width + column[None, :],
        value.to(inner.dtype.element_ty),
        mask=own[:, None] & (column < width)[None, :],
    )


def _down(
    inner: tl.tensor,
    order: tl.tensor,
    ranked: tl.tensor,
    starts: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    pairs: tl.tensor,
    width: tl.tensor,
    outputs: tl.tensor,
    slot_stride: tl.tensor,
    n_stride: tl.tensor,
    k_stride: tl.tensor,
    bias_stride: tl.tensor,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """`parts [P, D']` at the pairs' own places: down's product of one tile."""
    tile, block = tile_and_block(tiles, tl.cdiv(outputs, COLUMNS), GROUP)
    start = tl.load(starts + tile)
    if start >= pairs:
        return
    slot = tl.load(ranked + start)
    place = start + tl.arange(0, ROWS)
    own = tl.load(ranked + place, mask=place < pairs, other=-1) == slot
    pair = tl.load(order + place, mask=own, other=0)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    used = n < outputs
    base = weight + slot * slot_stride + n.to(tl.int64)[:, None] * n_stride
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        left = tl.load(
            inner + place[:, None] * width + k[None, :],
            mask=own[:, None] & (k < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            base + k[None, :] * k_stride, mask=used[:, None] & (k < width)[None, :], other=0.0
        )
        total = projected(left, right, total, False, UPCAST)
    if bias is not None:
        added = tl.load(bias + slot * bias_stride + n, mask=used, other=0.0)
        total += added.to(tl.float32)[None, :]
    tl.store(
        parts + pair[:, None] * outputs + n[None, :],
        total.to(parts.dtype.element_ty),
        mask=own[:, None] & used[None, :],
    )


@cache
def _kernel(name: str) -> Any:
    """The kernel and the configurations that are tried once for each shape."""
    globals().update(scope())  # first: it says what is wrong with a broken Triton
    import triton

    # Steps of 64 inputs in each: configurations must not differ in the order of a sum.
    if interpreted():
        tried = [(16, 16, 4, 1)]
    elif name == "up":
        tried = [(32, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3)]
    else:
        tried = [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4)]
    configs = [
        triton.Config({"COLUMNS": columns, "DEPTH": depth}, num_warps=warps, num_stages=stages)
        for columns, depth, warps, stages in tried
    ]
    keys = ["ROWS", "width", "D" if name == "up" else "outputs", "n_stride"]
    return triton.autotune(configs=configs, key=keys)(triton.jit(_up if name == "up" else _down))


def _tile_rows(pairs: int, distinct: int) -> int:
    """Rows of a tile: about what an expert gets, and fixed by the shape."""
    if interpreted():
        return 16
    return max(16, min(128, power_of_two(-(-pairs // distinct))))


def prefill_parts(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    experts: Experts,
    into: torch.Tensor | None = None,
    *,
    distinct: int,
) -> torch.Tensor:
    """The contributions of a layer's pairs of token and choice.

    Args:
        hidden: `[T, D]`, rows contiguous.
        slots: int32 or int64 `[T, K]`, contiguous; -1 where the expert is not here.
        into: an earlier result for the same T and K, to which these pairs are added.
        distinct: no more slots than this occur.

    Returns:
        `[1, T * K, D']` in the dtype of hidden, before routing weights; rows of pairs with slot -1
        are left as they are.
    """
    pairs, width, outputs = slots.numel(), experts.width, experts.outputs
    tiles = cut(slots.view(-1), _tile_rows(pairs, distinct), distinct)
    count = len(tiles.starts)
    inner = torch.empty(pairs, width, dtype=hidden.dtype, device=hidden.device)
    if into is None:
        into = torch.empty(1, pairs, outputs, dtype=hidden.dtype, device=hidden.device)
    shape = {"ROWS": tiles.rows, "GROUP": _GROUP, "UPCAST": experts.upcast}
    bias = experts.up_bias
    _kernel("up")[lambda meta: (count * -(-width // meta["COLUMNS"]),)](
        hidden, tiles.order, tiles.ranked, tiles.starts, experts.up, bias, inner, count, pairs,
        slots.shape[1], hidden.shape[1], width, hidden.stride(0), *experts.up_strides,
        0 if bias is None else bias.stride(0), **experts.activation, **shape,
    )  # fmt: skip
    bias = experts.down_bias
    _kernel("down")[lambda meta: (count * -(-outputs // meta["COLUMNS"]),)](
        inner, tiles.order, tiles.ranked, tiles.starts, experts.down, bias, into, count, pairs,
        width, outputs, *experts.down_strides, 0 if bias is None else bias.stride(0), **shape,
    )  # fmt: skip
    return into
