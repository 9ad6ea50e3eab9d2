"""The evaluation as a value and a file, the rule that chooses beta, arms and their controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.steering.controls import (
    ArmPlan,
    Controls,
    matched_experts,
    plan_arms,
    random_experts,
    with_prompt,
)
from moe_runtime.steering.evaluation import (
    EvaluationSettings,
    SteeringEvaluation,
    select_beta,
)
from moe_runtime.steering.outcomes import Outcome
from moe_runtime.steering.statistics import cluster_weights
from moe_runtime.steering.summarise import Rules, arm_of, compare
from moe_runtime.steering.values import Steering

SAMPLES = 4
GRID = ExpertGrid(layers=(1, 3, 5), experts=(8, 8, 4))
STEERING = Steering(betas={(1, 2): 64.0, (1, 3): 64.0, (5, 0): 2.0})


def evaluation(rights: dict[str, list[int]]) -> SteeringEvaluation:
    """An evaluation whose arms have so many right samples of each problem; the first unsteered."""
    problems = tuple(f"p{at}" for at in range(len(next(iter(rights.values())))))
    rules = Rules(
        weights=cluster_weights(len(problems), resamples=200, seed=0),
        confidence=0.95,
        resamples=200,
        seed=0,
        greedy=False,
    )
    arms = []
    for name, right in rights.items():
        outcomes = {
            (problem, sample): Outcome(
                problem=problem,
                sample=sample,
                right=sample < count,
                form="ok" if sample < count or sample % 2 else "cut",
                thinking=10 * at + sample,
                tokens=20,
                answer="",
            )
            for at, (problem, count) in enumerate(zip(problems, right, strict=True))
            for sample in range(SAMPLES)
        }
        beta = 1.0 if name == "unsteered" else float(name.split()[-1])
        kind = {"unsteered": "unsteered", "beta": "steered"}.get(name.split()[0], "random")
        plan = ArmPlan(name=name, kind=kind, beta=beta)  # type: ignore[arg-type]
        arms.append(arm_of(plan, outcomes, problems, SAMPLES, rules, seconds=1.5))
    settings = EvaluationSettings(
        tasks="t.jsonl", tasks_digest="0", steering="s", method="multiply", renormalise=False,
        thinking_only=False, thinking_start="<think>", thinking_end="</think>", samples=SAMPLES,
        max_new_tokens=64, temperature=1.0, top_p=1.0, top_k=0, seed=0, prompt_text="",
        prompt_place="end", tip_tokens=(), tip_penalty=3.0, tip_span=600, confidence=0.95,
        resamples=200,
    )  # fmt: skip
    return SteeringEvaluation(
        model_id="m",
        fingerprint="f",
        layer_ids=GRID.layers,
        experts=GRID.experts,
        settings=settings,
        problem_ids=problems,
        families=tuple("ab"[at % 2] for at in range(len(problems))),
        arms=tuple(arms),
        comparisons=compare(arms, SAMPLES, rules),
        versions=(("torch", "2"),),
    )


FOUND = evaluation(
    {
        "unsteered": [0, 2, 4],
        "beta 2": [1, 2, 4],
        "random 1, beta 2": [0, 0, 0],
        "beta 8": [4, 4, 4],
    }
)


def test_figures_of_an_arm() -> None:
    arm = FOUND.arm("beta 2")
    assert arm.accuracy.value == arm.accuracy_wilson.value == pytest.approx(7 / 12)
    assert arm.accuracy.low <= arm.accuracy.value <= arm.accuracy.high
    assert arm.cut == (1, 1, 0)
    assert [k for k, _ in arm.pass_at] == [1, 2, 4]
    assert arm.pass_at[0][1].value == pytest.approx(arm.accuracy.value)
    assert arm.pass_at[-1][1].value == 1.0
    assert arm.thinking == (1.5, 11.5, 21.5)
    assert arm.thinking_median.value == 11.0
    assert arm.new_tokens == 240
    assert FOUND.by_family(arm) == {"a": (5, 8), "b": (2, 4)}


def test_comparisons_are_paired_and_corrected_by_family() -> None:
    one = FOUND.comparison("beta 2")
    assert one is not None
    assert one.difference.value == pytest.approx(1 / 12)
    assert (one.better, one.worse, one.p, one.family) == (1, 0, 1.0, "steered")
    specific = FOUND.comparison("beta 2", "random 1, beta 2")
    assert specific is not None
    assert specific.family == "specific"
    assert FOUND.comparison("beta 8", "random 1, beta 2") is None  # of another beta
    assert all(found.p_holm >= found.p for found in FOUND.comparisons)
    assert [one.against for one in FOUND.comparisons[:3]] == ["unsteered"] * 3


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = FOUND.save(tmp_path / "x.steer-eval.json")
    assert SteeringEvaluation.load(path) == FOUND


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("format",), "other", "field 'format' is 'other'"),
        (("version",), 2, "field 'version' is 2"),
        (("arms",), [], "an unsteered arm first"),
        (("arms", 1, "kind"), "magic", "arms[1].kind is 'magic'"),
        (("arms", 1, "right"), [1], "arm 'beta 2': right needs 3 numbers"),
        (("arms", 1, "right"), [9, 0, 0], "more outcomes than 4 samples"),
        (("arms", 1, "name"), "unsteered", "come twice"),
        (("arms", 1, "accuracy", "low"), "x", "arms[1].accuracy.low is 'x', not a finite number"),
        (("arms", 1, "experts"), [[1]], "arms[1].experts[0] has 1 entries, not 2"),
        (("settings", "samples"), True, "settings.samples is True, not a whole number"),
        (("arms", 1, "beta"), 10**400, "arms[1].beta is 1000"),
        (("settings", "seed"), None, "settings.seed is None"),
        (("families",), ["a"], "families has 1 entries for 3 problems"),
        (("comparisons", 0, "against"), "nobody", "names the arm 'nobody'"),
    ],
)
def test_a_damaged_file_is_refused_by_field(
    tmp_path: Path, place: tuple[Any, ...], value: Any, said: str
) -> None:
    data = json.loads(json.dumps(FOUND.to_dict()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "x.steer-eval.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        SteeringEvaluation.load(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_files_that_are_no_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ConfigError, match="no such evaluation"):
        SteeringEvaluation.load(path)
    for text, said in (("{", "no JSON text"), ("[]", "no JSON object"), ("{}", "'format' is None")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            SteeringEvaluation.load(path)


@pytest.mark.parametrize(
    ("rights", "chosen"),
    [
        # Clearly ahead: the best.
        ({"unsteered": [0] * 8, "beta 2": [0] * 8, "beta 8": [4] * 8}, 8.0),
        # Two betas equally good: the smaller, wherever it stands.
        ({"unsteered": [0] * 8, "beta 8": [4] * 8, "beta 2": [4] * 8}, 2.0),
        # Nearly as good, within noise of the best: the smaller.
        ({"unsteered": [0] * 8, "beta 2": [3, 4] * 4, "beta 8": [4, 3] * 3 + [4, 4]}, 2.0),
        # Not ahead of doing nothing by more than noise.
        ({"unsteered": [2] * 8, "beta 2": [4, 0] * 4, "beta 8": [4, 1] * 4}, 1.0),
        # Everything harms.
        ({"unsteered": [2] * 8, "beta 2": [1] * 8}, 1.0),
        # Nothing but the unsteered arm.
        ({"unsteered": [2] * 8}, 1.0),
        # Suppression is further from doing nothing than a small factor.
        ({"unsteered": [0] * 8, "beta 0.5": [4] * 8, "beta 4": [4] * 8}, 4.0),
        # Controls are no candidates.
        ({"unsteered": [0] * 8, "random 1, beta 2": [4] * 8, "beta 8": [1] * 8}, 8.0),
    ],
)
def test_beta_is_chosen_by_its_rule(rights: dict[str, list[int]], chosen: float) -> None:
    assert select_beta(evaluation(rights)) == chosen


# -- arms ------------------------------------------------------------------------------------------


def counts(values: list[list[float]]) -> RoutingCounts:
    return RoutingCounts(
        counts=tuple(np.array(one, dtype=float) for one in values),
        layer_ids=GRID.layers,
        experts=GRID.experts,
    )


COUNTS = counts([[10, 20, 30, 31, 29, 0, 35, 90], [1.0] * 8, [5, 9, 4, 6]])


def test_arms_in_their_order() -> None:
    controls = Controls(kinds=("tip", "random", "frequency", "prompt"), draws=2)
    arms = plan_arms(STEERING, [4, 1, 2, 4], controls, grid=GRID, seed=0, counts=COUNTS)
    assert [arm.name for arm in arms] == [
        *("unsteered", "beta 4", "beta 2"),
        *("random 1, beta 4", "random 1, beta 2", "random 2, beta 4", "random 2, beta 2"),
        *("frequency, beta 4", "frequency, beta 2", "tip", "prompt"),
    ]
    assert arms[0].experts == arms[-1].experts == ()
    assert arms[1].experts == tuple(STEERING.betas)
    assert arms[1].steering is not None
    assert set(arms[1].steering.betas.values()) == {4.0}
    assert arms[3].experts == arms[4].experts  # a draw is the same at every beta
    assert arms[3].experts != arms[5].experts
    assert len({arm.name for arm in arms}) == len(arms)


@given(st.integers(0, 2**30), st.integers(1, 5))
def test_random_experts_are_others_of_the_same_layers(seed: int, draw: int) -> None:
    experts = tuple(STEERING.betas)
    chosen = random_experts(experts, GRID, seed=seed, draw=draw)
    assert [layer for layer, _ in chosen] == [layer for layer, _ in experts]
    assert not set(chosen) & set(experts)
    assert len(set(chosen)) == len(chosen)
    assert all(GRID.index(*one) >= 0 for one in chosen)
    assert chosen == random_experts(experts, GRID, seed=seed, draw=draw)


def test_matched_experts_are_used_most_nearly_as_often() -> None:
    # Expert 2 has 30 uses: 4 has 29 (3, with 31, is steered). Expert 3 has 31: next is 6 with 35.
    # In layer 5 expert 0 has 5: 2 and 3 are as near, the lower number is taken.
    assert matched_experts(tuple(STEERING.betas), COUNTS, GRID) == ((1, 4), (1, 6), (5, 2))


def test_arms_that_cannot_be_are_refused() -> None:
    def arms(steering: Steering, controls: Controls, **options: Any) -> None:
        plan_arms(steering, [2], controls, grid=GRID, seed=0, **options)

    with pytest.raises(ConfigError, match="names no expert"):
        arms(Steering(betas={}), Controls())
    with pytest.raises(ConfigError, match="no expert 9 in layer 1"):
        arms(Steering(betas={(1, 9): 2.0}), Controls())
    with pytest.raises(ConfigError, match=r"how often experts are used.*\(--trace\)"):
        arms(STEERING, Controls(kinds=("frequency",)))
    other = replace(COUNTS, layer_ids=(0, 1, 2))
    with pytest.raises(ConfigError, match="give a trace of this model"):
        arms(STEERING, Controls(kinds=("frequency",)), counts=other)
    whole = Steering(betas={(5, expert): 2.0 for expert in range(4)})
    with pytest.raises(ConfigError, match="layer 5 has 4 experts, too few"):
        arms(whole, Controls(kinds=("random",)))
    with pytest.raises(ConfigError, match="unknown control 'ranom'; known: random"):
        Controls(kinds=("ranom",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown place"):
        Controls(prompt_place="middle")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a text"):
        Controls(kinds=("prompt",), prompt_text=" ")


@pytest.mark.parametrize(
    ("place", "prompt", "expected"),
    [
        ("start", "Q?\nA:", "Think.\nQ?\nA:"),
        ("end", "Q?\nA:", "Q?\nA:\nThink."),
        ("before-last-line", "Q?\nA:", "Q?\nThink.\nA:"),
        ("before-last-line", "Q?", "Think.\nQ?"),
    ],
)
def test_the_prompt_control_has_its_place(place: Any, prompt: str, expected: str) -> None:
    assert with_prompt(prompt, Controls(prompt_text="Think.", prompt_place=place)) == expected
