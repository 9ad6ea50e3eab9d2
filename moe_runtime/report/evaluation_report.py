"""`EvaluationReport`: predictors measured, as text, plain data, and one HTML page.

Does not know how they were measured; all it shows is in the evaluation's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.report import evaluation_facts as facts
from moe_runtime.report.base import FactsReport
from moe_runtime.report.summary import NONE, count, percent

if TYPE_CHECKING:
    from moe_runtime.predictors.evaluation import Evaluation

__all__ = ["EvaluationReport"]

_TITLES = (*("recall k", "precision k", "recall 2k", "precision 2k"), "calibr. err", "a token")


class EvaluationReport(FactsReport):
    """An evaluation and its renderings: `str(report)`, `facts()`, `to_html()`."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """The report of an `*.evaluation.json`; PredictorError if it holds no evaluation."""
        from moe_runtime.predictors.evaluation import Evaluation

        return cls(Evaluation.load(path))

    @property
    def outcome(self) -> str:
        """The evaluation in one line."""
        return facts.headline(self.evaluation)

    def facts(self) -> dict[str, Any]:
        """Plain data: each predictor on each domain, next layer, smallest batch; warnings."""
        return facts.facts_of(self.evaluation)

    def to_html(self) -> str:
        from moe_runtime.report.evaluation_page import render_evaluation

        return render_evaluation(self.evaluation)

    def __str__(self) -> str:
        found = self.evaluation
        lines = [self.outcome, f"  {'model':<14}{found.model_id or 'unknown model'}"]
        lines += [f"  {'warning':<14}{text}" for text in facts.warnings_of(found)]
        names = facts.predictors(found)
        width = max((len(name) for name in names), default=0) + 2
        for domain in found.domains:
            measured = (
                f"{domain.name}: {count(domain.tokens)} tokens, evenness of routing "
                f"{_three(facts.evenness(domain.entropy))}; {facts.main_phase(found)}, next layer, "
                f"batches of {facts.batch_sizes(found)[0]}"
            )
            lines += [
                "",
                measured,
                " " * width + "".join(f"{title:>14}" for title in _TITLES),
            ]
            for name in names:
                figures = facts.figures_of(found, name, domain.name)
                if figures is None:
                    continue
                score = facts.score_of(found, name, domain.name)
                time = figures.microseconds
                cells = [
                    *(percent(facts.mean_of(score, column)) for column in facts.COLUMNS),
                    f"{figures.calibration_error:.4f}",
                    NONE if time is None else f"{time:,.0f} µs",
                ]
                lines.append(f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join([*lines, *_further(found)])


def _further(found: Evaluation) -> list[str]:
    """The best predictor further ahead and in larger batches, a line each."""
    top = facts.best(found)
    if top is None:
        return []
    name, domain = top[0], found.domains[0].name
    ahead = [
        facts.mean_of(facts.score_of(found, name, domain, distance=at), "recall_2k")
        for at in facts.distances(found)
    ]
    batches = [
        (size, facts.score_of(found, name, domain, batch_size=size))
        for size in facts.batch_sizes(found)
    ]
    together = ", ".join(
        f"{percent(facts.mean_of(score, 'recall_2k'))} and "
        f"{percent(facts.mean_of(score, 'precision_2k'))} of {size}"
        for size, score in batches
        if score is not None
    )
    return [
        "",
        f"{name} on {domain}, at 2k:",
        f"  recall 1, 2, ... layers ahead: {', '.join(map(percent, ahead))}",
        f"  recall and precision in batches: {together}",
    ]


def _three(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
