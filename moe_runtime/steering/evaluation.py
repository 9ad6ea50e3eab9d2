"""`SteeringEvaluation`: whether steering helped, as a value and as a file, `*.steer-eval.json`.

Knows no model and no task; measures nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text
from moe_runtime.steering.plain import from_plain, load_plain

__all__ = [
    "UNSTEERED",
    "Arm",
    "ArmKind",
    "Comparison",
    "Estimate",
    "EvaluationSettings",
    "SteeringEvaluation",
    "select_beta",
]

FORMAT, VERSION = "moe-runtime.steer-eval", 1
UNSTEERED = "unsteered"

ArmKind = Literal["unsteered", "steered", "random", "frequency", "prompt", "tip"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval at the settings' confidence; `low <= value <= high` mostly."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How it was measured.

    Args:
        tasks, tasks_digest: name of the task file; SHA-256 of its tasks.
        steering: name of the steering file; "" if the experts were given in another way.
        method, renormalise: of the steering, as in `Steering`.
        thinking_only: steered only between the markers.
        thinking_start, thinking_end: the markers of thinking; the end is "" for a model that does
            not think, whose whole text is then the answer.
        samples: of each problem in each arm.
        max_new_tokens, temperature, top_p, top_k, seed: of the sampling; temperature 0 is greedy,
            top_p 1 and top_k 0 leave nothing out.
        prompt_text, prompt_place: of the prompt-only control; see `controls.PromptControl`.
        tip_tokens, tip_penalty, tip_span: of the thought-switching penalty: texts whose tokens
            cost `tip_penalty` logits for `tip_span` positions after a thought began.
        chat: prompts were put into the model's chat template.
        confidence: of all intervals, 0.95.
        resamples: of each bootstrap and Monte Carlo test.
    """

    tasks: str
    tasks_digest: str
    steering: str
    method: str
    renormalise: bool
    thinking_only: bool
    thinking_start: str
    thinking_end: str
    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    prompt_text: str
    prompt_place: str
    tip_tokens: tuple[str, ...]
    tip_penalty: float
    tip_span: int
    confidence: float
    resamples: int
    chat: bool = False


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of running the model on all problems.

    Per-problem tuples have an entry for each of `SteeringEvaluation.problem_ids`. A sample is
    either right, or wrong with a readable answer, or one of the three format errors: `cut` (no end
    within the length limit), `no_end` (no end-of-thinking marker), `no_answer` (nothing readable
    after it). All three count as wrong.

    Args:
        name: unique, as "beta 64" or "random 2, beta 64".
        kind: "unsteered", "steered", or a control: "random" (other experts of the same layers),
            "frequency" (same layers, nearest activation frequency), "prompt" (a text added to the
            prompt), "tip" (thought-switching penalty).
        experts: `(layer, expert)` that were steered.
        beta: of all of them; 1 without steering.
        draw: number of the random draw, from 1; 0 for other kinds.
        right, cut, no_end, no_answer: samples of each problem.
        thinking: mean thinking tokens of each problem's samples. Thinking that never ends counts
            up to where the sample ends.
        accuracy: share of samples that are right, mean of the problems; its interval is a cluster
            bootstrap over problems, so it says what other problems might give.
        accuracy_wilson: the same share with Wilson's interval over problems x samples. It takes
            the samples of a problem as independent, which they are not, and is too narrow.
        pass_at: `(k, estimate)`: that at least one of k samples is right, by the unbiased
            estimator (Chen et al. 2021, arXiv 2107.03374), with the cluster bootstrap.
        thinking_median: of thinking tokens over all samples, with the cluster bootstrap.
        new_tokens, seconds: generated in all, end tokens included, and how long that took.
    """

    name: str
    kind: ArmKind
    experts: tuple[tuple[int, int], ...]
    beta: float
    draw: int
    right: tuple[int, ...]
    cut: tuple[int, ...]
    no_end: tuple[int, ...]
    no_answer: tuple[int, ...]
    thinking: tuple[float, ...]
    accuracy: Estimate
    accuracy_wilson: Estimate
    pass_at: tuple[tuple[int, Estimate], ...]
    thinking_median: Estimate
    new_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm minus another on the same problems, sampled with the same random numbers.

    Args:
        arm, against: names of arms.
        family: the tests that Holm's correction was made over together: "steered" (steered arms
            against unsteered), "controls" (controls against unsteered), "specific" (steered arms
            against the control of the same beta).
        difference: of accuracy, mean over problems; interval by the cluster bootstrap.
        thinking_difference: of mean thinking tokens, the same way.
        better, worse: problems with more, and with fewer right samples.
        test: "sign-flip exact", "sign-flip Monte Carlo", or "McNemar exact" (one greedy sample).
        p, p_holm: two-sided, before and after Holm's correction in its family.
    """

    arm: str
    against: str
    family: Literal["steered", "controls", "specific"]
    difference: Estimate
    thinking_difference: Estimate
    better: int
    worse: int
    test: str
    p: float
    p_holm: float


@dataclass(frozen=True, kw_only=True)
class SteeringEvaluation:
    """All arms on the same problems; the first arm is the unsteered one.

    Args:
        model_id, fingerprint: of the model; `layer_ids`, `experts` of its MoE layers.
        settings: how it was measured.
        problem_ids, families: of each problem; "" where a task names no family.
        arms: in the order in which they ran.
        comparisons: each arm against unsteered, then steered arms against their controls.
        versions: `(package, version)`.
    """

    model_id: str
    fingerprint: str
    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    settings: EvaluationSettings
    problem_ids: tuple[str, ...]
    families: tuple[str, ...]
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    versions: tuple[tuple[str, str], ...]

    def arm(self, name: str) -> Arm:
        """The arm of this name. ConfigError if there is none."""
        found = next((one for one in self.arms if one.name == name), None)
        if found is None:
            raise ConfigError(
                f"no arm {name!r} in the evaluation; there are "
                + ", ".join(repr(one.name) for one in self.arms)
            )
        return found

    @property
    def unsteered(self) -> Arm:
        """The arm that all others are compared with."""
        return self.arms[0]

    def comparison(self, arm: str, against: str = UNSTEERED) -> Comparison | None:
        """The comparison of two arms by name; None if it was not made."""
        wanted = (arm, against)
        return next((one for one in self.comparisons if (one.arm, one.against) == wanted), None)

    def of_kind(self, *kinds: ArmKind) -> Iterator[Arm]:
        """Arms of these kinds, in order."""
        return (one for one in self.arms if one.kind in kinds)

    def by_family(self, arm: Arm) -> dict[str, tuple[int, int]]:
        """`{family: (right samples, samples)}` of an arm."""
        found: dict[str, tuple[int, int]] = {}
        for family, right in zip(self.families, arm.right, strict=True):
            before, count = found.get(family, (0, 0))
            found[family] = (before + right, count + self.settings.samples)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with format and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteeringEvaluation:
        """Again. ConfigError if it is no such evaluation, of another version, or damaged."""
        if data.get("format") != FORMAT:
            raise ConfigError(
                f"field 'format' is {data.get('format')!r}, not {FORMAT!r}; this is no evaluation "
                "of steering"
            )
        if data.get("version") != VERSION:
            raise ConfigError(
                f"field 'version' is {data.get('version')!r}, this release reads {VERSION}; "
                "evaluate again"
            )
        try:
            found = from_plain(cls, data, "")
            _check(found)
        except ConfigError as error:
            raise ConfigError(f"the evaluation is damaged: {error}; evaluate again") from error
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `*.steer-eval.json`, whole or not at all; gives its path."""
        return write_text(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringEvaluation:
        """Read a file. ConfigError names the file, what was found and what to do."""
        return load_plain(
            path, cls.from_dict, what="evaluation of steering", again="evaluate again"
        )


def select_beta(evaluation: SteeringEvaluation) -> float:
    """The beta to freeze for the test, chosen on validation problems.

    Of the steered arms and the unsteered one (beta 1) the most accurate is found; every arm that
    is within noise of it may stand in for it, and of these the smallest beta is taken. Within
    noise: the best arm is less than one standard error ahead, of the paired difference over
    problems (the one-standard-error rule of Breiman et al. 1984, on paired
    differences). So steering is chosen only if it was ahead of doing nothing by more than that.
    Betas below 1 are ordered after the larger ones, by their distance from 1 on the log scale.
    """
    candidates = [evaluation.unsteered, *evaluation.of_kind("steered")]
    best = max(candidates, key=lambda arm: sum(arm.right))
    within = [arm for arm in candidates if arm is best or _within_noise(best, arm)]
    return min(within, key=lambda arm: _step(arm.beta)).beta


def _step(beta: float) -> tuple[bool, float]:
    """Order by how little is changed: 1, then rising, then falling to 0."""
    return (beta < 1, -beta if beta < 1 else beta)


def _within_noise(best: Arm, other: Arm) -> bool:
    """Whether the sum of paired differences is less than its standard error."""
    differences = [a - b for a, b in zip(best.right, other.right, strict=True)]
    count, total = len(differences), sum(differences)
    if total <= 0 or count < 2:
        return True
    squares = sum(one * one for one in differences) - total * total / count
    return total * total < squares * count / (count - 1)


def _check(found: SteeringEvaluation) -> None:
    """Columns are as long as there are problems, counts add up, names lead somewhere."""
    problems, samples = len(found.problem_ids), found.settings.samples
    if not problems or not found.arms or found.arms[0].kind != UNSTEERED:
        raise ConfigError("it needs a problem, and an unsteered arm first")
    if len(found.families) != problems:
        raise ConfigError(f"families has {len(found.families)} entries for {problems} problems")
    if len(found.layer_ids) != len(found.experts):
        raise ConfigError("layer_ids and experts differ in length")
    names = [arm.name for arm in found.arms]
    if len(set(names)) != len(names):
        raise ConfigError(f"names of arms come twice: {names}")
    for arm in found.arms:
        columns = ("right", "cut", "no_end", "no_answer", "thinking")
        for column in columns:
            values = getattr(arm, column)
            if len(values) != problems or min(values) < 0:
                raise ConfigError(
                    f"arm {arm.name!r}: {column} needs {problems} numbers of 0 or more"
                )
        if max(map(sum, zip(*(getattr(arm, one) for one in columns[:4]), strict=True))) > samples:
            raise ConfigError(f"arm {arm.name!r} has more outcomes than {samples} samples")
    for one in found.comparisons:
        for name in (one.arm, one.against):
            if name not in names:
                raise ConfigError(f"a comparison names the arm {name!r}, which is not there")
