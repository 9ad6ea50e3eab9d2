"""Batch-1 decode on the CPU: several experts on one token, bound by the weights' bandwidth.

Each weight is read once and nothing is gathered; what is between the two products is done for all
experts at once. Knows no slots and no routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from moe_runtime.kernels.reference import ExpertForm, project

__all__ = ["decode_experts"]


def decode_experts(
    hidden: torch.Tensor, experts: Sequence[tuple[torch.Tensor, ...]], form: ExpertForm
) -> torch.Tensor:
    """Some experts on one token.

    Args:
        hidden: `[1, D]`.
        experts: tensors of each of the `n` experts.

    Returns:
        `[n, D']`, before routing weights. Row `i` has the same bits whatever the other experts.
    """
    inner = form.activation(
        torch.cat(
            [project(hidden, e[form.up], _bias(e, form.up_bias), form.transposed) for e in experts]
        )
    )
    out = torch.cat(
        [
            project(row, e[form.down], _bias(e, form.down_bias), form.transposed)
            for e, row in zip(experts, inner.split(1), strict=True)
        ]
    )
    return out if form.finish is None else form.finish(out)


def _bias(tensors: tuple[torch.Tensor, ...], place: int | None) -> torch.Tensor | None:
    return None if place is None else tensors[place]
