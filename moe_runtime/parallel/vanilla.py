"""Vanilla expert parallelism: rows stay home; each layer sends them out and gets sums back.

Two all-to-alls a layer, dispatch and combine. Knows one layer's call; no caches and no tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_runtime.parallel.held import HeldExperts
from moe_runtime.parallel.link import Link
from moe_runtime.parallel.shares import LayerShare

__all__ = ["COMBINE", "DISPATCH", "Heard", "VanillaLayer", "id_dtype"]

DISPATCH, COMBINE = "dispatch", "combine"

# Told of a layer's real rows: position, their numbers among the call's, ids and weights.
Heard = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def id_dtype(count: int) -> torch.dtype:
    """The smallest dtype for numbers below `count`."""
    if count <= 1 << 8:
        return torch.uint8
    return torch.int16 if count <= 1 << 15 else torch.int32


class VanillaLayer:
    """Answers one layer's experts calls on one rank.

    A row goes once to each other rank that computes one of its experts, with its choices and their
    weights (`hidden + k * (id + weight)` bytes); each sends back one partial sum.

    Attributes:
        share: who holds the layer's experts.
        real: int64, which rows of the coming calls are no padding; None for all.
        heard: told of what was chosen; None for nobody.
        last: ids and weights `[n, k]` of the last call's real rows.
        phase: put before the kinds that calls are counted under.
    """

    def __init__(self, link: Link, position: int, share: LayerShare, held: HeldExperts) -> None:
        self._link, self._position, self.share, self._held = link, position, share, held
        self.real: torch.Tensor | None = None
        self.heard: Heard | None = None
        self.phase = ""
        self.last: tuple[torch.Tensor, torch.Tensor]

    def experts(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output of the real rows, zero for the others."""
        rows = self.real
        if rows is None:
            rows = torch.arange(len(hidden), device=hidden.device)
        real_ids, real_weights = self.last = (ids[rows], weights[rows])
        if self.heard is not None:
            numbers = torch.arange(len(rows), device=rows.device)
            self.heard(self._position, numbers, real_ids, real_weights)
        output = torch.zeros_like(hidden)
        output[rows] = self._computed(hidden[rows], real_ids, real_weights)
        return output

    def _computed(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        link, share = self._link, self.share
        here = torch.full((len(ids),), link.rank, device=ids.device)
        computing = share.computing(here, ids)
        needed = torch.zeros(len(ids), link.size, dtype=torch.bool, device=ids.device)
        needed.scatter_(1, computing, value=True)
        needed[:, link.rank] = False
        to, rows = torch.nonzero(needed.T, as_tuple=True)  # by rank, then by row
        narrow = ids.to(id_dtype(share.held.shape[0]))
        (sent, sent_ids, sent_weights), source = link.exchange(
            self.phase + DISPATCH, share.layer, [hidden[rows], narrow[rows], weights[rows]], to
        )
        sums = self._held.partial_sums(hidden, ids, weights, computing == link.rank)
        theirs = sent_ids.long()
        partial = self._held.partial_sums(
            sent, theirs, sent_weights, share.computing(source, theirs) == link.rank
        )
        # Comes back in the order in which it was sent: by rank, then by row.
        (returned,), _ = link.exchange(self.phase + COMBINE, share.layer, [partial], source)
        return sums.index_add_(0, rows, returned)
