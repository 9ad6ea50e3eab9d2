"""Pairs of token and choice sorted by slot and cut into tiles of one slot each, on their device.

Every shape is known beforehand, so nothing here waits for the device. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Tiles", "cut"]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which rows make a tile.

    Args:
        order: int64 `[P]`, pairs sorted by slot, in their own order within a slot; pairs whose
            slot is -1 come last.
        ranked: int64 `[P]`, the slots in that order, -1 replaced by the largest integer.
        starts: int64 `[N]`, where in that order each tile begins; P where there is no such tile. A
            tile ends after `rows` rows or with its slot.
        rows: rows of a tile at most.
    """

    order: torch.Tensor
    ranked: torch.Tensor
    starts: torch.Tensor
    rows: int


def cut(slots: torch.Tensor, rows: int, distinct: int) -> Tiles:
    """Sort `slots [P]` and cut each slot's pairs into tiles of `rows`.

    Args:
        distinct: no more slots than this occur.
    """
    pairs = slots.numel()
    absent = torch.iinfo(torch.int64).max
    keys = torch.where(slots < 0, absent, slots.to(torch.int64))
    ranked, order = keys.sort(stable=True)
    places = torch.arange(pairs, device=slots.device)
    heads = torch.ones_like(places, dtype=torch.bool)
    heads[1:] = ranked[1:] != ranked[:-1]
    begins = torch.where(heads, places, 0).cummax(0).values
    cuts = (ranked != absent) & ((places - begins) % rows == 0)
    # Tiles besides the full ones: at most one for each slot.
    most = min(pairs, pairs // rows + min(distinct, pairs))
    numbers = torch.where(cuts, cuts.cumsum(0) - 1, most)
    starts = places.new_full((most + 1,), pairs)
    # Rows that begin no tile all go to the place after the last, which is dropped.
    starts.scatter_(0, numbers, places)
    return Tiles(order=order, ranked=ranked, starts=starts[:most], rows=rows)
