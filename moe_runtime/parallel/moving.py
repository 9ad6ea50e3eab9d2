"""Rows of a MoE layer moved: to the rank of their heaviest expert, where the sums of others follow.

Knows shares and links; no modules, no hooks and no steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_runtime.parallel.held import HeldExperts
from moe_runtime.parallel.link import Arrival, Link
from moe_runtime.parallel.shares import LayerShare
from moe_runtime.parallel.vanilla import id_dtype

__all__ = ["MOVE", "PARTIAL", "LayerRows", "Mover", "Stays"]

MOVE, PARTIAL = "move", "partial_sums"


@dataclass(eq=False)
class Stays:
    """Of one layer, on one rank: rows that came through, and those that stayed where they were.

    `split` are rows whose experts are on several ranks, `pieces` the partial sums sent for them.
    """

    rows: int = 0
    stayed: int = 0
    split: int = 0
    pieces: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerRows:
    """What a layer has made of the rows that are here, but for the experts' part.

    Args:
        batch: sequences of the step, on all ranks together.
        whose: int64 `[n]`, the sequences of the rows, ascending.
        out: `[n, D]`, the layer's output without its routed experts.
        residual: `[n, D]`, what went into the norm before the experts; None where it is unknown.
            Then rows carry `out` and `hidden` both.
        hidden, ids, weights: the experts' call, `[n, D]`, `[n, k]`, `[n, k]`.
    """

    batch: int
    whose: torch.Tensor
    out: torch.Tensor
    residual: torch.Tensor | None
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Mover:
    """Moves one layer's rows on one rank; all ranks do it at once.

    Args:
        share: who holds the layer's experts.
        normed: from residual rows `[n, D]` to the experts' input.
        shared: from the experts' input to what the block adds beside the routed experts; None if
            that is nothing.
    """

    def __init__(
        self,
        link: Link,
        share: LayerShare,
        held: HeldExperts,
        *,
        normed: Callable[[torch.Tensor], torch.Tensor],
        shared: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self._link, self._share, self._held = link, share, held
        self._normed, self._shared = normed, shared
        self.stays = Stays()

    def move(self, rows: LayerRows) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that live here from now on.

        Returns:
            Their sequences, int64 `[m]`, ascending, and they `[m, D]`, experts' part included.
        """
        share, here = self._share, self._link.rank
        whose, hidden, ids, weights = rows.whose, rows.hidden, rows.ids, rows.weights
        source = torch.full_like(whose, here)
        home = share.homes(source, ids, weights)
        computing = share.computing(source, ids, home)
        arrived = self._send(rows, home, computing)
        *vectors, narrow_whose, narrow_ids, their_weights = arrived.rows
        their_ids, theirs = narrow_ids.long(), narrow_whose.long()
        their_home = share.homes(arrived.source, their_ids, their_weights)
        their_computing = share.computing(arrived.source, their_ids, their_home)
        their_hidden = vectors[1] if rows.residual is None else self._normed(vectors[0])
        sums = self._held.partial_sums(
            torch.cat([hidden, their_hidden]),
            torch.cat([ids, their_ids]),
            torch.cat([weights, their_weights]),
            torch.cat([computing, their_computing]) == here,
        )
        own, others = sums[: len(whose)], sums[len(whose) :]
        stay, come = home == here, their_home == here
        base = vectors[0][come]
        if rows.residual is not None and self._shared is not None and len(base):
            base = base + self._shared(their_hidden[come])
        result = torch.cat([rows.out[stay] + own[stay], base + others[come]])
        now = torch.cat([whose[stay], theirs[come]])
        if any(arrived.notes):
            part = ((computing == here).any(1)) & ~stay
            self._add_pieces(
                rows.batch,
                result,
                now,
                torch.cat([own[part], others[~come]]),
                torch.cat([whose[part], theirs[~come]]),
                torch.cat([home[part], their_home[~come]]),
            )
        self._count(home, computing)
        order = now.argsort()
        return now[order], result[order]

    def _send(self, rows: LayerRows, home: torch.Tensor, computing: torch.Tensor) -> Arrival:
        """Rows to their new homes and to the ranks that compute for them."""
        link = self._link
        needed = torch.zeros(len(home), link.size, dtype=torch.bool, device=home.device)
        needed.scatter_(1, torch.cat([computing, home[:, None]], 1), value=True)
        needed[:, link.rank] = False
        to, at = torch.nonzero(needed.T, as_tuple=True)
        carried = [rows.out, rows.hidden] if rows.residual is None else [rows.residual]
        whose = rows.whose.to(id_dtype(rows.batch))
        narrow = rows.ids.to(id_dtype(self._share.held.shape[0]))
        return link.exchange_noted(
            MOVE,
            self._share.layer,
            [one[at] for one in (*carried, whose, narrow, rows.weights)],
            to,
            note=int(bool((computing != home[:, None]).any())),
        )

    def _add_pieces(
        self,
        batch: int,
        result: torch.Tensor,
        now: torch.Tensor,
        pieces: torch.Tensor,
        whose: torch.Tensor,
        to: torch.Tensor,
    ) -> None:
        """Parts of sums to the homes of their rows; those that come are added to `result`."""
        narrow = whose.to(id_dtype(batch))
        self.stays.pieces += len(pieces)
        (parts, of), _ = self._link.exchange(PARTIAL, self._share.layer, [pieces, narrow], to)
        place = torch.full((batch,), -1, dtype=torch.long, device=now.device)
        place[now] = torch.arange(len(now), device=now.device)
        result.index_add_(0, place[of.long()], parts)

    def _count(self, home: torch.Tensor, computing: torch.Tensor) -> None:
        self.stays.rows += len(home)
        self.stays.stayed += int((home == self._link.rank).sum())
        self.stays.split += int((computing != home[:, None]).any(1).sum())
