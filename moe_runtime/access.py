"""`Access`: one layer step of a run, the experts that one MoE layer was routed to at once.

Knows nothing of caches, policies or files.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.core import IntArray

__all__ = ["Access"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Access:
    """The experts that one layer step needs, all at once.

    Args:
        position: 0-based position of the layer in `ExpertGrid.layers`.
        experts: int64 `[n]`, distinct expert numbers of that layer, ascending.
        tokens: int64 `[n]`, how many tokens were routed to each of them (1 or more).
    """

    position: int
    experts: IntArray
    tokens: IntArray
