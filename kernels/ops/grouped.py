"""Experts on a GPU without asking the host: tokens sorted by slot, one grouped product each.

Reads the weights where they lie in the pool; knows no residency and no routing weights.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from moe_runtime.kernels.reference import ExpertForm, slot_mlp

__all__ = ["grouped_experts"]

_log = logging.getLogger(__name__)


def grouped_experts(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    form: ExpertForm,
) -> torch.Tensor:
    """Apply to each row the expert in its slot; nothing here waits for the device.

    Shapes and types that PyTorch's grouped product refuses (rows that are no multiple of 16 bytes,
    float64) go through the reference, slot by slot, which does wait; the log says so once.

    Args:
        hidden: `[n, D]`.
        slots: int64 `[n]`, slot of each row's expert.
        pool: each tensor of an expert over all slots, `[S, ...]`.

    Returns:
        `[n, D']` in the order of the rows, before routing weights.
    """
    try:
        return _grouped(hidden, slots, pool, form)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
    rows = hidden.to(pool[form.up].dtype)
    out = slot_mlp(rows, slots.unsqueeze(1), pool, form).squeeze(1)
    # Said when the reference has managed: what is wrong otherwise has an error of its own there.
    _say_refused(tuple(pool[form.up].shape[1:]), tuple(pool[form.down].shape[1:]), rows.dtype, why)
    return out


@cache
def _say_refused(up: tuple[int, ...], down: tuple[int, ...], dtype: torch.dtype, why: str) -> None:
    _log.warning(
        "experts of %s and %s in %s are computed one by one, by the reference: the grouped product "
        "does not take them (%s)", up, down, dtype, why,
    )  # fmt: skip


def _grouped(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    form: ExpertForm,
) -> torch.Tensor:
    order = torch.argsort(slots, stable=True)
    ranked = slots[order]
    edges = torch.arange(1, pool[0].shape[0] + 1, device=slots.device)
    ends = torch.searchsorted(ranked, edges).to(torch.int32)
    inner = _product(hidden[order], pool[form.up], ends, form.transposed)
    if form.up_bias is not None:
        inner = inner + pool[form.up_bias][ranked]
    inner = form.activation(inner)
    out = _product(inner, pool[form.down], ends, form.transposed)
    if form.down_bias is not None:
        out = out + pool[form.down_bias][ranked]
    if form.finish is not None:
        out = form.finish(out)
    result = torch.empty_like(out)
    result[order] = out
    return result


def _product(
    rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, transposed: bool
) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(
        rows.to(weight.dtype), weight if transposed else weight.transpose(-2, -1), offs=ends
    )
