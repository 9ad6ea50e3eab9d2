"""Steered experts stay in their slots while a block of steering is active.

Knows the runtime's cache and how experts get into it; not what steering does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from moe_runtime.core import format_bytes
from moe_runtime.errors import AttachError, BudgetError
from moe_runtime.runtime import Runtime

__all__ = ["keep_in_slots"]


@contextmanager
def keep_in_slots(runtime: Runtime | None, experts: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Load these experts of `(layer, expert)` and keep them until the block ends.

    What a plan or another block keeps stays when this one ends.

    Raises:
        AttachError: no runtime.
        BudgetError: too few slots beside those that a token's other experts need.
        ExpertReadError: one could not be read; none is kept then.
    """
    if runtime is None:
        raise AttachError(
            "pin=True keeps experts in a runtime's slots, but this model has no runtime: load it "
            "with moe_runtime.from_pretrained, call moe_runtime.attach(model), or leave pin out"
        )
    grid = runtime.spec.grid
    wanted: list[list[int]] = [[] for _ in grid.layers]
    for layer, expert in experts:
        wanted[grid.position[layer]].append(expert)
    executor = runtime.executor
    with executor.exclusive():
        _require_room(runtime, wanted)
        executor.keep(wanted)
    try:
        yield
    finally:
        executor.let_go(wanted)


def _require_room(runtime: Runtime, wanted: list[list[int]]) -> None:
    """BudgetError unless each pool has slots for what stays and for one token's other experts."""
    cache, spec = runtime.cache, runtime.spec
    stays, others = [0] * len(cache.slots), [0] * len(cache.slots)
    total = [0] * len(cache.slots)
    for position, layer in enumerate(spec.layers):
        group = cache.group(position)
        kept = len(cache.permanent(position).union(wanted[position]))
        stays[group] += kept
        total[group] += layer.num_experts
        others[group] = max(others[group], min(layer.top_k, layer.num_experts - kept))
    for group, slots in enumerate(cache.slots):
        need = min(stays[group] + others[group], total[group])
        if need > slots:
            size = next(
                layer.expert_bytes
                for position, layer in enumerate(spec.layers)
                if cache.group(position) == group
            )
            raise BudgetError(
                f"pin=True keeps {stays[group]} experts, and a token's others need "
                f"{others[group]} slots, but the budget has {slots}; load the model with "
                f"{need - slots} more ({format_bytes((need - slots) * size)}), or steer fewer "
                "experts"
            )
