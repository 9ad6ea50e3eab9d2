"""`SteeringReport`: experts found, evaluated and costed, as text, plain data, and one HTML page.

Does not know how anything was measured; all it shows is in the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.report import steering_words as words
from moe_runtime.report.base import FactsReport
from moe_runtime.report.steering_parts import SteeringParts, read_parts
from moe_runtime.report.summary import NONE, percent, rate, size

if TYPE_CHECKING:
    from moe_runtime.steering.cost import SteeringCost
    from moe_runtime.steering.evaluation import SteeringEvaluation
    from moe_runtime.steering.identification import Identification

__all__ = ["SteeringReport"]

_LISTED = 10  # experts of the ranking in the text


class SteeringReport(FactsReport):
    """What is known about steering a model: `str(report)`, `facts()`, `to_html()`."""

    def __init__(self, parts: SteeringParts) -> None:
        self.parts = parts

    @classmethod
    def load(cls, *paths: str | Path) -> SteeringReport:
        """The report of `*.steer.json`, `*.steer-eval.json` and `*.steer-cost.json`, together.

        Raises:
            ConfigError: a file is damaged or of another kind, or they are of different models.
        """
        return cls(read_parts(paths))

    @property
    def outcome(self) -> str:
        """All of it in one line."""
        return words.headline(self.parts)

    def facts(self) -> dict[str, Any]:
        """Plain data: ranked experts, accuracy of each arm, cost of each arm; warnings."""
        return words.facts_of(self.parts)

    def to_html(self) -> str:
        from moe_runtime.report.steering_page import render_steering

        return render_steering(self.parts)

    def __str__(self) -> str:
        parts = self.parts
        lines = [self.outcome, f"  {'model':<14}{parts.model_id or 'unknown model'}"]
        lines += [f"  {'warning':<14}{text}" for text in words.warnings_of(parts)]
        if parts.file is not None and parts.file.identification is not None:
            lines += ["", *_ranked(parts.file.identification)]
        for evaluation in parts.evaluations:
            lines += ["", *_evaluated(evaluation, parts.beta)]
        for cost in parts.costs:
            lines += ["", *_costs(cost)]
        return "\n".join(lines)


def _table(titles: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Columns as wide as they need, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"{cell:>{width + 2}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in (titles, *rows)
    ]


def _ranked(found: Identification) -> list[str]:
    rows = [
        [
            words.expert_name(one.layer, one.expert),
            f"{one.score:.3f}",
            NONE if one.interval is None else "{:.3f} to {:.3f}".format(*one.interval),
            percent(one.stability),
            *(f"{value:.3f}" for value in one.npmi),
        ]
        for one in found.ranked[:_LISTED]
    ]
    markers = tuple(one.text for one in found.tokens)
    return _table(("expert", "score", "interval", "in top", *markers), rows)


def _evaluated(found: SteeringEvaluation, frozen: float | None) -> list[str]:
    rows = []
    for arm in words.shown_arms(found, frozen):
        comparison = found.comparison(arm.name)
        rows.append(
            [
                arm.name,
                percent(arm.accuracy.value),
                words.interval(arm.accuracy),
                NONE if comparison is None else words.points(comparison.difference.value),
                NONE if comparison is None else words.p_text(comparison.p_holm),
                f"{arm.thinking_median.value:g}",
            ]
        )
    titles = (found.settings.tasks or "tasks", "right", "interval, %", "points", "p", "thinking")
    return _table(titles, rows)


def _costs(found: SteeringCost) -> list[str]:
    rows = [
        [
            arm.name,
            rate(arm.tokens_per_second),
            percent(arm.hit_rate),
            size(arm.bytes_per_token),
        ]
        for arm in found.arms
    ]
    told = ", ".join(f"{one.layer}: {100 * one.changed:.1f} %" for one in found.shift.layers)
    return [
        *_table((f"cost at {found.budget}", "tokens/s", "hit rate", "read a token"), rows),
        f"choices changed, by layer: {told}",
    ]
