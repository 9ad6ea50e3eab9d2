"""Memory that a device may refuse: as many slots as it grants, said once, or an error with numbers.

Knows plans, pools and how a device is asked; not which experts the slots are for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from moe_runtime.budget import BudgetPlan, Shrunk
from moe_runtime.core import format_bytes
from moe_runtime.device import Device
from moe_runtime.errors import BudgetError
from moe_runtime.memory import free_memory, hand_back, refusal
from moe_runtime.model_spec import MoESpec
from moe_runtime.slots import RowBlocks, SlotPool, slot_bytes
from moe_runtime.store import HostTier

__all__ = ["Granted", "allocate_host_tier", "allocate_pools", "dense_memory", "most_granted"]

T = TypeVar("T")
Counts = tuple[int, ...]

_LOG = logging.getLogger("moe_runtime")
_HALVINGS = 6  # finds what fits to a 64th of what was asked for


@dataclass(frozen=True, kw_only=True)
class Granted(Generic[T]):
    """What came of asking for memory.

    Args:
        made: what was made; None if not even the least could be.
        counts: slots of each expert shape that it has.
        roomy: whether the room was there beside it.
        why: what was said when more was asked for; empty if all of it was there.
    """

    made: T | None
    counts: Counts
    roomy: bool = True
    why: str = ""


def most_granted(
    make: Callable[[Counts], T],
    asked: Counts,
    least: Counts,
    room: Callable[[], torch.Tensor],
) -> Granted[T]:
    """Make something of as many slots as there is memory for.

    What was asked for is taken at its word. If that is refused, halving finds the most that leaves
    `room`, shapes shrinking together; the least is tried without the room too. Between two tries
    nothing is held.

    Args:
        make: makes it, of this many slots of each shape.
        asked, least: slots of each shape.
        room: allocates what is to be left free beside fewer slots than were asked for.
    """

    def beside_room(counts: Counts) -> T:
        kept = room()
        made = make(counts)
        del kept
        return made

    made, why = _tried(make, asked)
    if made is not None:
        return Granted(made=made, counts=asked)
    fits, below, above = least, 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (below + above) / 2
        counts = tuple(a + int(share * (b - a)) for a, b in zip(least, asked, strict=True))
        if _tried(beside_room, counts)[0] is None:
            above = share
        else:
            fits, below = counts, share
    for counts in dict.fromkeys((fits, least)):
        made, _ = _tried(beside_room, counts)
        if made is not None:
            return Granted(made=made, counts=counts, why=why)
    made, _ = _tried(make, least)
    return Granted(made=made, counts=least, roomy=False, why=why)


def _tried(make: Callable[[Counts], T], counts: Counts) -> tuple[T | None, str]:
    """(what was made, empty), or (None, what the device said)."""
    try:
        return make(counts), ""
    except (RuntimeError, MemoryError, OSError) as error:
        why = refusal(error)
        if not why:
            raise
    # Here the error is gone, and with its frames what had been allocated before it.
    return None, why


def allocate_pools(
    spec: MoESpec,
    plan: BudgetPlan,
    device: Device,
    *,
    rows: Sequence[RowBlocks | None],
    least: Sequence[int],
    room: int,
) -> tuple[list[SlotPool], BudgetPlan]:
    """The pools of a plan, with fewer slots where the device has no memory for all of them.

    Fewer slots are said in the log, and in the plan that is returned.

    Args:
        rows: for each expert shape how its slots hold weights.
        least: slots of each shape that it does not work without.
        room: bytes to leave free beside fewer slots than planned.

    Raises:
        BudgetError: not even the least is there; says what is. Nothing stays allocated.
    """

    def make(counts: Counts) -> list[SlotPool]:
        return [
            SlotPool(params, count, device.allocate, rows=one)
            for params, count, one in zip(spec.groups, counts, rows, strict=True)
        ]

    def nbytes(counts: Sequence[int]) -> int:
        sizes = (slot_bytes(g, rows=one) for g, one in zip(spec.groups, rows, strict=True))
        return sum(size * count for size, count in zip(sizes, counts, strict=True))

    granted = most_granted(make, plan.slots, tuple(least), lambda: device.allocate(room))
    place = device.torch_device
    if granted.made is None:
        hand_back(place)
        raise BudgetError(
            f"out of memory on {place}: {format_bytes(plan.pools)} for {sum(plan.slots)} expert "
            f"slots were refused ({granted.why}), and so was the least that works, {sum(least)} "
            f"slots of {format_bytes(nbytes(least))} in all; {format_bytes(free_memory(place))} "
            f"are free. {_remedy(place)}"
        )
    if not granted.why:
        return granted.made, plan
    got = nbytes(granted.counts)
    left = f"{format_bytes(room)} left free beside them" if granted.roomy else "nothing left free"
    change = (
        f"out of memory on {place}: {sum(granted.counts)} slots ({format_bytes(got)}) instead of "
        f"{sum(plan.slots)} ({format_bytes(plan.pools)}), {left} ({granted.why})"
    )
    _LOG.warning("%s", change)
    return granted.made, replace(
        plan,
        slots=granted.counts,
        pools=got,
        explanation=f"{plan.explanation}; {change}",
        shrunk=Shrunk(asked=plan.slots, nbytes=plan.pools, why=granted.why),
    )


def allocate_host_tier(
    spec: MoESpec,
    asked: Counts,
    device: Device,
    *,
    least: Counts,
    finish: Callable[[Any], None],
) -> tuple[HostTier, str]:
    """(host memory for experts beside a device, what the log says of it if it is less than asked).

    Args:
        asked, least: slots of each expert shape.
        finish: blocks until whoever a token is of is done with the memory.

    Raises:
        BudgetError: not even the least can be had. Nothing stays allocated.
    """

    def make(counts: Counts) -> HostTier:
        return HostTier(spec, counts, device.allocate_host, finish)

    def nbytes(counts: Counts) -> str:
        sizes = map(slot_bytes, spec.groups)
        return format_bytes(sum(size * n for size, n in zip(sizes, counts, strict=True)))

    granted = most_granted(make, asked, least, lambda: torch.empty(0))
    if granted.made is None:
        raise BudgetError(
            f"out of pinned host memory: {nbytes(asked)} for {sum(asked)} experts were refused "
            f"({granted.why}), and so were {nbytes(least)} for as many as have slots on "
            f"{device.torch_device}. Raise the limit of locked memory (ulimit -l), free host "
            "memory, or give a smaller expert_budget="
        )
    if not granted.why:
        return granted.made, ""
    change = (
        f"out of pinned host memory: {sum(granted.counts)} experts ({nbytes(granted.counts)}) "
        f"instead of {sum(asked)} ({nbytes(asked)}) ({granted.why})"
    )
    _LOG.warning("%s", change)
    return granted.made, change


@contextmanager
def dense_memory(spec: MoESpec, device: torch.device) -> Iterator[None]:
    """Around moving all weights but experts to a device: says with numbers that they do not fit.

    Raises:
        BudgetError: the device refused memory inside the block.
    """
    why = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        why = refusal(error)
        if not why:
            raise
    if why:
        hand_back(device)
        raise BudgetError(
            f"out of memory on {device}: the weights other than experts take "
            f"{format_bytes(spec.dense_bytes)}, and {format_bytes(free_memory(device))} are free "
            f"({why}). {_remedy(device)}"
        )


def _remedy(device: torch.device) -> str:
    if device.type == "cpu":
        return "Free memory or raise the limit of this process, or load with a smaller dtype="
    return "Free memory there, load with a smaller dtype=, or compute with device='cpu'"
