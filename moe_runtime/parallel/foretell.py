"""What a plan foretells of the very tokens that a run had: the share of rows that move, and ranks.

Knows plans and traces; no run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_runtime.parallel.shares import Shares
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.cost import crossing_of
from moe_runtime.placement.plan import Plan
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["foretell"]


def foretell(plan: Plan, shares: Shares, decode: RoutingTrace) -> dict[str, Any]:
    """The plan's own figures on a run's decode rows.

    Returns:
        `crossing`: the share of pairs of consecutive MoE layers on different devices that
        `moe-runtime plan` reports. With one expert a token and no replicas it is exactly the share
        of rows that a coherent run moves after its first MoE layer. With more it is not: the plan
        counts every pair of a token's experts, a row follows its heaviest.
        `heaviest_crossing`: the same of each token's heaviest expert alone; None with replicas.
        `distinct_ranks`: mean ranks that a token needs in a layer.
    """
    if not len(decode):
        return {}
    crossing = crossing_of(plan.matrices(), affinity_of(decode, within=False))
    ids = decode.topk_ids.astype(np.int64)
    weights = np.where(ids == UNUSED, -1.0, decode.topk_weights)
    heavy = np.take_along_axis(ids, weights.argmax(2)[..., None], 2)[..., 0]
    owner = [share.held.numpy().argmax(1) for share in shares.layers]
    homes = np.stack([owner[at][heavy[:, at]] for at in range(len(owner))], 1)
    moves = homes[:, 1:] != homes[:, :-1]
    distinct = []
    for at, ranks in enumerate(owner):
        used = np.where(ids[:, at] == UNUSED, -1, ranks[np.minimum(ids[:, at], len(ranks) - 1)])
        distinct.append(np.mean([len(set(row[row >= 0].tolist())) for row in used]))
    return {
        "crossing": float(crossing),
        "heaviest_crossing": None if plan.has_replicas or not moves.size else float(moves.mean()),
        "distinct_ranks": None if plan.has_replicas else float(np.mean(distinct)),
    }
