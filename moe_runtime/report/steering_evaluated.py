"""One evaluation on the page of steering: its figures, arms, controls and families of problems.

Does not know how figures are drawn nor how numbers were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.report import steering_curves as curves
from moe_runtime.report import steering_words as words
from moe_runtime.report.layout import Figure, present
from moe_runtime.report.summary import NONE, count, percent

if TYPE_CHECKING:
    from moe_runtime.steering.evaluation import Arm, SteeringEvaluation

__all__ = ["evaluation_part"]


def evaluation_part(found: SteeringEvaluation, frozen: float | None) -> dict[str, Any]:
    """What the template is given of an evaluation.

    Args:
        frozen: the beta that was chosen before, None if none was.
    """
    level = f"{100 * found.settings.confidence:g} %"
    reach = f"{level} intervals over problems"
    draws = len({arm.draw for arm in found.of_kind("random")})
    more = f"; random experts: {draws} draws" if draws > 1 else ""
    main, shown = words.main_arm(found, frozen), words.shown_arms(found, frozen)
    rest = [arm for arm in found.arms if arm not in shown]
    return {
        "name": found.settings.tasks or "tasks",
        "note": f"{count(len(found.problem_ids))} problems, {count(found.settings.samples)} "
        f"samples each; {_sampled(found)}. Every arm is compared with the unsteered one on the "
        "same problems, drawn with the same random numbers; p is corrected by Holm's method.",
        "accuracy": present(
            Figure(
                title="Right answers, by beta",
                note=f"{reach}; grey band: unsteered{more}",
                svg=curves.accuracy(found),
            )
        ),
        "others": present(
            Figure(
                title="Thinking tokens, by beta",
                note=f"median of all samples; {reach}",
                svg=curves.thinking(found),
            ),
            Figure(
                title="What became of the samples",
                note="format errors count as wrong",
                svg=curves.outcomes(found, shown),
            ),
        ),
        "rows": [_arm(found, arm, main=arm is main) for arm in shown],
        "rest": [_arm(found, arm, main=False) for arm in rest],
        "specific": _specific(found),
        "families": [] if main is None else _families(found, main),
    }


def _sampled(found: SteeringEvaluation) -> str:
    told = found.settings
    return f"temperature {told.temperature:g}" if told.temperature else "greedy"


def _arm(found: SteeringEvaluation, arm: Arm, *, main: bool) -> dict[str, Any]:
    comparison = found.comparison(arm.name)
    samples = found.settings.samples * len(found.problem_ids)
    errors = sum(map(sum, (arm.cut, arm.no_end, arm.no_answer)))
    compared = [NONE] * 3
    if comparison is not None:
        compared = [
            words.points(comparison.difference.value),
            words.interval(comparison.difference, signed=True),
            words.p_text(comparison.p_holm),
        ]
    thinking = arm.thinking_median
    return {
        "main": main,
        "cells": [
            arm.name,
            percent(arm.accuracy.value),
            words.interval(arm.accuracy),
            *compared,
            f"{thinking.value:g}" if found.settings.thinking_end else NONE,
            percent(errors / samples if samples else None),
        ],
    }


def _specific(found: SteeringEvaluation) -> list[list[str]]:
    """Steered arms against controls of the same beta: is it these experts, or any?"""
    return [
        [
            f"{one.arm} against {one.against}",
            words.points(one.difference.value),
            words.interval(one.difference, signed=True),
            f"{one.better} / {one.worse}",
            words.p_text(one.p_holm),
        ]
        for one in found.comparisons
        if one.family == "specific"
    ]


def _families(found: SteeringEvaluation, arm: Arm) -> list[list[str]]:
    """Share of right answers by family of problems; nothing if there is one family."""
    names = list(dict.fromkeys(found.families))
    if len(names) < 2:
        return []
    before, after = found.by_family(found.unsteered), found.by_family(arm)
    rows = []
    for name in names:
        shares = [one[name][0] / one[name][1] for one in (before, after)]
        rows.append(
            [
                name or "no family",
                count(sum(one == name for one in found.families)),
                *(percent(share) for share in shares),
                words.points(shares[1] - shares[0]),
            ]
        )
    return rows
