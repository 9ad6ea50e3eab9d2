"""Prediction in a run as part of its page: what the template of that name is given.

Does not know how figures are drawn nor how sentences are made.
"""

from __future__ import annotations

from typing import Any

from moe_runtime.report import predicted_figures
from moe_runtime.report.layout import Figure, present
from moe_runtime.report.predicted_words import (
    decision_rows,
    load_rows,
    seconds_per_token,
    verdict,
    waste,
)
from moe_runtime.report.run import Run
from moe_runtime.report.summary import count

__all__ = ["predicted_part"]


def predicted_part(run: Run) -> dict[str, Any] | None:
    """Values for `prediction.html.j2`; None if the run had no predictor."""
    found = run.predicted
    if found is None:
        return None
    return {
        "name": found.predictor,
        "verdict": verdict(found),
        "failure": found.failure,
        "seconds": seconds_per_token(run, found),
        "loads": count(found.loads.ahead),
        "waste": waste(run, found),
        "fates": load_rows(found),
        "decisions": decision_rows(found),
        "figures": present(
            Figure(
                title="Experts needed, by layer",
                note="share of the layer's uses; only what was late or missed was waited for",
                svg=predicted_figures.outcomes_by_layer(found),
            ),
            Figure(
                title="Recall, by layer",
                note="share of the needed experts among as many that the forecast put first",
                svg=predicted_figures.recall_by_layer(found),
            ),
            Figure(
                title="Bytes and misses",
                note="policies load on demand from a cold cache; Belady's knows the future",
                svg=predicted_figures.bytes_and_misses(run, found),
            ),
        ),
    }
