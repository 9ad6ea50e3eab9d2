"""An evaluation as one HTML page: what the template is given.

Does not know how figures are drawn nor how numbers were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.report import evaluation_facts as facts
from moe_runtime.report import evaluation_figures as figures
from moe_runtime.report.layout import Figure, Tile, present, template
from moe_runtime.report.summary import NONE, count, percent

if TYPE_CHECKING:
    from moe_runtime.predictors.evaluation import Evaluation

__all__ = ["render_evaluation"]


def render_evaluation(found: Evaluation) -> str:
    """The whole page."""
    names, domains = facts.predictors(found), [one.name for one in found.domains]
    size = facts.batch_sizes(found)[0]
    return template("evaluation.html.j2").render(
        kind="evaluation of predictors",
        title=found.model_id or "unnamed model",
        outcome=facts.headline(found),
        warnings=facts.warnings_of(found),
        tiles=_tiles(found),
        shown=f"Rows of {facts.main_phase(found)}, next layer, "
        + (f"batches of {size}" if size > 1 else "one row at a time")
        + ", means over the layers, unless a figure says otherwise. At k: as many experts as the "
        "layer chooses; at 2k: twice as many.",
        predictors=present(
            Figure(
                title="Recall and precision, by predictor",
                note="higher is better; of 2k experts for one row half can be right",
                svg=figures.by_predictor(found),
            )
        ),
        curves=_curves(found),
        cost=present(
            Figure(
                title="Cost and calibration, by predictor",
                note="lower is better; time on the machine that evaluated",
                svg=figures.cost(found),
            )
        ),
        entropy=present(
            Figure(
                title="Evenness of routing, by layer",
                note="entropy of the experts' popularity over its maximum; 1 is even",
                svg=figures.entropy(found),
            )
        ),
        domains=[_domain(found, name) for name in domains],
        scores=_scores(found),
        layers=_layers(found),
        names=names,
        tables=_tables(found),
    )


def _curves(found: Evaluation) -> list[Figure]:
    """By layer, by layers ahead, by batch size, and reliability."""
    most, names = figures.DRAWN_PREDICTORS, facts.predictors(found)
    more = f"; the best {most} of {len(names)} predictors" if len(names) > most else ""
    more += f"; the first {figures.DRAWN_DOMAINS} kinds of text" * (
        len(found.domains) > figures.DRAWN_DOMAINS
    )
    return present(
        Figure(
            title="Recall at 2k, by layer",
            note=f"next layer{more}",
            svg=figures.by_layer(found),
        ),
        Figure(
            title="Recall at 2k, by layers ahead",
            note=f"mean over the layers that have so many before them{more}",
            svg=figures.by_ahead(found),
        ),
        Figure(
            title="Recall and precision at k, by batch size",
            note=f"all rows' experts together, {found.domains[0].name if found.domains else ''}; "
            f"grey: share of the experts needed, which is chance's precision{more}",
            svg=figures.by_batch(found),
        ),
        Figure(
            title="Reliability",
            note="share that came true, by the probability that was forecast; grey: perfectly "
            f"calibrated; larger: more forecasts, {figures.LEAST_IN_BIN} at least{more}",
            svg=figures.reliability(found),
        ),
    )


def _tiles(found: Evaluation) -> list[Tile]:
    top = facts.best(found)
    if top is None:
        return []
    (name, score), domain = top, found.domains[0]
    one = facts.figures_of(found, name, domain.name)
    assert one is not None
    losses = [
        (loss, other.name)
        for other in found.domains[1:]
        if (loss := facts.lost(found, name, other.name, "recall_2k")) is not None
    ]
    tiles = [
        Tile(
            label=label,
            value=percent(score.mean(f"recall_{at}")),
            note=f"precision {percent(score.mean(f'precision_{at}'))}; {name}, {domain.name}",
        )
        for at, label in (("2k", "Recall at 2k"), ("k", "Recall at k"))
    ]
    if losses:
        loss, other = max(losses)
        value = percent(facts.mean_of(facts.score_of(found, name, other), "recall_2k"))
        tiles.append(Tile(label=f"On {other}", value=value, note=f"at 2k, {_points(-loss)} points"))
    return [
        *tiles,
        Tile(
            label="Calibration error",
            value=f"{one.calibration_error_top:.3f}",
            note=f"of its 2k likeliest; of all experts {one.calibration_error:.4f}",
        ),
        Tile(
            label="Cost",
            value=NONE if one.microseconds is None else f"{one.microseconds:,.0f} µs",
            note="a token of decoding, all layers",
        ),
        Tile(
            label="Evenness of routing",
            value=_three(facts.evenness(domain.entropy)),
            note=f"of {domain.name}; 1 is even, hard to forecast",
        ),
    ]


def _domain(found: Evaluation, domain: str) -> dict[str, Any]:
    """The bars in numbers: a table for each domain."""
    first = domain == found.domains[0].name
    rows = []
    for name in facts.predictors(found):
        one = facts.figures_of(found, name, domain)
        if one is None:
            continue
        score = facts.score_of(found, name, domain)
        rows.append(
            {
                "name": name,
                "cells": [
                    *(percent(facts.mean_of(score, column)) for column in facts.COLUMNS),
                    *([] if first else [_gain(found, name, domain)]),
                    f"{one.calibration_error:.4f}",
                    f"{one.calibration_error_top:.3f}",
                    NONE if one.microseconds is None else f"{one.microseconds:,.0f}",
                ],
            }
        )
    return {"name": domain, "against": found.domains[0].name, "rows": rows}


def _scores(found: Evaluation) -> list[list[str]]:
    """Every score of the file, means over the layers."""
    return [
        [
            one.domain,
            one.predictor,
            score.phase,
            str(score.batch_size),
            str(score.distance),
            count(score.batches),
            *(percent(score.mean(column)) for column in facts.COLUMNS),
        ]
        for one in found.figures
        for score in one.scores
    ]


def _layers(found: Evaluation) -> list[list[str]]:
    """Recall at 2k of each layer in each domain, a column for each predictor."""
    rows = []
    for domain in found.domains:
        scores = [facts.score_of(found, name, domain.name) for name in facts.predictors(found)]
        for at, layer in enumerate(found.layer_ids):
            cells = [percent(None if one is None else one.recall_2k[at]) for one in scores]
            rows.append([domain.name, str(layer), f"{domain.entropy[at]:.3f}", *cells])
    return rows


def _tables(found: Evaluation) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sections that are lists of names and values."""
    settings = found.settings
    span = sorted(set(found.experts)), sorted(set(found.top_k))
    return [
        (
            "Model",
            [
                ("MoE layers", count(len(found.layer_ids))),
                ("Experts a layer", ", ".join(map(str, span[0]))),
                ("Experts a token", ", ".join(map(str, span[1]))),
                ("Fingerprint", found.fingerprint or NONE),
            ],
        ),
        (
            "Settings",
            [
                ("Layers ahead", f"1 to {settings.lookahead}"),
                ("Batch sizes", ", ".join(map(str, settings.batch_sizes))),
                ("Prompts token by token", "yes" if settings.token_by_token else "no"),
                ("Tokens of a domain, at most", count(settings.max_tokens or None)),
                ("Held out", "yes" if found.held_out else "no"),
            ],
        ),
        *(
            (
                f"Text: {one.name}",
                [
                    ("Tokens", count(one.tokens)),
                    ("… decoded", count(one.decoded)),
                    ("Sequences", count(one.sequences)),
                    ("Evenness of routing", _three(facts.evenness(one.entropy))),
                ],
            )
            for one in found.domains
        ),
    ]


def _gain(found: Evaluation, name: str, domain: str) -> str:
    """Recall at 2k here less that in the first domain."""
    loss = facts.lost(found, name, domain, "recall_2k")
    return _points(None if loss is None else -loss)


def _points(difference: float | None) -> str:
    """A difference of shares in percentage points, signed."""
    if difference is None:
        return NONE
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def _three(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
