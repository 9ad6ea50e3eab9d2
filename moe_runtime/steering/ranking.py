"""Experts ranked by their scores, ties broken, and how far a bootstrap trusts the ranking.

Knows counts and coefficients; does not know tokens or recordings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.steering.identification import RankedExpert
from moe_runtime.steering.npmi import Tally

__all__ = ["Scored", "by_rank", "ranked_experts", "score"]

_SAME = 12  # decimals at which two scores are one


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """All experts' scores, densely numbered.

    Args:
        npmi: float64 `[M, experts]`.
        scores: float64 `[experts]`, coefficient x nPMI summed over the markers.
        joint: int64 `[experts]`, rows with a telling marker that chose the expert.
        telling: bool `[M]`, the markers of positive coefficient; all if none is.
        order: dense indices of the experts with enough events, best first.
    """

    npmi: FloatArray
    scores: FloatArray
    joint: IntArray
    telling: NDArray[np.bool_]
    order: IntArray

    def tied(self, index: int) -> IntArray:
        """Places in `order` of the experts of this expert's score, itself included."""
        rounded = np.round(self.scores, _SAME)
        return np.flatnonzero(rounded[self.order] == rounded[index])


def score(tally: Tally, weights: FloatArray, *, least_joint: int, least_uses: int) -> Scored:
    """Scores and ranking from counts.

    Args:
        tally: the counts.
        weights: float64 `[M]`, the markers' coefficients, none 0.
        least_joint, least_uses: rows with a telling marker, and of any kind, in which an expert
            has to be chosen to be ranked. Every marker must have rows in which its layer ran.
    """
    npmi = tally.npmi()
    scores: FloatArray = weights @ npmi
    telling = weights > 0 if (weights > 0).any() else weights < 0
    joint = tally.joint[telling].sum(axis=0)
    seen = (tally.marked > 0).all(axis=0)
    enough = np.flatnonzero(seen & (joint >= least_joint) & (tally.uses >= least_uses))
    return Scored(
        npmi=npmi,
        scores=scores,
        joint=joint,
        telling=telling,
        order=by_rank(scores, joint, enough),
    )


def by_rank(scores: FloatArray, joint: FloatArray | IntArray, among: IntArray) -> IntArray:
    """Some experts, best first: by score to 12 decimals, then joint count, then number.

    Args:
        scores, joint: `[experts]`.
        among: dense indices.
    """
    keys = (among, -joint[among], -np.round(scores[among], _SAME))
    order: IntArray = among[np.lexsort(keys)]
    return order


def ranked_experts(
    scored: Scored,
    tally: Tally,
    weights: FloatArray,
    grid: ExpertGrid,
    *,
    top: int,
    listed: int,
    level: float,
) -> tuple[RankedExpert, ...]:
    """The best experts, with intervals if the tally has replicates.

    Args:
        top: of which the bootstrap says how often an expert is among them.
        listed: how many experts are given.
        level: of the intervals.
    """
    shown = scored.order[:listed]
    trust = _trust(scored, tally, weights, shown, top=top, level=level)
    found = []
    for at, index in enumerate(shown.tolist()):
        name = grid.expert_id(index)
        found.append(
            RankedExpert(
                layer=name.layer,
                expert=name.expert,
                score=float(scored.scores[index]),
                npmi=tuple(scored.npmi[:, index].tolist()),
                joint=tuple(tally.joint[:, index].tolist()),
                uses=int(tally.uses[index]),
                tied=len(scored.tied(index)),
                **trust[at],
            )
        )
    return tuple(found)


def _trust(
    scored: Scored,
    tally: Tally,
    weights: FloatArray,
    shown: IntArray,
    *,
    top: int,
    level: float,
) -> list[dict[str, Any]]:
    """For each expert of `shown` its interval, stability and ranks; nothing without replicates.

    The experts that compete are those ranked in the whole data, in each replicate the same.
    """
    count = tally.replicates
    if not count:
        return [{} for _ in shown]
    scores = np.empty((count, len(shown)))
    ranks = np.empty((count, len(shown)), np.int64)
    place = np.zeros(len(scored.scores), np.int64)
    for number in range(count):
        npmi, joint = tally.replicate(number)
        found: FloatArray = weights @ npmi
        order = by_rank(found, joint[scored.telling].sum(axis=0), scored.order)
        place[order] = np.arange(1, len(order) + 1)
        scores[number], ranks[number] = found[shown], place[shown]
    ends = (0.5 - level / 2, 0.5 + level / 2)
    low, high = np.quantile(scores, ends, axis=0)
    first, last = np.quantile(ranks, ends, axis=0, method="nearest")  # ranks that were seen
    return [
        {
            "interval": (float(low[at]), float(high[at])),
            "stability": float((ranks[:, at] <= top).mean()),
            "ranks": (int(first[at]), int(last[at])),
        }
        for at in range(len(shown))
    ]
