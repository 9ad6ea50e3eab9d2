"""Steering as one HTML page: what the template is given.

Does not know how figures are drawn nor how numbers were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.report import steering_curves as curves
from moe_runtime.report import steering_figures as figures
from moe_runtime.report import steering_words as words
from moe_runtime.report.layout import Figure, Tile, present, template
from moe_runtime.report.steering_parts import SteeringParts
from moe_runtime.report.steering_published import DOUBTS, PAPER, PUBLISHED
from moe_runtime.report.summary import NONE, count, duration, percent, rate, size

if TYPE_CHECKING:
    from moe_runtime.steering.cost import SteeringCost
    from moe_runtime.steering.evaluation import Arm, SteeringEvaluation
    from moe_runtime.steering.files import SteeringFile
    from moe_runtime.steering.identification import Identification

__all__ = ["render_steering"]

Table = tuple[str, list[tuple[str, str]]]


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
        evaluations=[_evaluation(one, parts.beta) for one in parts.evaluations],
        costs=[_cost(one) for one in parts.costs],
        paper=PAPER,
        doubts=DOUBTS,
        published=PUBLISHED if parts.evaluations else (),
        tables=_tables(parts),
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


# -- an evaluation --------------------------------------------------------------------------------


def _evaluation(found: SteeringEvaluation, frozen: float | None) -> dict[str, Any]:
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


# -- the lists at the end -------------------------------------------------------------------------


def _tables(parts: SteeringParts) -> list[Table]:
    tables: list[Table] = [
        ("Model", [("Name", parts.model_id or NONE), ("Fingerprint", parts.fingerprint or NONE)])
    ]
    if parts.file is not None:
        tables.append(("Steering", _steering_rows(parts.file)))
        if parts.file.identification is not None:
            tables.append(("Identification", _identification_rows(parts.file.identification)))
    tables += [
        (f"Evaluation: {one.settings.tasks or 'tasks'}", _evaluation_rows(one))
        for one in parts.evaluations
    ]
    tables += [(f"Cost at {one.budget}", [*one.machine, *one.versions]) for one in parts.costs]
    return tables


def _steering_rows(file: SteeringFile) -> list[tuple[str, str]]:
    steering = file.steering
    betas = [
        (words.expert_name(*one), "by row" if isinstance(beta, tuple) else words.beta_text(beta))
        for one, beta in steering.betas.items()
    ]
    return [
        *betas,
        ("Method", steering.method),
        ("Renormalised", "yes" if steering.renormalise else "no"),
        ("Only between", NONE if steering.thinking is None else " and ".join(steering.thinking)),
    ]


def _identification_rows(found: Identification) -> list[tuple[str, str]]:
    return [
        *(
            (
                f"{one.text}, weight {one.coefficient:+g}",
                f"{count(one.occurrences)} times, {count(one.sequences)} sequences",
            )
            for one in found.tokens
        ),
        ("Rows counted", count(found.rows)),
        ("Sequences", count(found.sequences)),
        ("Prompts counted", "yes" if found.prompt else "no"),
        ("Experts with enough events", f"{count(found.rankable)} of {count(sum(found.experts))}"),
        ("Least events: with a marker; in all", f"{found.least_joint}; {found.least_uses}"),
        ("Smoothing", f"{found.smoothing:g}"),
        ("Bootstrap replicates", count(found.bootstrap)),
    ]


def _evaluation_rows(found: SteeringEvaluation) -> list[tuple[str, str]]:
    told = found.settings
    return [
        ("Problems, samples each", f"{count(len(found.problem_ids))}, {count(told.samples)}"),
        ("New tokens at most", count(told.max_new_tokens)),
        ("Temperature, top-p, top-k", f"{told.temperature:g}, {told.top_p:g}, {told.top_k}"),
        ("Seed", str(told.seed)),
        ("Steered only while thinking", "yes" if told.thinking_only else "no"),
        ("Prompt-only control", told.prompt_text or NONE),
        ("TIP", f"{', '.join(told.tip_tokens)}: {told.tip_penalty:g}" if told.tip_tokens else NONE),
        ("Resamples", count(told.resamples)),
    ]
