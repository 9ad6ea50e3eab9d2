"""`settled`: the rank that each prompt lives on in vanilla mode, by what its prefill was routed to.

Knows counts and ranks; no models, no links.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_runtime.core import IntArray

__all__ = ["settled"]


def settled(uses: IntArray, homes: Sequence[int], ranks: int) -> list[int]:
    """Homes with the most uses at home, each rank keeping its number of prompts.

    An assignment problem, solved exactly; of equally good answers one that moves fewer prompts.

    Args:
        uses: int `[P, G]`, how often each prompt needs a rank, over tokens and layers.
        homes: where the P prompts are now.
        ranks: G.

    Returns:
        The rank of each prompt; the same on all ranks for the same arguments.
    """
    now = np.asarray(homes, dtype=np.int64)
    seats = np.repeat(np.arange(ranks), np.bincount(now, minlength=ranks))
    # Staying decides between equal uses only: all prompts' stays together are less than one use.
    worth = uses.astype(np.int64) * (len(now) + 1) + (np.arange(ranks) == now[:, None])
    prompts, taken = linear_sum_assignment(worth[:, seats], maximize=True)
    found = np.empty(len(now), dtype=np.int64)
    found[prompts] = seats[taken]
    return [int(rank) for rank in found]
