"""What the Triton kernels share: making them, the activation inside them, the sum over choices.

Functions of Triton's language are plain functions here until `scope` has been called: Triton is
imported by the first kernel that is launched, not with this module. Knows no expert layouts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from moe_runtime.kernels.gate import Gate
from moe_runtime.kernels.reference import ExpertForm

if TYPE_CHECKING:
    from triton import language as tl

__all__ = [
    "Experts",
    "activated",
    "combine_parts",
    "experts_of",
    "interpreted",
    "is_installed",
    "power_of_two",
    "projected",
    "scope",
    "tile_and_block",
]

_COMBINED = 1024  # columns that one program sums


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A pool of experts as kernels take it.

    Args:
        up, down: `[S, ...]`, and their biases `[S, out]` or None.
        up_strides, down_strides: elements from slot to slot, from output to output, from input to
            input.
        width: I, what the activation leaves; `outputs`: D', what down leaves.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    up_strides: tuple[int, int, int]
    down_strides: tuple[int, int, int]
    width: int
    outputs: int
    gate: Gate
    transposed: bool

    @property
    def activation(self) -> dict[str, Any]:
        """The gate as arguments of a kernel."""
        gate = self.gate
        return {
            "FUNCTION": gate.function,
            "GATED": gate.gated,
            "INTERLEAVED": gate.interleaved,
            "CLAMP": gate.clamp,
            "limit": gate.limit,
            "alpha": gate.alpha,
            "shift": gate.shift,
        }

    @property
    def upcast(self) -> bool:
        """Whether products must be of float32 (the interpreter, bfloat16)."""
        return interpreted() and self.up.dtype == torch.bfloat16


def experts_of(pool: tuple[torch.Tensor, ...], form: ExpertForm) -> Experts:
    """The pool of a form whose gate is known; nothing is copied."""
    assert form.gate is not None, "the caller checks that the gate is known"
    up, down = pool[form.up], pool[form.down]
    out, into = (-1, -2) if form.transposed else (-2, -1)
    return Experts(
        up=up,
        down=down,
        up_bias=None if form.up_bias is None else pool[form.up_bias],
        down_bias=None if form.down_bias is None else pool[form.down_bias],
        up_strides=(up.stride(0), up.stride(out), up.stride(into)),
        down_strides=(down.stride(0), down.stride(out), down.stride(into)),
        width=up.shape[out] // (2 if form.gate.gated else 1),
        outputs=down.shape[out],
        gate=form.gate,
        transposed=form.transposed,
    )


@cache
def is_installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return importlib.util.find_spec("triton") is not None


@cache
def scope() -> dict[str, Any]:
    """The names that kernels' modules must hold before their kernels are made: `globals()`'s.

    Imports Triton. Kernels and what they call are looked up in their module's globals, by the
    compiler and by the interpreter.
    """
    try:
        import triton
        from triton import language
    except Exception as error:  # a broken installation may raise anything
        raise ImportError(f"Triton cannot be imported: {error!r}") from error

    globals()["tl"] = language
    return {
        "tl": language,
        "activated": triton.jit(activated),
        "projected": triton.jit(projected),
        "tile_and_block": triton.jit(tile_and_block),
    }


@cache
def interpreted() -> bool:
    """Whether Triton runs its interpreter here (`TRITON_INTERPRET`, which Triton itself reads)."""
    return type(scope()["activated"]).__name__ == "InterpretedFunction"


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def activated(
    rows: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CLAMP: tl.constexpr,
    limit: tl.tensor,
    alpha: tl.tensor,
    shift: tl.tensor,
) -> tl.tensor:
    """`kernels.gate.Gate` on float32 `[ROWS, 2 * COLUMNS]`, without a gate `[ROWS, COLUMNS]`.

    With a gate the columns are in the order in which `columns` of the product kernels took them.
    """
    gate = rows
    up = rows
    if GATED:
        if INTERLEAVED:
            pairs = tl.reshape(rows, (ROWS, COLUMNS, 2))
        else:
            pairs = tl.permute(tl.reshape(rows, (ROWS, 2, COLUMNS)), (0, 2, 1))
        gate, up = tl.split(pairs)
    if CLAMP == "before":
        gate = tl.minimum(gate, limit)
    if FUNCTION == "silu":
        gate = gate * tl.sigmoid(alpha * gate)
    elif FUNCTION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        # (1 + tanh z) / 2 is sigmoid(2 z).
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(inner)
    elif FUNCTION == "relu":
        gate = tl.maximum(gate, 0.0)
    elif FUNCTION == "relu2":
        gate = tl.maximum(gate, 0.0)
        gate = gate * gate
    if CLAMP == "after":
        gate = tl.minimum(gate, limit)
    if CLAMP != "none":
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if GATED:
        gate = gate * (up + shift)
    return gate


def projected(
    left: tl.tensor, right: tl.tensor, total: tl.tensor, ONE_ROW: tl.constexpr, UPCAST: tl.constexpr
) -> tl.tensor:
    """Add `left [rows, k]` times `right [n, k]` to a total.

    One row: left is `[k]` and the total `[n, k]`, summed over k by the caller when all is added,
    which streams weights without tensor cores. Else the total is `[rows, n]`.
    """
    if ONE_ROW:
        total += right.to(tl.float32) * left.to(tl.float32)[None, :]
    elif UPCAST:  # the interpreter's `dot` is silently wrong on bfloat16
        total = tl.dot(
            left.to(tl.float32), tl.trans(right.to(tl.float32)), total, input_precision="ieee"
        )
    else:
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


def tile_and_block(tiles: tl.tensor, blocks: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """Tile and block of outputs of this program: GROUP tiles by all blocks at a time."""
    program = tl.program_id(0)
    group = program // (GROUP * blocks)
    size = tl.minimum(tiles - group * GROUP, GROUP)
    within = program - group * GROUP * blocks
    return group * GROUP + within % size, within // size


def _combine(
    parts: tl.tensor,
    slots: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    K: tl.tensor,
    D: tl.tensor,
    pairs: tl.tensor,
    weight_stride: tl.tensor,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program (t, b): token t's columns, choice by choice and split by split."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(K):
        pair = token * K + choice
        here = tl.load(slots + pair) >= 0  # what is not here was never written
        one = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in range(SPLIT):
            place = (split * pairs + pair) * D
            part = tl.load(parts + place + column, mask=inside & here, other=0.0)
            one += part.to(tl.float32)
        weight = tl.load(weights + token * weight_stride + choice).to(tl.float32)
        total += tl.where(here, weight * one, 0.0)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)


@cache
def _combine_kernel() -> Any:
    scope()  # first: it says what is wrong with a broken Triton
    import triton

    return triton.jit(_combine)


def combine_parts(
    parts: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sum contributions in a fixed order, in float32.

    Args:
        parts: `[splits, T * K, D']`; rows of pairs whose slot is -1 are not read.
        slots: int32 or int64 `[T, K]`, contiguous.
        weights: `[T, K]`.

    Returns:
        `[T, D']` of this dtype.
    """
    tokens, choices = slots.shape
    splits, pairs, width = parts.shape
    out = torch.empty(tokens, width, dtype=dtype, device=parts.device)
    if weights.stride(1) != 1:
        weights = weights.contiguous()
    block = min(_COMBINED, power_of_two(width))
    grid = (tokens, -(-width // block))
    _combine_kernel()[grid](
        parts, slots, weights, out, choices, width, pairs, weights.stride(0),
        SPLIT=splits, BLOCK=block,
    )  # fmt: skip
    return out
