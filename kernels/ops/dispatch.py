"""`slot_experts`: a layer's experts over a pool of slots, by whichever kernel suits.

Nothing is gathered or copied to be computed, and on a GPU nothing waits for the device. Knows no
residency: a slot of -1 is an expert that is not here.
"""

from __future__ import annotations

import logging
import subprocess
from functools import cache

import torch
from moe_runtime.kernels.cpu import decode_loop
from moe_runtime.kernels.grouped import grouped_experts
from moe_runtime.kernels.reference import ExpertForm, combine, slot_mlp
from moe_runtime.kernels.triton_decode import DECODE_TOKENS, decode_parts
from moe_runtime.kernels.triton_parts import combine_parts, experts_of, is_installed
from moe_runtime.kernels.triton_prefill import prefill_parts

__all__ = ["combined", "contributions", "slot_experts", "triton_takes"]

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_failures: list[str] = []  # why Triton is not asked any more in this process; empty while it is


def triton_takes(hidden: torch.Tensor, pool: tuple[torch.Tensor, ...], form: ExpertForm) -> bool:
    """Whether the Triton kernels can compute this: gate known, one dtype, and no failure so far.

    Says nothing about the device. The log says once why they cannot; of an unknown gate `recognise`
    and of a failure `_give_up` have said it.
    """
    why = _why_not(hidden, pool, form)
    if why and form.gate is not None and not _failures:
        _say_not_taken(why)
    return not why


def _why_not(hidden: torch.Tensor, pool: tuple[torch.Tensor, ...], form: ExpertForm) -> str:
    """Why the Triton kernels cannot compute this; empty if they can."""
    if form.gate is None:
        return "the gate is unknown"
    if hidden.dtype not in _DTYPES or any(stack.dtype != hidden.dtype for stack in pool):
        held = ", ".join(sorted({str(stack.dtype) for stack in pool}))
        return f"hidden is {hidden.dtype} and experts are {held}; one of {_DTYPES} is taken"
    if _failures:
        return _failures[0]
    return "" if is_installed() else "Triton is not installed (pip install triton)"


@cache
def _say_not_taken(why: str) -> None:
    _log.warning("experts are computed by PyTorch, not by Triton kernels: %s", why)


def contributions(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    form: ExpertForm,
    into: torch.Tensor | None = None,
    *,
    distinct: int,
    kernel: str = "auto",
) -> torch.Tensor:
    """What each pair of token and choice contributes, for the pairs whose expert is here.

    Calls with the same T and K may fill one result bit by bit, as experts arrive; the bits of a
    pair do not depend on the call that computes it.

    Args:
        hidden: `[T, D]`.
        slots: integers `[T, K]`; -1 where the expert is not here.
        pool: each tensor of an expert over all slots, `[S, ...]`.
        into: an earlier result to add to.
        distinct: no more different slots than this occur.
        kernel: `"triton"`, `"plain"` (PyTorch), or `"auto"`: Triton on a GPU if it takes this.

    Returns:
        `[splits, T * K, D']` before routing weights, to be summed over splits; rows of pairs that
        no call has computed hold anything.
    """
    if kernel == "auto":
        fits = hidden.is_cuda and triton_takes(hidden, pool, form)
        kernel = "triton" if fits else "plain"
    slots = slots.contiguous()
    if kernel == "triton" and not _failures:
        try:
            return _by_triton(hidden, slots, pool, form, into, distinct)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except _compiler_errors() as error:
            _give_up(error)
    values = _plain(hidden, slots, pool, form)
    if into is None:
        return values.unsqueeze(0)
    here = (slots >= 0).view(-1, 1)
    into[0] = torch.where(here, values.to(into.dtype), into[0])
    into[1:].masked_fill_(here, 0)
    return into


def combined(
    parts: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    form: ExpertForm,
    dtype: torch.dtype,
    *,
    kernel: str = "auto",
) -> torch.Tensor:
    """Sum contributions with the routing weights, choice by choice.

    Args:
        parts: what `contributions` returned.
        slots: `[T, K]`, -1 exactly where no contribution was computed.
        weights: `[T, K]`.

    Returns:
        `[T, D']` of this dtype.
    """
    slots = slots.contiguous()
    wanted = kernel == "triton" or (kernel == "auto" and parts.is_cuda and is_installed())
    if wanted and form.finish is None and not _failures:
        try:
            return combine_parts(parts, slots, weights, dtype)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except _compiler_errors() as error:
            _give_up(error)
    values = parts[0] if len(parts) == 1 else parts.sum(0)
    values = values.masked_fill((slots < 0).view(-1, 1), 0)
    if form.finish is not None:
        # What was not computed must not come back as a norm's bias.
        values = form.finish(values.to(dtype)).masked_fill((slots < 0).view(-1, 1), 0)
    # Nor does the weight of what is not here count, be it NaN.
    return combine(values.view(*slots.shape, -1), weights.masked_fill(slots < 0, 0), dtype)


def slot_experts(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    form: ExpertForm,
    *,
    distinct: int | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """The expert MLP of a whole layer over slots.

    Args:
        hidden: `[T, D]`.
        slots: integers `[T, K]`, the slot of each choice; -1 contributes nothing.
        weights: `[T, K]`, routing weights.
        pool: each tensor of an expert over all slots: up `[S, 2I, D]` (or as `form` says), down
            `[S, D', I]`, biases.
        distinct: no more different slots than this occur; all slots unless given. A good bound (the
            layer's experts) keeps empty tiles few.
        kernel: `"auto"` (by device, dtype and number of tokens), `"triton"` or `"plain"`.

    Returns:
        `[T, D']` in the dtype of hidden.

    Raises:
        ValueError: shapes, types or slots that do not fit, or `kernel="triton"` for what Triton
            does not take. On a GPU slots of `S` and more are not noticed, which would wait for the
            device: they read memory that is not the pool's.
    """
    _check(hidden, slots, weights, pool, form)
    if kernel not in ("auto", "triton", "plain"):
        raise ValueError(f"kernel={kernel!r}: known are auto, triton, plain")
    if kernel == "triton" and (why := _why_not(hidden, pool, form)):
        raise ValueError(
            f"kernel='triton' cannot be used: {why}. It needs Triton, a "
            f"known gate ({form.gate}) and one dtype for hidden and pool "
            f"({hidden.dtype}, {pool[0].dtype}); use kernel='auto'"
        )
    if slots.numel() == 0:
        width = pool[form.down].shape[-1 if form.transposed else -2]
        return hidden.new_zeros(len(hidden), width)
    bound = min(len(pool[0]), slots.numel()) if distinct is None else distinct
    parts = contributions(hidden, slots, pool, form, distinct=bound, kernel=kernel)
    return combined(parts, slots, weights, form, hidden.dtype, kernel=kernel)


def _check(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    form: ExpertForm,
) -> None:
    """Raise a ValueError for what a kernel would compute with all the same, or stumble over."""
    if slots.shape != weights.shape or slots.dim() != 2 or len(slots) != len(hidden):
        raise ValueError(
            f"slots {tuple(slots.shape)} and weights {tuple(weights.shape)} must both be [T, K] "
            f"with hidden's T = {len(hidden)}"
        )
    inputs = pool[form.up].shape[-2 if form.transposed else -1]
    if hidden.dim() != 2 or hidden.shape[1] != inputs:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be [T, D] with the experts' D = {inputs}; flatten "
            "batch and sequence first"
        )
    if slots.is_floating_point() or slots.dtype == torch.bool:
        raise ValueError(f"slots are {slots.dtype}, but must be integers")
    if slots.is_cpu and slots.numel() and int(slots.max()) >= len(pool[0]):
        raise ValueError(f"slot {int(slots.max())} is none of the pool's 0 to {len(pool[0]) - 1}")
    if hidden.is_cpu and hidden.dtype != pool[form.up].dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and the experts are {pool[form.up].dtype}; convert one"
        )


def _by_triton(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    form: ExpertForm,
    into: torch.Tensor | None,
    distinct: int,
) -> torch.Tensor:
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    experts = experts_of(pool, form)
    if len(hidden) <= DECODE_TOKENS:
        return decode_parts(hidden, slots, experts, into)
    return prefill_parts(hidden, slots, experts, into, distinct=distinct)


def _plain(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    form: ExpertForm,
) -> torch.Tensor:
    """`[T * K, D']` without Triton and without `finish`, which `combined` applies."""
    bare = ExpertForm(**{**form.__dict__, "finish": None})
    choices = slots.shape[1]
    if not hidden.is_cpu:
        rows = hidden.repeat_interleave(choices, dim=0)
        return grouped_experts(rows, slots.view(-1).clamp_min(0), pool, bare)
    if len(hidden) > 1:
        return slot_mlp(hidden, slots, pool, bare).flatten(0, 1)
    present = [(at, slot) for at, slot in enumerate(slots[0].tolist()) if slot >= 0]
    width = pool[form.down].shape[-1 if form.transposed else -2]
    out = hidden.new_zeros(choices, width)
    if present:
        held = [tuple(stack[slot] for stack in pool) for _, slot in present]
        out[[at for at, _ in present]] = decode_loop(hidden, held, bare)
    return out


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What goes wrong when a kernel is built or does not fit this GPU, or Triton is broken."""
    plain = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError
    except Exception:  # noqa: BLE001  a broken installation may raise anything
        return plain
    return (TritonError, *plain)


def _give_up(error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if not _failures:
        _log.warning(
            "Triton kernels cannot run here, experts are computed by PyTorch from now on: %s",
            reason,
        )
    _failures.append(reason)
