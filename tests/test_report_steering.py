"""The page of steering: it shows what the files hold, says what to beware of, refuses the rest."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moe_runtime.cli import app
from moe_runtime.errors import ConfigError
from moe_runtime.report import SteeringReport
from moe_runtime.report.steering_figures import score_map
from moe_runtime.report.steering_parts import STEERING_KINDS, SteeringParts
from moe_runtime.report.steering_published import PUBLISHED
from moe_runtime.steering.evaluation import SteeringEvaluation
from moe_runtime.steering.files import SteeredModel, SteeringFile, write_steering
from moe_runtime.steering.values import Steering
from steering_files import (
    CHOSEN,
    made_arm,
    made_cost,
    made_evaluation,
    made_identification,
)
from test_report import Outline

ENDINGS = {"steer": "a.steer.json", "eval": "a.steer-eval.json", "cost": "a.steer-cost.json"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind, of one model; evaluations of two task files."""
    folder = tmp_path_factory.mktemp("steering")
    paths = {name: folder / ending for name, ending in ENDINGS.items()}
    write_steering(
        paths["steer"],
        Steering(betas=dict.fromkeys(CHOSEN, 16.0)),
        identification=made_identification(),
    )
    made_evaluation().save(paths["eval"])
    paths["test"] = made_evaluation((16,), tasks="held & out").save(folder / "b.steer-eval.json")
    made_cost().save(paths["cost"])
    return paths


def sound(page: str) -> Outline:
    outline = Outline(page)
    assert not outline.faults
    assert not outline.fetched
    assert "#010a0" not in page  # every colour is the page's own
    return outline


def report(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def of(evaluation: SteeringEvaluation) -> SteeringReport:
    return SteeringReport(SteeringParts(evaluations=(evaluation,)))


# -- what it shows --------------------------------------------------------------------------------


def test_all_parts_on_one_page(files: dict[str, Path]) -> None:
    page = SteeringReport.load(*files.values()).to_html()
    headings = sound(page).headings
    for title in (
        *("Which experts", "Score of every expert", "The first 12 experts"),
        *("Right answers, by beta", "Thinking tokens, by beta", "What became of the samples"),
        *("Speed, hits and reads", "Routing shift, by layer", "What the paper published"),
    ):
        assert title in headings
    assert "Whether it helps: held & out" in "".join(headings)
    assert page.count("<svg") == 2 + 2 * 3 + 2
    assert "<up>" not in page
    assert "<fast>" not in page
    assert "NaN" not in page
    assert len(page) < 600_000


@pytest.mark.parametrize("kind", ENDINGS)
def test_each_part_stands_alone(kind: str, files: dict[str, Path]) -> None:
    found = SteeringReport.load(files[kind])
    sound(found.to_html())
    assert "nothing" not in found.outcome
    assert found.outcome == str(found).splitlines()[0] == found.facts()["outcome"]
    json.dumps(found.facts(), allow_nan=False)
    published = "not measured here" in found.to_html()
    assert published == (kind == "eval")  # the paper's figures stand beside figures alone


def test_given_experts_need_no_identification(tmp_path: Path) -> None:
    path = write_steering(
        tmp_path / "given.steer.json",
        Steering(betas={(1, 2): (1.0, 2.0)}, thinking=("<think>", "</think>")),
        model=SteeredModel(model_id="m", layer_ids=(1,), experts=(8,)),
    )
    found = SteeringReport.load(path)
    page = found.to_html()
    sound(page)
    assert found.outcome == "layer 1 expert 2: given, not found by an identification"
    assert "does not say how they were found" in page
    assert "by row" in page


def test_figures_are_those_of_the_files(files: dict[str, Path]) -> None:
    facts = SteeringReport.load(*files.values()).facts()
    evaluation, cost = SteeringEvaluation.load(files["eval"]), made_cost()
    assert [(one["layer"], one["expert"]) for one in facts["ranked"][:2]] == list(CHOSEN)
    shown = {arm["name"]: arm for arm in facts["evaluations"][0]["arms"]}
    for arm in evaluation.arms:
        assert shown[arm.name]["accuracy"] == arm.accuracy.value
        assert shown[arm.name]["thinking_tokens"] == arm.thinking_median.value
    assert [one["changed"] for one in facts["costs"][0]["shift"]] == [
        one.changed for one in cost.shift.layers
    ]
    page = SteeringReport.load(files["eval"]).to_html()
    cells = re.findall(r"<tr[^>]*><td>beta 16</td><td>([^<]*)</td>", page)
    assert cells == [f"{100 * evaluation.arm('beta 16').accuracy.value:.1f} %"]


def test_the_heat_map_is_of_the_scores() -> None:
    found = made_identification()
    drawn, most = score_map(found, CHOSEN)
    assert most == pytest.approx(float(np.nanmax(np.abs(found.score_map()))))
    framed = drawn.count("stroke-width: 1.8")
    assert framed == len(CHOSEN)
    empty = replace(found, scores=tuple((None,) * 32 for _ in range(6)))
    assert score_map(empty, CHOSEN) == ("", 0.0)


def test_the_papers_figures_say_where_they_were_read() -> None:
    page = of(made_evaluation((16,))).to_html()
    assert "the paper's, not measured here" in page
    for one in PUBLISHED:
        assert one.read_in in {"third-party notes", "OpenReview review"}
        assert f"<td>{one.steered}</td>" in page


# -- what it says ---------------------------------------------------------------------------------


def shifted(by: int, tasks: str = "t") -> SteeringEvaluation:
    """150 problems of 4 samples: 2 right unsteered, 2 + `by` steered in most of them."""
    found = made_evaluation((16,), tasks=tasks, controls=False)
    plain = replace(found.arms[0], right=(2,) * 150, cut=(0,) * 150, no_end=(0,) * 150)
    arm = replace(found.arms[1], right=(2 + by,) * 140 + (2,) * 10)
    middle = by * 140 / 150 / 4
    one = found.comparisons[0]
    compared = replace(
        one,
        difference=replace(one.difference, value=middle, low=middle - 0.05, high=middle + 0.05),
        p_holm=0.0004 if by else 1.0,
    )
    return replace(found, arms=(plain, arm), comparisons=(compared,))


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (1, "+23.3 points (+18.3 to +28.3, p < 0.001): helps"),
        (-1, "-23.3 points (-28.3 to -18.3, p < 0.001): harms"),
        (0, "+0.0 points (-5.0 to +5.0, p = 1.000): no difference is shown"),
    ],
)
def test_the_verdict_needs_interval_and_corrected_test(by: int, words: str) -> None:
    assert words in of(shifted(by)).outcome.replace("\N{MINUS SIGN}", "-")


def test_an_interval_without_the_corrected_test_is_no_verdict() -> None:
    found = shifted(1)
    weak = replace(found, comparisons=(replace(found.comparisons[0], p_holm=0.2),))
    assert of(weak).outcome.endswith("no difference is shown")


def test_the_best_of_many_betas_is_called_that() -> None:
    assert ", the best of 9 betas:" in of(made_evaluation()).outcome
    assert "the best of" not in of(made_evaluation((16,))).outcome


def test_a_frozen_beta_is_told_whatever_others_did() -> None:
    """The steering file's beta is the one that was decided on; the best of a test is luck too."""
    found, folder = made_evaluation((8, 16, 64)), Path("a.steer.json")
    file = SteeringFile(
        steering=Steering(betas=dict.fromkeys(CHOSEN, 64.0)), model=SteeredModel(), path=folder
    )
    best, frozen = of(found), SteeringReport(SteeringParts(file=file, evaluations=(found,)))
    assert max(sum(arm.right) for arm in found.arms) > sum(found.arm("beta 64").right)
    assert frozen.outcome.startswith("beta 64 on 2 experts: ")
    assert not best.outcome.startswith("beta 64")
    assert '<tr class="run"><td>beta 64</td>' in frozen.to_html()
    assert "random 1, beta 64" in str(frozen)
    assert "random 1, beta 16" not in str(frozen)


def test_a_control_that_does_as_well_is_told() -> None:
    found = made_evaluation((16,))
    steered, plain = found.arm("beta 16"), found.unsteered
    assert sum(steered.right) > sum(plain.right)
    told = "which experts are steered is not shown to matter"
    assert told not in " ".join(of(found).facts()["warnings"])
    equal = replace(found.arm("random 2, beta 16"), right=steered.right)
    arms = tuple(equal if arm.name == equal.name else arm for arm in found.arms)
    warnings = " ".join(of(replace(found, arms=arms)).facts()["warnings"])
    assert f"“random 2, beta 16” is as accurate as the steered experts: {told}" in warnings


def test_doubts_are_told() -> None:
    few = made_evaluation((16,), controls=False, problems=40)
    warnings = of(few).facts()["warnings"]
    assert any("40 problems tell only large differences" in one for one in warnings)
    assert any("no other experts were steered" in one for one in warnings)


def test_beta_0_and_1_and_halves_have_places_on_the_axis() -> None:
    found = made_evaluation((0.0, 0.5, 2.0, 64.0))
    page = of(found).to_html()
    sound(page)
    for label in ("0", "0.5", "1", "2", "64", "prompt only", "TIP"):
        assert re.search(rf"<text[^>]*>{re.escape(label)}</text>", page), label


def test_one_arm_alone_is_drawn_without_curves() -> None:
    lone = made_arm("unsteered", "unsteered", 1.0, 0.4)
    found = replace(made_evaluation((16,)), arms=(lone,), comparisons=())
    page = of(found).to_html()
    sound(page)
    assert page.count("<svg") == 1
    assert of(found).outcome == "no steered run is in the evaluation"


# -- the command ----------------------------------------------------------------------------------


def test_the_command_writes_one_page_of_several_files(
    files: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    result = report(
        *(files["steer"], "--with", files["eval"], "--with", files["cost"], "-o", page, "--json")
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["report"] == str(page)
    assert told["summary"]["costs"]
    sound(page.read_text(encoding="utf-8"))
    shown = report(files["cost"])
    assert "choices changed, by layer: 0: 0.0 %" in shown.stdout


def test_what_does_not_go_together_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = replace(made_cost(), fingerprint="beef").save(tmp_path / "x.steer-cost.json")
    with pytest.raises(ConfigError, match=r"fingerprint beef, .* of f00d"):
        SteeringReport.load(files["steer"], other)
    with pytest.raises(ConfigError, match="second steering file"):
        SteeringReport.load(files["steer"], files["steer"])
    plan = tmp_path / "x.plan.json"
    plan.write_text('{"format": "moe-runtime.plan"}')
    result = report(files["steer"], "--with", plan)
    assert result.exit_code == 1
    assert "'moe-runtime.plan', none of 'moe-runtime.steering'" in result.stderr
    result = report(plan, "--with", files["steer"])
    assert result.exit_code == 2
    assert "--with goes with a file of steering" in result.stderr


@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize("damage", ["cut", "empty", "list", "version"])
def test_damage_is_refused_by_file(
    kind: str, damage: str, files: dict[str, Path], tmp_path: Path
) -> None:
    text = files[kind].read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    path = tmp_path / files[kind].name
    path.write_text(
        {
            "cut": text[: len(text) // 2],
            "empty": "",
            "list": "[]",
            "version": json.dumps({**data, "version": 99}),
        }[damage]
    )
    page = tmp_path / "page.html"
    result = report(path, "-o", page)
    assert result.exit_code == 1
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    assert not page.exists()


def test_kinds_of_files_have_their_own_names() -> None:
    assert sorted(STEERING_KINDS.values()) == sorted(f".{e[2:]}" for e in ENDINGS.values())
