"""The facts of steering for people: which experts, whether it helped, what it costs, doubts.

Does not know how they were measured, nor how they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moe_runtime.report.steering_parts import SteeringParts
from moe_runtime.report.summary import NONE, count, percent

if TYPE_CHECKING:
    from moe_runtime.steering.cost import SteeringCost
    from moe_runtime.steering.evaluation import Arm, Comparison, Estimate, SteeringEvaluation
    from moe_runtime.steering.identification import Identification

__all__ = [
    "beta_text",
    "expert_name",
    "facts_of",
    "headline",
    "helped",
    "interval",
    "main_arm",
    "markers",
    "p_text",
    "points",
    "shown_arms",
    "warnings_of",
]

_FEW_EVENTS = 30  # rows of a marker; fewer leave many experts tied
_FEW_PROBLEMS = 100


def expert_name(layer: int, expert: int) -> str:
    """`layer 3 expert 17`, as errors and files have it."""
    return f"layer {layer} expert {expert}"


def beta_text(beta: float) -> str:
    """`64`, `0.5`."""
    return f"{beta:g}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, signed."""
    if value is None:
        return NONE
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def interval(found: Estimate, *, signed: bool = False) -> str:
    """`38.1 to 47.0` of shares in percent, or of differences in points."""
    if signed:
        return f"{points(found.low)} to {points(found.high)}"
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def p_text(value: float) -> str:
    """`0.034`, `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def main_arm(found: SteeringEvaluation, frozen: float | None = None) -> Arm | None:
    """The steered arm that is told about.

    The one of the beta that was frozen, by the steering file, which needs no luck; else the most
    accurate, of equals the mildest.
    """
    steered = list(found.of_kind("steered"))
    if not steered:
        return None
    as_frozen = next((arm for arm in steered if arm.beta == frozen), None)
    return as_frozen or max(steered, key=lambda arm: (sum(arm.right), -_strength(arm.beta)))


def shown_arms(found: SteeringEvaluation, frozen: float | None = None) -> tuple[Arm, ...]:
    """All arms but controls of other betas than the main arm's, which are too many to list."""
    arm = main_arm(found, frozen)
    return tuple(
        one
        for one in found.arms
        if one.kind not in {"random", "frequency"} or (arm is not None and one.beta == arm.beta)
    )


def _strength(beta: float) -> float:
    return abs(math.log(beta)) if beta > 0 else math.inf


def helped(found: Comparison, confidence: float = 0.95) -> str:
    """What corrected test and interval say together: `helps`, `harms`, `no difference is shown`."""
    if found.p_holm >= 1 - confidence or found.difference.low <= 0 <= found.difference.high:
        return "no difference is shown"
    return "helps" if found.difference.value > 0 else "harms"


def headline(parts: SteeringParts) -> str:
    """All parts in one line; what the evaluation says comes first."""
    said = []
    if parts.evaluations:
        said.append(_evaluated(parts.evaluations[-1], parts.beta))
    elif parts.file is not None and parts.file.identification is not None:
        said.append(_found(parts.file.identification))
    elif parts.file is not None:
        names = [expert_name(*one) for one in parts.file.steering.betas]
        said.append(f"{_joined(names)}: given, not found by an identification")
    if parts.costs:
        said.append(_costs(parts.costs[0]))
    return "; ".join(said) or "nothing is in the files"


def _found(found: Identification) -> str:
    if not found.chosen:
        return "no expert had enough events to be ranked"
    names = _joined([expert_name(*one) for one in found.chosen])
    scores = _joined([f"{one.score:.2f}" for one in found.ranked[: found.top]])
    return f"{names} lead with scores of {scores} ({markers(found)})"


def markers(found: Identification) -> str:
    """What the score is the sum of: coefficients and markers."""
    told = ", ".join(f"{one.coefficient:+g} {one.text}" for one in found.tokens)
    return told.replace("-", "\N{MINUS SIGN}")


def _evaluated(found: SteeringEvaluation, frozen: float | None) -> str:
    arm = main_arm(found, frozen)
    if arm is None:
        return "no steered run is in the evaluation"
    tried = len(list(found.of_kind("steered")))
    best = f", the best of {tried} betas" if tried > 1 and arm.beta != frozen else ""
    comparison = found.comparison(arm.name)
    start = (
        f"beta {beta_text(arm.beta)} on {len(arm.experts)} expert{'s' * (len(arm.experts) != 1)}"
        f"{best}: {percent(arm.accuracy.value)} right, "
        f"{percent(found.unsteered.accuracy.value)} unsteered"
    )
    if comparison is None:
        return start
    return (
        f"{start}; {points(comparison.difference.value)} points "
        f"({interval(comparison.difference, signed=True)}, p {_equals(comparison.p_holm)}): "
        f"{helped(comparison, found.settings.confidence)}"
    )


def _equals(p: float) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _costs(found: SteeringCost) -> str:
    ratio = found.ratios("steered", lambda one: one.tokens_per_second)
    if ratio is None:
        return "nothing was decoded to time"
    told = [f"{100 * (one - 1):+.1f}" for one in ratio]
    rounds = f" ({told[1]} to {told[2]} by round)" if len(found.arms[0].rounds) > 1 else ""
    line = f"{told[0]} %{rounds} tokens/s on the same tokens at {found.budget}"
    return line.replace("-", "\N{MINUS SIGN}")


def _joined(names: Iterable[str]) -> str:
    *first, last = list(names) or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


def warnings_of(parts: SteeringParts) -> list[str]:
    """What a user should know before relying on the figures."""
    lines = []
    found = None if parts.file is None else parts.file.identification
    if found is not None:
        lines += _identification_warnings(found)
    kinds = {arm.kind for one in parts.evaluations for arm in one.arms}
    if "steered" in kinds and not kinds & {"random", "frequency"}:
        lines.append(
            "no other experts were steered as a control, so a difference may be any disturbance's"
        )
    for one in parts.evaluations:
        lines += _evaluation_warnings(one, parts.beta, several=len(parts.evaluations) > 1)
    return lines


def _identification_warnings(found: Identification) -> list[str]:
    lines = []
    few = [one for one in found.tokens if one.occurrences < _FEW_EVENTS]
    if few:
        told = _joined([f"{one.text} ({count(one.occurrences)})" for one in few])
        lines.append(
            f"fewer than {_FEW_EVENTS} occurrences of {told}: the ranking rests on few events"
        )
    if found.tied_out:
        lines.append(
            f"{count(found.tied_out)} more experts have exactly the score of the last one chosen"
        )
    loose = [
        one
        for one in found.ranked[: found.top]
        if one.stability is not None and one.stability < 0.5
    ]
    if loose:
        told = _joined([expert_name(one.layer, one.expert) for one in loose])
        lines.append(f"{told}: among the top in less than half of the bootstrap's replicates")
    return lines


def _evaluation_warnings(
    found: SteeringEvaluation, frozen: float | None, *, several: bool
) -> list[str]:
    lines = []
    where = f"on {found.settings.tasks}: " if several and found.settings.tasks else ""
    if len(found.problem_ids) < _FEW_PROBLEMS:
        lines.append(f"{where}{len(found.problem_ids)} problems tell only large differences apart")
    arm = main_arm(found, frozen)
    if arm is not None and (beaten := _control_as_good(found, arm)):
        lines.append(
            f"{where}{beaten} is as accurate as the steered experts: which experts are steered "
            "is not shown to matter"
        )
    return lines


def _control_as_good(found: SteeringEvaluation, arm: Arm) -> str | None:
    """A control of other experts at the same beta that does no worse, if steering raised any."""
    if sum(arm.right) <= sum(found.unsteered.right):
        return None
    others = [
        one
        for one in found.of_kind("random", "frequency")
        if one.beta == arm.beta and sum(one.right) >= sum(arm.right)
    ]
    return f"“{others[0].name}”" if others else None


def facts_of(parts: SteeringParts) -> dict[str, Any]:
    """Plain data: the figures that the page shows first; shares 0 to 1."""
    found = None if parts.file is None else parts.file.identification
    return {
        "outcome": headline(parts),
        "model": parts.model_id,
        "fingerprint": parts.fingerprint,
        "warnings": warnings_of(parts),
        "experts": []
        if parts.file is None
        else [
            {"layer": layer, "expert": expert, "beta": list(b) if isinstance(b, tuple) else b}
            for (layer, expert), b in parts.file.steering.betas.items()
        ],
        "ranked": []
        if found is None
        else [
            {
                "layer": one.layer,
                "expert": one.expert,
                "score": one.score,
                "interval": None if one.interval is None else list(one.interval),
                "stability": one.stability,
                "tied": one.tied,
            }
            for one in found.ranked
        ],
        "evaluations": [_evaluation_facts(one) for one in parts.evaluations],
        "costs": [_cost_facts(one) for one in parts.costs],
    }


def _evaluation_facts(found: SteeringEvaluation) -> dict[str, Any]:
    arms = []
    for arm in found.arms:
        comparison = found.comparison(arm.name)
        arms.append(
            {
                "name": arm.name,
                "kind": arm.kind,
                "beta": arm.beta,
                "accuracy": arm.accuracy.value,
                "accuracy_interval": [arm.accuracy.low, arm.accuracy.high],
                "thinking_tokens": arm.thinking_median.value,
                "difference": None if comparison is None else comparison.difference.value,
                "p_holm": None if comparison is None else comparison.p_holm,
            }
        )
    return {
        "tasks": found.settings.tasks,
        "problems": len(found.problem_ids),
        "samples": found.settings.samples,
        "arms": arms,
    }


def _cost_facts(found: SteeringCost) -> dict[str, Any]:
    return {
        "budget": found.budget,
        "changed": found.shift.changed,
        "arms": [
            {
                "name": arm.name,
                "tokens_per_second": arm.tokens_per_second,
                "hit_rate": arm.hit_rate,
                "bytes_per_token": arm.bytes_per_token,
            }
            for arm in found.arms
        ],
        "shift": [
            {"layer": one.layer, "changed": one.changed, "total_variation": one.total_variation}
            for one in found.shift.layers
        ],
    }
