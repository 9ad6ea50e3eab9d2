"""From a budget to slots: how many experts of each shape fit, staging included.

Arithmetic on a spec and a number of bytes; `auto` reads free memory. Moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from moe_runtime.core import format_bytes, parse_bytes, parse_share
from moe_runtime.errors import BudgetError
from moe_runtime.hardware.values import HardwareProfile
from moe_runtime.kv_cache import kv_bytes
from moe_runtime.memory import free_memory
from moe_runtime.model_spec import MoESpec
from moe_runtime.slots import RowBlocks, slot_bytes
from moe_runtime.store import bounce_bytes

__all__ = [
    "BudgetPlan",
    "Shrunk",
    "least_budget",
    "least_slots",
    "plan_budget",
    "resolve_budget",
    "working_room",
]

_MAX_CHUNK = 1 << 20
_MIN_CHUNK = 4096
_MARGIN = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """Slots that there was no memory for, so that a plan has fewer.

    Args:
        asked: slots of each expert shape before.
        nbytes: bytes of them.
        why: what was said when they were asked for.
    """

    asked: tuple[int, ...]
    nbytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What a budget holds.

    Args:
        total: bytes granted.
        slots: slots of each expert shape, in the order of `MoESpec.groups`.
        chunk: largest piece that a reader reads at once, in bytes.
        threads: readers that the staging is for, at most those asked for.
        staging: bytes of all their buffers.
        pools: bytes of all slots.
        explanation: one sentence for people.
        shrunk: what was planned before memory ran out; None if all of it was there.
    """

    total: int
    slots: tuple[int, ...]
    chunk: int
    threads: int
    staging: int
    pools: int
    explanation: str
    shrunk: Shrunk | None = None

    @property
    def used(self) -> int:
        """Bytes that the fast tier spends on experts."""
        return self.pools + self.staging


def resolve_budget(
    budget: int | str,
    spec: MoESpec,
    config: PreTrainedConfig,
    device: torch.device,
    *,
    threads: int,
    rows: Sequence[RowBlocks | None] | None = None,
    batch: int = 1,
    length: int = 4096,
    dense: int = 0,
    profile: HardwareProfile | None = None,
) -> tuple[int, str]:
    """(bytes, one sentence that says how they were chosen).

    A share is one of the bytes of all experts; 100 % and more means that every expert fits, with
    the staging that it takes to read them. `"auto"` is what is free now less the room for what else
    is to come, and no more than all experts take.

    Args:
        batch, length: sequences, and tokens of each, whose keys and values are left room for.
        dense: bytes of other weights that count as free now, but are wanted.
        profile: what was measured of this machine: says what an expert that does not fit costs.
    """
    everything = _whole(spec, threads, rows)
    share = None if isinstance(budget, int) else parse_share(budget)
    if share is not None:
        total = int(share * spec.total_expert_bytes)
        total = max(total, everything) if share >= 1 else total
        return total, f"{budget} of {format_bytes(spec.total_expert_bytes)} of experts"
    if budget != "auto":
        total = parse_bytes(budget)
        return total, f"{format_bytes(total)} as asked"
    free = free_memory(device)
    cache = kv_bytes(config, batch=batch, length=length)
    margin = max(_MARGIN, free // 20)
    total = min(max(free - dense - cache - margin, 0), everything)
    tokens = f"{length} tokens" if batch == 1 else f"{batch} times {length} tokens"
    text = f"auto: {format_bytes(free)} free on {device.type}, less "
    text += f"{format_bytes(dense)} for the other weights, " if dense else ""
    text += f"{format_bytes(cache)} for the key/value cache of {tokens} and "
    text += f"{format_bytes(margin)} of margin"
    if total == everything:
        return total, f"{text}; every expert fits"
    return total, text + _miss_words(spec, device, profile, threads)


def working_room(config: PreTrainedConfig, *, batch: int, length: int, nbytes: int) -> int:
    """Bytes to leave free beside slots where memory is short: keys, values and a margin.

    Args:
        batch, length: as for `resolve_budget`.
        nbytes: bytes of the slots that were asked for.
    """
    margin = max(min(_MARGIN, nbytes // 4), nbytes // 20)
    return kv_bytes(config, batch=batch, length=length) + margin


def _miss_words(
    spec: MoESpec, device: torch.device, profile: HardwareProfile | None, threads: int
) -> str:
    """What a missing expert costs by a profile, as the end of a sentence; empty without one."""
    if profile is None:
        return ""
    nbytes = max(layer.expert_bytes for layer in spec.layers)
    ways = {"from disk": profile.read_seconds(nbytes, threads=threads)}
    if device.type == "cuda":
        name = f"cuda:{device.index or 0}"
        if profile.device(name) is None:
            return f"; the hardware profile knows no {name}, measure again"
        ways["from pinned memory"] = profile.copy_seconds(name, nbytes)
    told = [f"{1e3 * seconds:.2g} ms {way}" for way, seconds in ways.items() if seconds]
    if not told:
        return ""
    when = profile.measured.split("T", 1)[0]
    return f"; one that does not fit takes about {' or '.join(told)} (measured {when})"


def _sizes(spec: MoESpec, rows: Sequence[RowBlocks | None] | None) -> list[int]:
    """Bytes of a slot of each expert shape."""
    lie = rows or [None] * len(spec.groups)
    return [slot_bytes(group, rows=one) for group, one in zip(spec.groups, lie, strict=True)]


def _whole(spec: MoESpec, threads: int, rows: Sequence[RowBlocks | None] | None) -> int:
    """A budget in which every expert has a slot."""
    sizes = _sizes(spec, rows)
    slots = sum(
        layer.num_experts * sizes[spec.group_of(at)] for at, layer in enumerate(spec.layers)
    )
    largest = max(param.nbytes for params in spec.groups for param in params)
    return slots + threads * bounce_bytes(min(largest, _MAX_CHUNK))


def _chunk(total: int, threads: int, largest: int, floor: int) -> int:
    """Piece size: large enough for the disk, small beside the budget."""
    fair = max(_MIN_CHUNK, total // 32 // threads)
    return max(floor, min(_MAX_CHUNK, largest, fair))


def least_budget(
    spec: MoESpec,
    *,
    threads: int,
    floor: int,
    disk: bool,
    rows: Sequence[RowBlocks | None] | None = None,
    pinned: Sequence[int] = (),
) -> int:
    """The smallest budget that works: one layer's top-k of each shape, and staging.

    Args:
        pinned: as for `plan_budget`.
    """
    need = least_slots(spec, pinned)
    pools = sum(count * size for count, size in zip(need, _sizes(spec, rows), strict=True))
    if not disk:
        return pools
    # The piece size depends on the budget, weakly: the fixed point is reached at once or twice.
    total = pools
    largest = max(param.nbytes for params in spec.groups for param in params)
    for _ in range(4):
        chunk = _chunk(total, threads, largest, floor)
        total = pools + _readers(total, threads, chunk) * bounce_bytes(chunk)
    return total


def _readers(total: int, threads: int, chunk: int) -> int:
    """Reader threads: fewer than asked for where their buffers would take much of the budget."""
    return max(1, min(threads, total // 8 // bounce_bytes(chunk)))


def least_slots(spec: MoESpec, pinned: Sequence[int]) -> list[int]:
    """Slots of each shape: those of pinned experts, and one token's others of any one layer.

    One free slot would be enough to compute with, expert after expert; with fewer than these each
    token would evict its own experts.
    """
    held, free = [0] * len(spec.groups), [0] * len(spec.groups)
    for position, layer in enumerate(spec.layers):
        group = spec.group_of(position)
        stays = pinned[position] if pinned else 0
        held[group] += stays
        free[group] = max(free[group], min(layer.top_k, layer.num_experts - stays))
    return [stays + least for stays, least in zip(held, free, strict=True)]


def plan_budget(
    spec: MoESpec,
    total: int,
    explanation: str,
    *,
    threads: int,
    floor: int,
    disk: bool,
    rows: Sequence[RowBlocks | None] | None = None,
    pinned: Sequence[int] = (),
) -> BudgetPlan:
    """Cut a budget into staging and slots.

    Args:
        total: bytes.
        threads: reader threads, each with a bounce buffer.
        floor: the smallest piece that can be read (a row that is converted on the way).
        disk: whether anything is read from disk at all.
        rows: for each expert shape how its slots hold weights; as the model unless given.
        pinned: for each layer how many of its experts stay in their slots; none if not given.

    Raises:
        BudgetError: less than one layer's top-k fits beside the pinned experts; says the least
            that works.
    """
    largest = max(param.nbytes for params in spec.groups for param in params)
    chunk = _chunk(total, threads, largest, floor)
    readers = _readers(total, threads, chunk)
    staging = readers * bounce_bytes(chunk) if disk else 0
    least = least_slots(spec, pinned)
    sizes = _sizes(spec, rows)
    whole = [0] * len(sizes)
    for position, layer in enumerate(spec.layers):
        whole[spec.group_of(position)] += layer.num_experts
    base = sum(count * size for count, size in zip(least, sizes, strict=True))
    if staging + base > total:
        smallest = least_budget(
            spec, threads=threads, floor=floor, disk=disk, rows=rows, pinned=pinned
        )
        text = _too_small(spec, total, smallest, staging, max(sizes), pinned)
        # Nobody asked for this number of bytes: say how it came about.
        raise BudgetError(f"{text} ({explanation})" if explanation.startswith("auto") else text)
    # Shapes share what is left in proportion to the bytes of all their experts.
    rest = total - staging - base
    weight = [count * size for count, size in zip(whole, sizes, strict=True)]
    if pinned:
        for position, stays in enumerate(pinned):
            weight[spec.group_of(position)] -= stays * sizes[spec.group_of(position)]
    slots = [
        min(full, floor_ + int(rest * share / (sum(weight) or 1)) // size)
        for full, floor_, share, size in zip(whole, least, weight, sizes, strict=True)
    ]
    pools = sum(count * size for count, size in zip(slots, sizes, strict=True))
    held = sum(slots) / sum(whole)
    text = f"{explanation}: {sum(slots)} slots of {sum(whole)} experts ({held:.1%})"
    if pinned:
        text += f"; {sum(pinned)} experts pinned by the plan"
    return BudgetPlan(
        total=total,
        slots=tuple(slots),
        chunk=chunk,
        threads=readers,
        staging=staging,
        pools=pools,
        explanation=text,
    )


def _too_small(
    spec: MoESpec,
    total: int,
    smallest: int,
    staging: int,
    largest: int,
    pinned: Sequence[int],
) -> str:
    """What to say of a budget that does not hold what it has to."""
    needed = f"one layer's top-k experts ({max(layer.top_k for layer in spec.layers)} of "
    needed += f"{format_bytes(largest)}) and {format_bytes(staging)} of staging"
    least = f"the least that works is {smallest} bytes ({format_bytes(smallest)})"
    if not sum(pinned):
        return (
            f"an expert budget of {format_bytes(total)} ({total} bytes) does not hold {needed}; "
            f"{least}"
        )
    stays = sum(
        count * layer.expert_bytes for count, layer in zip(pinned, spec.layers, strict=True)
    )
    return (
        f"an expert budget of {format_bytes(total)} ({total} bytes) does not hold the "
        f"{sum(pinned)} experts that the plan pins ({format_bytes(stays)}) and besides them "
        f"{needed}: {smallest - total} bytes are missing; {least}, or make a plan that pins less"
    )
