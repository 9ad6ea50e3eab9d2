"""The figures of steering that `bench/results/steering.json` keeps, from the values of a run.

Does not know how they were measured.
"""

from __future__ import annotations

from typing import Any

from moe_runtime.steering.cost import SteeringCost
from moe_runtime.steering.evaluation import Arm, Comparison, Estimate, SteeringEvaluation
from moe_runtime.steering.identification import Identification

__all__ = ["cost_figures", "evaluation_figures", "identification_figures"]

_LISTED = 10


def identification_figures(
    found: Identification, reference: Identification | None
) -> dict[str, Any]:
    """The choice, the ranking's head, and where it stands by the reference solutions' ranking."""
    places = {}
    if reference is not None:
        places = {(one.layer, one.expert): at + 1 for at, one in enumerate(reference.ranked)}
    return {
        "chosen": [list(one) for one in found.chosen],
        "rows": found.rows,
        "sequences": found.sequences,
        "rankable": found.rankable,
        "tied_out": found.tied_out,
        "markers": {one.text: one.occurrences for one in found.tokens},
        "ranked": [
            {
                "layer": one.layer,
                "expert": one.expert,
                "score": round(one.score, 4),
                "interval": None if one.interval is None else [round(x, 4) for x in one.interval],
                "stability": one.stability,
                "ranks": None if one.ranks is None else list(one.ranks),
                "npmi": [round(x, 4) for x in one.npmi],
                "joint": list(one.joint),
                "uses": one.uses,
                "tied": one.tied,
                **(
                    {"rank by reference solutions": places.get((one.layer, one.expert))}
                    if reference is not None
                    else {}
                ),
            }
            for one in found.ranked[:_LISTED]
        ],
    }


def evaluation_figures(found: SteeringEvaluation) -> dict[str, Any]:
    """Every arm beside the unsteered one, and steered arms against their controls."""
    return {
        "problems": len(found.problem_ids),
        "samples": found.settings.samples,
        "arms": {arm.name: _arm(found, arm) for arm in found.arms},
        "specific": {
            f"{one.arm} against {one.against}": _compared(one)
            for one in found.comparisons
            if one.family == "specific"
        },
    }


def _arm(found: SteeringEvaluation, arm: Arm) -> dict[str, Any]:
    total = found.settings.samples * len(found.problem_ids)
    compared = found.comparison(arm.name)
    return {
        "kind": arm.kind,
        "beta": arm.beta,
        "experts": [list(one) for one in arm.experts],
        "accuracy": _estimate(arm.accuracy),
        "accuracy_wilson": _estimate(arm.accuracy_wilson),
        "pass_at": {str(k): _estimate(one) for k, one in arm.pass_at},
        "thinking_median": _estimate(arm.thinking_median),
        "cut": round(sum(arm.cut) / total, 5),
        "no_end": round(sum(arm.no_end) / total, 5),
        "no_answer": round(sum(arm.no_answer) / total, 5),
        "by_family": {
            name: round(right / count, 4) for name, (right, count) in found.by_family(arm).items()
        },
        "new_tokens": arm.new_tokens,
        "seconds": round(arm.seconds, 2),
        **({} if compared is None else {"against unsteered": _compared(compared)}),
    }


def _compared(one: Comparison) -> dict[str, Any]:
    return {
        "difference": _estimate(one.difference),
        "thinking_difference": _estimate(one.thinking_difference),
        "better": one.better,
        "worse": one.worse,
        "test": one.test,
        "p": round(one.p, 6),
        "p_holm": round(one.p_holm, 6),
    }


def _estimate(one: Estimate) -> list[float]:
    """Value, low, high."""
    return [round(x, 5) for x in (one.value, one.low, one.high)]


def cost_figures(found: SteeringCost) -> dict[str, Any]:
    """Medians of each arm, ratios within rounds, and the shift on the same tokens."""
    return {
        "budget": found.budget,
        "slots": found.slots,
        "experts": found.all_experts,
        "steered": [
            {
                "layer": one.layer,
                "expert": one.expert,
                "beta": one.beta,
                "uses": one.uses,
                "steered_uses": one.steered_uses,
            }
            for one in found.experts
        ],
        "arms": {
            arm.name: {
                "tokens_per_second": arm.tokens_per_second,
                "over unsteered": found.ratios(arm.name, lambda one: one.tokens_per_second),
                "hit_rate": arm.hit_rate,
                "misses": arm.median(lambda one: one.misses),
                "bytes_per_token": arm.bytes_per_token,
                "new_tokens": arm.median(lambda one: one.new_tokens),
                "rounds": len(arm.rounds),
            }
            for arm in found.arms
        },
        "changed": [round(one.changed, 5) for one in found.shift.layers],
    }
