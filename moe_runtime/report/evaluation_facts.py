"""An evaluation's facts for people: which predictor is best, on what, and what to beware of.

Does not know how they were measured, nor how they are drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moe_runtime.report.summary import count, percent

if TYPE_CHECKING:
    from moe_runtime.predictors.evaluation import Evaluation, Figures, Score

__all__ = [
    "COLUMNS",
    "batch_sizes",
    "best",
    "distances",
    "domains_line",
    "evenness",
    "facts_of",
    "figures_of",
    "headline",
    "lost",
    "main_phase",
    "mean_of",
    "needed_share",
    "predictors",
    "score_of",
    "warnings_of",
]

COLUMNS = {
    "recall_k": "recall at k",
    "precision_k": "precision at k",
    "recall_2k": "recall at 2k",
    "precision_2k": "precision at 2k",
}
_LEAST_TOKENS = 200  # fewer rows of a domain than this are called few


def main_phase(found: Evaluation) -> str:
    """The phase that is shown: decode, where anything was decoded."""
    phases = {score.phase for one in found.figures for score in one.scores}
    return "decode" if "decode" in phases or not phases else "prefill"


def batch_sizes(found: Evaluation) -> list[int]:
    """In order; the smallest is the one that is shown where only one can be."""
    return sorted(set(found.settings.batch_sizes))


def distances(found: Evaluation) -> list[int]:
    """Layers ahead that the shown phase has scores for."""
    phase = main_phase(found)
    return sorted({s.distance for one in found.figures for s in one.scores if s.phase == phase})


def figures_of(found: Evaluation, predictor: str, domain: str) -> Figures | None:
    """One predictor on one domain; None if it was not measured there."""
    wanted = (predictor, domain)
    return next((one for one in found.figures if (one.predictor, one.domain) == wanted), None)


def score_of(
    found: Evaluation,
    predictor: str,
    domain: str,
    *,
    batch_size: int | None = None,
    distance: int = 1,
) -> Score | None:
    """The shown phase's score, by itself of the smallest batch and the next layer."""
    one = figures_of(found, predictor, domain)
    size = batch_sizes(found)[0] if batch_size is None else batch_size
    if one is None:
        return None
    return one.score(phase=main_phase(found), batch_size=size, distance=distance)


def mean_of(score: Score | None, column: str) -> float | None:
    """A column's mean over the layers; None where nothing was forecast."""
    return None if score is None else score.mean(column)


def predictors(found: Evaluation) -> list[str]:
    """Names, the best first: by recall at 2k of the next layer in the first domain."""

    def rank(name: str) -> float:
        value = mean_of(score_of(found, name, found.domains[0].name), "recall_2k")
        return math.inf if value is None else -value

    names = list(dict.fromkeys(one.predictor for one in found.figures))
    return sorted(names, key=rank) if found.domains else names


def best(found: Evaluation) -> tuple[str, Score] | None:
    """The best predictor with its score in the first domain; None if there is no score."""
    names = predictors(found)
    score = score_of(found, names[0], found.domains[0].name) if names else None
    return None if score is None else (names[0], score)


def lost(found: Evaluation, predictor: str, domain: str, column: str) -> float | None:
    """What a predictor has less of a column than in the first domain; 0 to 1, below 0 if more."""
    first = mean_of(score_of(found, predictor, found.domains[0].name), column)
    here = mean_of(score_of(found, predictor, domain), column)
    return None if first is None or here is None else first - here


def needed_share(found: Evaluation, score: Score | None) -> float | None:
    """Mean share of a layer's experts that the rows need together.

    A forecast that knows nothing has this precision, since it names them by chance.
    """
    if score is None:
        return None
    pairs = zip(score.experts, found.experts, strict=True)
    shares = [size / experts for size, experts in pairs if size is not None and experts]
    return math.fsum(shares) / len(shares) if shares else None


def evenness(entropy: tuple[float, ...]) -> float | None:
    """Mean over the layers of the popularity's entropy over its maximum."""
    return math.fsum(entropy) / len(entropy) if entropy else None


def domains_line(found: Evaluation) -> str:
    """`english (2,048 tokens), python (1,024 tokens)`."""
    return ", ".join(f"{one.name} ({count(one.tokens)} tokens)" for one in found.domains)


def headline(found: Evaluation) -> str:
    """The evaluation in one line."""
    top = best(found)
    if top is None:
        return "no predictor was measured"
    name, score = top
    domain = found.domains[0].name
    line = (
        f"{name} forecasts {domain} best: {percent(score.mean('recall_2k'))} of the experts that "
        f"the next layer needs are among its 2k likeliest, {percent(score.mean('recall_k'))} among "
        "its k likeliest"
    )
    others = predictors(found)[1:]
    second = mean_of(score_of(found, others[0], domain), "recall_2k") if others else None
    return line if second is None else f"{line}; {others[0]} has {percent(second)} at 2k"


def warnings_of(found: Evaluation) -> list[str]:
    """What a user should know before relying on the figures."""
    lines = []
    if not found.held_out:
        lines.append(
            "predictors were fitted to some of these rows, which flatters them; evaluate on other "
            "traces"
        )
    few = [one.name for one in found.domains if one.tokens < _LEAST_TOKENS]
    if few:
        lines.append(
            f"fewer than {_LEAST_TOKENS} tokens were measured of {', '.join(few)}: differences of "
            "some points mean little"
        )
    if found.figures and main_phase(found) == "prefill":
        lines.append(
            "nothing was decoded, so the figures are those of prompts; evaluate with "
            "--token-by-token, or on traces of generation"
        )
    return lines


def facts_of(found: Evaluation) -> dict[str, Any]:
    """Plain data: the figures that the page shows first; shares 0 to 1, times microseconds."""
    top = best(found)
    return {
        "outcome": headline(found),
        "model": found.model_id,
        "fingerprint": found.fingerprint,
        "held_out": found.held_out,
        "phase": main_phase(found),
        "batch_size": batch_sizes(found)[0],
        "best": None if top is None else top[0],
        "warnings": warnings_of(found),
        "domains": [
            {
                "name": one.name,
                "tokens": one.tokens,
                "decoded": one.decoded,
                "sequences": one.sequences,
                "evenness": evenness(one.entropy),
            }
            for one in found.domains
        ],
        "predictors": [
            _predictor_facts(found, name, domain.name)
            for domain in found.domains
            for name in predictors(found)
            if figures_of(found, name, domain.name) is not None
        ],
    }


def _predictor_facts(found: Evaluation, name: str, domain: str) -> dict[str, Any]:
    figures, score = figures_of(found, name, domain), score_of(found, name, domain)
    assert figures is not None
    return {
        "predictor": name,
        "domain": domain,
        **{column: mean_of(score, column) for column in COLUMNS},
        "recall_2k_lost": lost(found, name, domain, "recall_2k"),
        "calibration_error": figures.calibration_error,
        "calibration_error_top": figures.calibration_error_top,
        "microseconds": figures.microseconds,
    }
