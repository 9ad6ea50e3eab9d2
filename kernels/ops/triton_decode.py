"""Few tokens over a pool of slots, in Triton: bound by reading each active expert's weights once.

Two launches, up and down, both over (pair of token and choice, block of outputs). The first pair of
a slot leads: its programs read the slot's weights and serve *all* tokens, of which only those that
chose the slot are written. So nothing is sorted, gathered or asked of the host, and a token's bits
depend neither on the other tokens' choices nor on which experts are here. One token alone is
multiplied and summed without tensor cores. Where down has too few blocks to fill a GPU, its inputs
are split; the parts are summed in a fixed order with the sum over choices.

Configurations that are tried against each other differ only in what does not change the order of a
sum: outputs of one program, warps, stages. Knows no residency.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from moe_runtime.kernels.triton_parts import (
    Experts,
    activated,
    interpreted,
    power_of_two,
    projected,
    scope,
)

if TYPE_CHECKING:
    from triton import language as tl

__all__ = ["DECODE_TOKENS", "decode_parts"]

DECODE_TOKENS = 32
_FILL = 256  # programs that keep a large GPU's memory busy (an H100 has 132 multiprocessors)
_LEAST_ROWS = 16  # what tensor cores take


def _up(
    hidden: tl.tensor,
    slots: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    inner: tl.tensor,
    T: tl.tensor,
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
    PAIRS: tl.constexpr,
    DEPTH: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CLAMP: tl.constexpr,
    UPCAST: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """`inner [T * K, I]`: up's product and the activation, for COLUMNS outputs of one slot."""
    pair = tl.program_id(0)
    slot = tl.load(slots + pair).to(tl.int64)
    if slot < 0:
        return
    if ROWS > 1:
        each = tl.arange(0, PAIRS)
        earlier = tl.load(slots + each, mask=each < pair, other=-1)
        if tl.sum((earlier == slot).to(tl.int32), axis=0) > 0:
            return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    N: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
    if GATED:
        n = tl.arange(0, N)
        if INTERLEAVED:
            row = tl.program_id(1) * N + n
            used = row < 2 * width
        else:
            local = tl.program_id(1) * COLUMNS + n % COLUMNS
            row = local + (n // COLUMNS) * width
            used = local < width
    else:
        row = column
        used = column < width
    base = weight + slot * slot_stride + row.to(tl.int64)[:, None] * n_stride
    token = tl.arange(0, ROWS)
    if ROWS == 1:
        total = tl.zeros((N, DEPTH), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, N), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        k = start + tl.arange(0, DEPTH)
        right = tl.load(
            base + k[None, :] * k_stride, mask=used[:, None] & (k < D)[None, :], other=0.0
        )
        if ROWS == 1:
            left = tl.load(hidden + k, mask=k < D, other=0.0)
        else:
            left = tl.load(
                hidden + token[:, None] * hidden_stride + k[None, :],
                mask=(token < T)[:, None] & (k < D)[None, :],
                other=0.0,
            )
        total = projected(left, right, total, ROWS == 1, UPCAST)
    if ROWS == 1:
        total = tl.sum(total, axis=1)[None, :]
    if bias is not None:
        total += tl.load(bias + slot * bias_stride + row, mask=used, other=0.0).to(tl.float32)[
            None, :
        ]
    value = activated(
        total, ROWS, COLUMNS, FUNCTION, GATED, INTERLEAVED, CLAMP, limit, alpha, shift
    ).to(inner.dtype.element_ty)
    inside = (column < width)[None, :]
    if ROWS == 1:
        tl.store(inner + pair * width + column[None, :], value, mask=inside)
    else:
        for choice in range(K):
            own = token * K + choice
            chose = tl.load(slots + own, mask=token < T, other=-1) == slot
            tl.store(
                inner + own[:, None] * width + column[None, :], value, mask=chose[:, None] & inside
            )


def _down(
    inner: tl.tensor,
    slots: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    parts: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    width: tl.tensor,
    outputs: tl.tensor,
    pairs: tl.tensor,
    slot_stride: tl.tensor,
    n_stride: tl.tensor,
    k_stride: tl.tensor,
    bias_stride: tl.tensor,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARE: tl.constexpr,
    UPCAST: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """`parts [splits, T * K, D']`: down's product over SHARE inputs, for COLUMNS outputs."""
    pair = tl.program_id(0)
    split = tl.program_id(2)
    slot = tl.load(slots + pair).to(tl.int64)
    if slot < 0:
        return
    token = tl.arange(0, ROWS)
    first = tl.full((ROWS,), -1, dtype=tl.int32)
    if ROWS > 1:
        each = tl.arange(0, PAIRS)
        earlier = tl.load(slots + each, mask=each < pair, other=-1)
        if tl.sum((earlier == slot).to(tl.int32), axis=0) > 0:
            return
        # Where a token has its inputs: at the last of its choices that is this slot; -1 for none.
        for choice in range(K):
            chose = tl.load(slots + token * K + choice, mask=token < T, other=-1) == slot
            first = tl.where(chose, token * K + choice, first)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = n < outputs
    base = weight + slot * slot_stride + n.to(tl.int64)[:, None] * n_stride
    if ROWS == 1:
        total = tl.zeros((COLUMNS, DEPTH), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(split * SHARE, tl.minimum((split + 1) * SHARE, width), DEPTH):
        k = start + tl.arange(0, DEPTH)
        right = tl.load(
            base + k[None, :] * k_stride, mask=used[:, None] & (k < width)[None, :], other=0.0
        )
        if ROWS == 1:
            left = tl.load(inner + pair * width + k, mask=k < width, other=0.0)
        else:
            left = tl.load(
                inner + first[:, None] * width + k[None, :],
                mask=(first >= 0)[:, None] & (k < width)[None, :],
                other=0.0,
            )
        total = projected(left, right, total, ROWS == 1, UPCAST)
    if ROWS == 1:
        total = tl.sum(total, axis=1)[None, :]
    if bias is not None:
        added = tl.load(bias + slot * bias_stride + n, mask=used & (split == 0), other=0.0)
        total += added.to(tl.float32)[None, :]
    out = parts + split.to(tl.int64) * pairs * outputs + n[None, :]
    if ROWS == 1:
        tl.store(out + pair * outputs, total, mask=used[None, :])
    else:
        for choice in range(K):
            own = token * K + choice
            chose = tl.load(slots + own, mask=token < T, other=-1) == slot
            tl.store(out + own[:, None] * outputs, total, mask=chose[:, None] & used[None, :])


@cache
def _kernel(name: str, one: bool, transposed: bool) -> Any:
    """The kernel and the configurations that are tried once for each shape."""
    globals().update(scope())  # first: it says what is wrong with a broken Triton
    import triton

    if interpreted():
        tried = [(16, 4, 1)]
    elif transposed:
        # Outputs lie side by side: a block of few would read too little of each row.
        tried = [(64, 4, 2)] if one else [(64, 4, 3), (64, 4, 4)]
    elif one:
        tried = [(8, 4, 2), (8, 8, 2), (16, 8, 2), (16, 8, 3)]
    else:
        tried = [(16, 4, 4), (32, 4, 3), (32, 4, 4), (64, 4, 3)]
    configs = [
        triton.Config({"COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for columns, warps, stages in tried
    ]
    keys = ["ROWS", "K", "width", "D" if name == "up" else "outputs"]
    return triton.autotune(configs=configs, key=keys)(triton.jit(_up if name == "up" else _down))


def _depth(size: int, itemsize: int, *, one: bool, transposed: bool) -> int:
    """Inputs that one step of a loop takes: fixed by the shape, since it orders the sum."""
    if interpreted():
        return 16
    deepest = (32 if transposed else 1024 // itemsize) if one else 256 // itemsize
    return max(16, min(deepest, power_of_two(size)))


def _shares(experts: Experts, depth: int, programs: int) -> tuple[int, int]:
    """In how many parts down's inputs are split, and inputs of each; fixed by the shape."""
    steps = -(-experts.width // depth)
    splits = max(1, min(steps, _FILL // programs, 8))
    share = -(-steps // splits) * depth
    return -(-experts.width // share), share


def decode_parts(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    experts: Experts,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contributions of a layer's pairs, at most `DECODE_TOKENS` tokens.

    Args:
        hidden: `[T, D]`, rows contiguous.
        slots: int32 or int64 `[T, K]`, contiguous; -1 where the expert is not here.
        into: an earlier result for the same T and K, to which these pairs are added.

    Returns:
        float32 `[splits, T * K, D']` before routing weights, the sum over splits being the
        contribution; rows of pairs with slot -1 are left as they are.
    """
    tokens, choices = slots.shape
    pairs, one, width = tokens * choices, tokens == 1, experts.width
    rows = 1 if one else max(_LEAST_ROWS, power_of_two(tokens))
    itemsize = experts.up.element_size()
    shape = {"ROWS": rows, "PAIRS": power_of_two(pairs), "UPCAST": experts.upcast}
    inner = torch.empty(pairs, width, dtype=hidden.dtype, device=hidden.device)
    bias = experts.up_bias
    _kernel("up", one, experts.transposed)[
        lambda meta: (pairs, -(-width // meta["COLUMNS"]))
    ](
        hidden, slots, experts.up, bias, inner, tokens, choices, hidden.shape[1], width,
        hidden.stride(0), *experts.up_strides, 0 if bias is None else bias.stride(0),
        **experts.activation, **shape,
        DEPTH=_depth(hidden.shape[1], itemsize, one=one, transposed=experts.transposed),
    )  # fmt: skip
    depth = _depth(width, itemsize, one=one, transposed=experts.transposed)
    # At least the experts of one token are active, in blocks of 16 outputs.
    splits, share = _shares(experts, depth, choices * -(-experts.outputs // 16))
    if into is None:
        into = torch.empty(
            splits, pairs, experts.outputs, dtype=torch.float32, device=hidden.device
        )
    bias = experts.down_bias
    _kernel("down", one, experts.transposed)[
        lambda meta: (pairs, -(-experts.outputs // meta["COLUMNS"]), splits)
    ](
        inner, slots, experts.down, bias, into, tokens, choices, width, experts.outputs, pairs,
        *experts.down_strides, 0 if bias is None else bias.stride(0),
        **shape, DEPTH=depth, SHARE=share,
    )  # fmt: skip
    return into
