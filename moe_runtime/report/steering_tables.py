"""The lists at the end of the page of steering: names and values of what was set.

Does not know the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from moe_runtime.report import steering_words as words
from moe_runtime.report.steering_parts import SteeringParts
from moe_runtime.report.summary import NONE, count

if TYPE_CHECKING:
    from moe_runtime.steering.evaluation import SteeringEvaluation
    from moe_runtime.steering.files import SteeringFile
    from moe_runtime.steering.identification import Identification

__all__ = ["steering_tables"]

Table: TypeAlias = tuple[str, list[tuple[str, str]]]


def steering_tables(parts: SteeringParts) -> list[Table]:
    """(heading, names and values) of the model, the steering and each measurement."""
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
