"""The specification: one expert's MLP on its tokens, in plain PyTorch.

Knows the layouts that transformers' experts declare; knows no slots and no routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["ExpertForm", "expert_mlp", "project"]

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertForm:
    """How an experts module computes, as it declares itself.

    Args:
        up, down: places of the two weights among an expert's tensors.
        up_bias, down_bias: places of the biases, or None.
        transposed: weights are `[in, out]` instead of `[out, in]`.
        activation: `[n, U] -> [n, I]`, row by row: the gate and its product with up, or the plain
            activation function of an expert without gate.
        finish: `[n, D] -> [n, D]`, applied to the output before the routing weight, or None.
    """

    up: int
    down: int
    up_bias: int | None
    down_bias: int | None
    transposed: bool
    activation: Activation
    finish: Activation | None = None


def project(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`[n, in] -> [n, out]`; the bias is added to the rounded product, as eager does."""
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
