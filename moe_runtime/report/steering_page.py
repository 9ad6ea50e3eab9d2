"""Steering as one HTML page: what the template is given.

Does not know how figures are drawn nor how numbers were made; evaluations and lists have files of
their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.report import steering_figures as figures
from moe_runtime.report import steering_words as words
from moe_runtime.report.layout import Figure, Tile, present, template
from moe_runtime.report.steering_evaluated import evaluation_part
from moe_runtime.report.steering_parts import SteeringParts
from moe_runtime.report.steering_published import DOUBTS, PAPER, PUBLISHED
from moe_runtime.report.steering_tables import steering_tables
from moe_runtime.report.summary import NONE, count, duration, percent, rate, size

if TYPE_CHECKING:
    from moe_runtime.steering.cost import SteeringCost
    from moe_runtime.steering.evaluation import SteeringEvaluation
    from moe_runtime.steering.identification import Identification

__all__ = ["render_steering"]


def render_steering(parts: SteeringParts) -> str:
    """The whole page."""
    found = None if parts.file is None else parts.file.identification
    chosen = list(parts.file.steering.betas) if parts.file is not None else []
    return template("steering.html.j2").render(
        kind="steering",
        title=parts.model_id or "unnamed model",
        outcome=words.headline(parts).replace(" %", "\N{NO-BREAK SPACE}%"),
        warnings=words.warnings_of(parts),
        tiles=_tiles(parts),
        given=[words.expert_name(*one) for one in chosen] if found is None else [],
        identified=[] if found is None else _identified(found, chosen),
        ranked=None if found is None else _ranked(found),
        evaluations=[evaluation_part(one, parts.beta) for one in parts.evaluations],
        costs=[_cost(one) for one in parts.costs],
        paper=PAPER,
        doubts=DOUBTS,
        published=PUBLISHED if parts.evaluations else (),
        tables=steering_tables(parts),
    )


def _identified(found: Identification, chosen: list[tuple[int, int]]) -> list[Figure]:
    drawn, most = figures.score_map(found, chosen or found.chosen)
    shown = min(len(found.ranked), figures.DRAWN_EXPERTS)
    return present(
        Figure(
            title="Score of every expert",
            note=f"nPMI, {words.markers(found)}; blue above 0, orange below, full colour at "
            f"\N{PLUS-MINUS SIGN}{most:.2f}; framed: chosen; a dot: too few events",
            svg=drawn,
        ),
        Figure(
            title=f"The first {shown} experts",
            note=f"{100 * found.level:g} % bootstrap intervals over sequences; right: share of "
            f"the replicates with the expert among the top {found.top}"
            if found.bootstrap
            else "no bootstrap was made",
            svg=figures.ranked(found),
        ),
    )


def _ranked(found: Identification) -> dict[str, Any]:
    rows = []
    for number, one in enumerate(found.ranked):
        reach = NONE if one.interval is None else "{:.3f} to {:.3f}".format(*one.interval)
        ranks = NONE if one.ranks is None else "{:g} to {:g}".format(*one.ranks)
        rows.append(
            {
                "chosen": number < found.top,
                "cells": [
                    words.expert_name(one.layer, one.expert),
                    f"{one.score:.3f}",
                    reach,
                    ranks,
                    percent(one.stability),
                    *(f"{value:.3f} ({count(n)})" for value, n in zip(one.npmi, one.joint)),  # noqa: B905
                    count(one.uses),
                    count(one.tied),
                ],
            }
        )
    return {"tokens": [one.text for one in found.tokens], "rows": rows}


def _tiles(parts: SteeringParts) -> list[Tile]:
    tiles = []
    found = None if parts.file is None else parts.file.identification
    if found is not None and found.ranked:
        first = found.ranked[0]
        reach = "" if first.interval is None else ", {:.2f} to {:.2f}".format(*first.interval)
        tiles.append(
            Tile(
                label="Best score",
                value=f"{first.score:.2f}",
                note=f"{words.expert_name(first.layer, first.expert)}{reach}",
            )
        )
    for one in parts.evaluations[-1:]:
        tiles += _evaluation_tiles(one, parts.beta)
    for cost in parts.costs[:1]:
        tiles += _cost_tiles(cost)
    return tiles


def _evaluation_tiles(found: SteeringEvaluation, frozen: float | None) -> list[Tile]:
    plain, arm = found.unsteered, words.main_arm(found, frozen)
    tiles = [
        Tile(
            label="Right, unsteered",
            value=percent(plain.accuracy.value),
            note=f"{words.interval(plain.accuracy)} %; {count(len(found.problem_ids))} problems, "
            f"{count(found.settings.samples)} samples each",
        )
    ]
    if arm is None:
        return tiles
    comparison = found.comparison(arm.name)
    tiles.append(
        Tile(
            label=f"Right, beta {words.beta_text(arm.beta)}",
            value=percent(arm.accuracy.value),
            note=f"{words.interval(arm.accuracy)} %"
            if comparison is None
            else f"{words.points(comparison.difference.value)} points, "
            f"{words.interval(comparison.difference, signed=True)}",
        )
    )
    if found.settings.thinking_end:
        tiles.append(
            Tile(
                label="Thinking tokens",
                value=f"{arm.thinking_median.value:g}",
                note=f"median; {plain.thinking_median.value:g} unsteered",
            )
        )
    return tiles


def _cost_tiles(found: SteeringCost) -> list[Tile]:
    steered, plain = found.arm("steered"), found.arm("unsteered")
    tiles = []
    if steered is not None and plain is not None:
        tiles.append(
            Tile(
                label="Decode, steered",
                value=f"{rate(steered.tokens_per_second)} tok/s",
                note=f"{rate(plain.tokens_per_second)} unsteered; hit rate "
                f"{percent(steered.hit_rate)}, {percent(plain.hit_rate)} unsteered",
            )
        )
    tiles.append(
        Tile(
            label="Choices changed",
            value=percent(found.shift.changed),
            note="mean over the layers, on the same tokens",
        )
    )
    return tiles


# -- what it costs --------------------------------------------------------------------------------


def _cost(found: SteeringCost) -> dict[str, Any]:
    rows = []
    for arm in found.arms:
        ratio = found.ratios(arm.name, lambda one: one.tokens_per_second)
        told = NONE
        if ratio is not None and arm.name != "unsteered":
            told = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"
        rows.append(
            [
                _arm_title(arm.name),
                rate(arm.tokens_per_second),
                told,
                percent(arm.hit_rate),
                count(arm.median(lambda one: one.misses)),
                size(arm.bytes_per_token),
                duration(arm.median(lambda one: one.stall_seconds)),
                count(arm.median(lambda one: one.new_tokens)),
            ]
        )
    rounds = len(found.arms[0].rounds)
    told = f"medians of {rounds} rounds in turns" if rounds > 1 else "one round"
    return {
        "name": f"{found.budget} of the experts" if "%" in found.budget else found.budget,
        "note": f"{count(found.slots)} of {count(found.all_experts)} experts in memory, policy "
        f"{found.policy}; {count(found.prompts)} prompts, {count(found.max_new_tokens)} new "
        f"tokens at most, greedy, batch 1; {told}. All arms but the "
        "last produce the tokens that the unsteered model chose.",
        "figures": present(
            Figure(
                title="Speed, hits and reads",
                note="bars: medians; dots: rounds",
                svg=figures.costs(found),
            )
        ),
        "shift": present(
            Figure(
                title="Routing shift, by layer",
                note=f"same {count(found.shift.tokens)} tokens, unsteered and steered",
                svg=figures.shift(found),
            )
        ),
        "rows": rows,
        "experts": [
            [
                words.expert_name(one.layer, one.expert),
                words.beta_text(one.beta),
                percent(one.uses),
                percent(one.steered_uses),
            ]
            for one in found.experts
        ],
        "layers": [
            [
                str(one.layer),
                f"{100 * one.changed:.2f} %",
                f"{one.jaccard:.4f}",
                f"{100 * one.total_variation:.2f} %",
            ]
            for one in found.shift.layers
        ],
    }


def _arm_title(name: str) -> str:
    from moe_runtime.steering.cost import ARMS

    return ARMS[name]  # type: ignore[index]
