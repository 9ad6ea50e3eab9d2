"""What a rank will need of memory, refused before it is taken where machines do not have it.

Knows sizes and free memory; loads nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from moe_runtime.core import format_bytes
from moe_runtime.errors import BudgetError
from moe_runtime.kv_cache import kv_bytes
from moe_runtime.memory import free_memory
from moe_runtime.parallel.link import Link

__all__ = ["Footprint", "cache_bytes", "require_memory"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that one rank is going to take.

    Args:
        experts: of the experts that its plan gives it.
        dense: of all other weights.
        cache: of keys and values.
    """

    experts: int
    dense: int
    cache: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.experts + self.dense + self.cache

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.total)}: {format_bytes(self.experts)} of experts, "
            f"{format_bytes(self.dense)} of other weights, {format_bytes(self.cache)} of keys and "
            "values"
        )


def cache_bytes(
    config: PreTrainedConfig,
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int | None,
    share: int = 1,
) -> int:
    """Bytes of keys and values of the largest batch, each prompt at its full length.

    Args:
        lengths: tokens of each prompt, in order.
        batch_size: prompts under way at once; None for all.
        share: ranks that share a batch's prompts: 1 where each keeps all of them (coherent), the
            number of ranks where each keeps its own (vanilla); then of the fullest rank, whichever
            prompts it gets.
    """
    size = batch_size or max(len(lengths), 1)
    largest = 0
    for first in range(0, len(lengths), size):
        each = sorted(
            (
                kv_bytes(config, batch=1, length=length + max_new_tokens)
                for length in lengths[first : first + size]
            ),
            reverse=True,
        )
        largest = max(largest, sum(each[: -(-len(each) // share)]))
    return largest


def require_memory(
    link: Link, need: Footprint, *, free: int | None = None, host: str | None = None
) -> None:
    """Refuse a run that does not fit, before anything of it is loaded.

    Ranks of one machine share its memory unless each has a GPU of its own.

    Args:
        free: bytes free where this rank runs; None to ask the system.
        host: what shares memory; None for this machine, or this rank's GPU.

    Raises:
        BudgetError: on every rank, with the numbers of the machine that has too little.
    """
    free = free_memory(link.device) if free is None else free
    if host is None:
        host = socket.gethostname()
        if link.device.type != "cpu":
            host += f" {link.device} of rank {link.rank}"
    known = link.agree("memory", {"host": host, "free": free, "need": need.to_dict()})
    for name in sorted({one["host"] for one in known}):
        ranks = [rank for rank, one in enumerate(known) if one["host"] == name]
        needs = [Footprint(**known[rank]["need"]) for rank in ranks]
        wanted = sum(one.total for one in needs)
        least = min(known[rank]["free"] for rank in ranks)
        if wanted > least:
            fullest = max(range(len(ranks)), key=lambda at: needs[at].total)
            cache = sum(one.cache for one in needs)
            error = BudgetError(
                f"{name}: {len(ranks)} ranks need {format_bytes(wanted)} ({wanted} bytes), "
                f"{format_bytes(least)} ({least} bytes) are free; the most by rank "
                f"{ranks[fullest]}, {needs[fullest]}. Keys and values are {format_bytes(cache)} of "
                "it: give a smaller --batch-size or --max-new-tokens, vanilla instead of coherent "
                "(which keeps every prompt's keys and values on every rank), or more machines"
            )
            raise link.agreed(error)
