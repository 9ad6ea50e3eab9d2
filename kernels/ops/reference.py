"""The specification, in plain PyTorch: one expert's MLP on its tokens, and a layer's over slots.

Knows the layouts that transformers' experts declare; knows no residency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from moe_runtime.kernels.gate import Gate
from torch.nn import functional

__all__ = ["ExpertForm", "combine", "expert_mlp", "project", "slot_mlp"]

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertForm:
    """How an experts module computes, as it declares itself.

    Args:
        up, down: places of the two weights among an expert's tensors.
        up_bias, down_bias: places of the biases, or None.
        transposed: weights are `[in, out]` instead of `[out, in]`, or `[out / width, in, width]`.
        activation: `[n, U] -> [n, I]`, row by row: the gate and its product with up, or the plain
            activation function of an expert without gate.
        finish: `[n, D] -> [n, D]`, applied to the output before the routing weight, or None.
        gate: the same as `activation` as a value, where it is known and wanted, else None.
    """

    up: int
    down: int
    up_bias: int | None
    down_bias: int | None
    transposed: bool
    activation: Activation
    finish: Activation | None = None
    gate: Gate | None = None


def project(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`[n, in] -> [n, out]`; the bias is added to the rounded product, as eager does.

    Args:
        weight: `[out, in]`; transposed `[in, out]`, or in blocks of rows, `[blocks, in, width]`.
    """
    if weight.dim() == 3:
        out = torch.matmul(hidden, weight).transpose(0, 1).flatten(1)
    else:
        out = hidden @ weight if transposed else functional.linear(hidden, weight)
    return out if bias is None else out + bias


def expert_mlp(
    hidden: torch.Tensor, tensors: tuple[torch.Tensor, ...], form: ExpertForm
) -> torch.Tensor:
    """One expert on its tokens: `hidden [n, D]`, its tensors, `[n, D']` before routing weights."""
    up_bias = None if form.up_bias is None else tensors[form.up_bias]
    down_bias = None if form.down_bias is None else tensors[form.down_bias]
    inner = form.activation(project(hidden, tensors[form.up], up_bias, form.transposed))
    out = project(inner, tensors[form.down], down_bias, form.transposed)
    return out if form.finish is None else form.finish(out)


def slot_mlp(
    hidden: torch.Tensor, slots: torch.Tensor, pool: tuple[torch.Tensor, ...], form: ExpertForm
) -> torch.Tensor:
    """The contributions of a layer's pairs of token and choice, each expert once with its tokens.

    Args:
        hidden: `[T, D]`.
        slots: integers `[T, K]`, the slot of each choice; -1 where its expert is not here.
        pool: each tensor of an expert over all slots, `[S, ...]`.

    Returns:
        `[T, K, D']` before routing weights; zeros where the slot is -1.
    """
    out: torch.Tensor | None = None
    for slot in slots.unique().tolist():  # ascending
        if slot < 0:
            continue
        tokens, choices = torch.where(slots == slot)
        rows = expert_mlp(hidden[tokens], tuple(stack[slot] for stack in pool), form)
        if out is None:
            out = rows.new_zeros(*slots.shape, rows.shape[-1])
        out[tokens, choices] = rows
    if out is None:
        width = pool[form.down].shape[-1 if form.transposed else -2]
        return hidden.new_zeros(*slots.shape, width)
    return out


def combine(contributions: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum `[T, K, D']` with the routing weights `[T, K]`, choice by choice: `[T, D']`."""
    return (contributions * weights.unsqueeze(-1)).sum(dim=1).to(dtype)
