"""The pages of an evaluation and of a simulation, from files that the real functions made."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.predictors.baselines import AsLayerBefore, AsTokenBefore
from moe_runtime.predictors.evaluate import evaluate
from moe_runtime.predictors.evaluation import Evaluation, Settings
from moe_runtime.predictors.frequency import PopularityPredictor
from typer.testing import CliRunner, Result

from moe_runtime.cli import app
from moe_runtime.cli.session import to_stderr
from moe_runtime.cli.simulate_run import Request, simulated
from moe_runtime.errors import ConfigError, PredictorError
from moe_runtime.report import EvaluationReport, RunError, SimulationReport
from routing_traces import planted_trace
from test_predictors import made_trace
from test_report import Outline

RUBBISH = (None, "x", True, [], {}, -1, float("nan"), float("inf"))


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    known, held = made_trace(60, before=0.5), made_trace(64, seed=6, sequences=8, before=0.5)
    code = made_trace(64, seed=7, sequences=8, token=0.5)
    return evaluate(
        {
            "popularity": PopularityPredictor.fit([known]),
            "as the token before": AsTokenBefore(held.grid),
            "as <the layer> before": AsLayerBefore(held.grid),
        },
        {"text": [held], "code & such": [code]},
        Settings(lookahead=2, batch_sizes=(4, 1)),
    )


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("traces")
    names = ("lru", "lfu", "belady", "echo", "previous-layer", "transition", "oracle", "pre-gated")
    traces = tuple(
        planted_trace(tokens=60, seed=seed).save(folder / f"{seed}.trace.safetensors")
        for seed in (1, 2)
    )
    return simulated(
        Request(
            traces=traces,
            fit=(),
            predictors=(),
            contenders=names,
            explicit=True,
            budget="25%",
            expert_bytes="1MB",
            model=None,
            link=(1.0, 0.1, 3),
            compute={"layer": 1.0, "expert": 0.5, "call": 2.0, "forecast": 0.1},
            decode_only=True,
            recall=0.9,
            seed=0,
            trial=False,
        ),
        to_stderr(),
    )


def report(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def sound(page: str) -> Outline:
    outline = Outline(page)
    assert not outline.faults
    assert not outline.fetched
    assert "#010a0" not in page  # every colour is the page's own
    return outline


def test_an_evaluation_shows_all_that_was_measured(evaluation: Evaluation) -> None:
    page = EvaluationReport(evaluation).to_html()
    headings = sound(page).headings
    for title in (
        *("Recall and precision, by predictor", "Cost and calibration, by predictor"),
        *("Recall at 2k, by layer", "Recall at 2k, by layers ahead", "Reliability"),
        *("Recall and precision at k, by batch size", "Evenness of routing, by layer"),
    ):
        assert title in headings
    assert page.count("<svg") == 7
    assert "<the layer>" not in page
    assert page.count("<td>decode</td>") == sum(
        score.phase == "decode" for one in evaluation.figures for score in one.scores
    )


def test_the_best_is_the_best_and_figures_are_the_files(evaluation: Evaluation) -> None:
    facts = EvaluationReport(evaluation).facts()
    by_name = {
        one.predictor: one.score(phase="decode", batch_size=1, distance=1)
        for one in evaluation.figures
        if one.domain == "text"
    }
    assert facts["best"] == max(by_name, key=lambda name: by_name[name].mean("recall_2k"))
    for row in facts["predictors"]:
        if row["domain"] == "text":
            assert row["recall_k"] == by_name[row["predictor"]].mean("recall_k")
            assert row["recall_2k_lost"] == 0
    rows = {(row["predictor"], row["domain"]): row for row in facts["predictors"]}
    text, code = (rows["as the token before", name] for name in ("text", "code & such"))
    assert code["recall_2k_lost"] == pytest.approx(text["recall_2k"] - code["recall_2k"])
    assert text["recall_k"] > code["recall_k"] + 0.1  # made so: only the text repeats itself
    lines = str(EvaluationReport(evaluation)).splitlines()
    assert facts["best"] in lines[0]
    assert f"{100 * text['recall_k']:.1f} %" in next(
        line for line in lines if line.startswith("as the token before")
    )


def test_what_to_beware_of_is_said(evaluation: Evaluation) -> None:
    data = evaluation.to_dict()
    assert not any("flatters" in one for one in EvaluationReport(evaluation).facts()["warnings"])
    fitted = Evaluation.from_dict({**data, "held_out": False})
    assert any("flatters" in one for one in EvaluationReport(fitted).facts()["warnings"])
    prompts = json.loads(json.dumps(data).replace('"decode"', '"prefill"'))
    for one in prompts["figures"]:  # no two scores of the same phase, batch and distance
        one["scores"] = one["scores"][:4]
    found = EvaluationReport(Evaluation.from_dict(prompts))
    assert found.facts()["phase"] == "prefill"
    assert any("token-by-token" in one for one in found.facts()["warnings"])
    sound(found.to_html())


def test_little_renders(evaluation: Evaluation) -> None:
    data = evaluation.to_dict()
    for change in (
        {"figures": []},
        {"figures": [], "domains": []},
        {"figures": [{**one, "scores": []} for one in data["figures"]]},
        {"figures": [{**one, "said": [], "came_true": [], "count": []} for one in data["figures"]]},
        {"figures": [{**one, "microseconds": None} for one in data["figures"]]},
        {"figures": data["figures"][:1]},
    ):
        few = EvaluationReport(Evaluation.from_dict({**data, **change}))
        assert str(few)
        assert json.dumps(few.facts(), allow_nan=False)
        sound(few.to_html())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_evaluation_is_refused_or_renders(evaluation: Evaluation, data: Any) -> None:
    record = damaged(evaluation.to_dict(), data)
    try:
        found = EvaluationReport(Evaluation.from_dict(record))
    except PredictorError:
        return
    assert str(found)
    assert json.dumps(found.facts(), allow_nan=False)


def damaged(record: dict[str, Any], data: Any) -> dict[str, Any]:
    """Plain data with one value, at any depth, replaced by another or taken out."""
    record = json.loads(json.dumps(record))
    place: Any = record
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        if data.draw(st.integers(0, 4)):
            place[key] = data.draw(st.sampled_from(RUBBISH))
        else:
            del place[key]
        return record


def test_a_simulation_marks_who_is_who(simulation: dict[str, Any]) -> None:
    found = SimulationReport.from_dict(simulation)
    page = found.to_html()
    assert {"Bytes and speed", "Experts needed"} <= set(sound(page).headings)
    assert page.count("<svg") == 2
    rows = {row["title"]: row for row in found.facts()["contenders"]}
    assert {title: row["role"] for title, row in rows.items()} == {
        "lru": "lru",
        "lfu": "",
        "belady": "bound",
        "echo": "ours",
        "previous-layer": "",
        "transition": "ours",
        "oracle": "oracle",
        "pre-gated (recall 0.9)": "oracle",
    }
    for words in ("plain LRU", "own", "knows the run", "bound on demand", *rows):
        assert words in page
    speeds = [row["tokens_per_second"] for row in found.facts()["contenders"]]
    assert speeds == sorted(speeds, reverse=True)
    own = max(("echo", "transition"), key=lambda name: rows[name]["tokens_per_second"])
    assert found.outcome.startswith(f"{own}: ")
    given = {row["title"]: row for row in simulation["contenders"]}
    assert rows["transition"]["read"] == given["transition"]["bytes"]["read"]
    assert "not measured" in page


def test_a_simulation_of_few_renders(simulation: dict[str, Any]) -> None:
    for count in (0, 1, 3):
        few = {**simulation, "contenders": simulation["contenders"][:count]}
        few["left_out"] = [{"title": "static", "why": "no <counts>"}]
        found = SimulationReport.from_dict(few)
        assert "no <counts>" in str(found)
        page = found.to_html()
        sound(page)
        assert "no &lt;counts&gt;" in page


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("version",), 2, "reads 1"),
        (("setting", "link"), None, "'link' must be an object"),
        (("contenders", 0, "tokens_per_second"), "x", "contenders[0].tokens_per_second must be"),
        (("contenders", 1, "bytes", "read"), -1, "contenders[1].bytes.read"),
        (("contenders", 1, "bytes", "wasted"), 10**15, "more wasted than read"),
        (("contenders", 2, "missed"), 10**9, "add up"),
        (("contenders", 2, "title"), 3, "contenders[2].title must be a text"),
    ],
)
def test_a_damaged_simulation_is_refused_by_field(
    simulation: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], value: Any, says: str
) -> None:
    record = copy.deepcopy(simulation)
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "sim.json"
    file.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"sim\.json: simulation: ") as error:
        SimulationReport.load(file)
    assert says in str(error.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damaged_simulation_is_refused_or_renders(
    simulation: dict[str, Any], data: Any
) -> None:
    record = damaged(simulation, data)
    try:
        found = SimulationReport.from_dict(record)
    except RunError:
        return
    assert str(found)
    assert json.dumps(found.facts(), allow_nan=False)


def test_the_command(evaluation: Evaluation, simulation: dict[str, Any], tmp_path: Path) -> None:
    measured = evaluation.save(tmp_path / "a.evaluation.json")
    played = tmp_path / "sim.json"
    played.write_text(json.dumps(simulation))
    for number, (file, words) in enumerate(
        ((measured, "evaluation of predictors"), (played, "simulation"))
    ):
        page = tmp_path / f"{number}.html"
        assert report(file, "-o", page).exit_code == 0
        assert f"moe-runtime · {words}" in page.read_text(encoding="utf-8")
        shown = json.loads(report(file, "--json").stdout)
        assert shown["outcome"] in report(file).stdout
        assert shown["summary"]["best"]
        assert report(file, "--trace", "x").exit_code == 2
        assert report(file, "-o", tmp_path / "x.pdf").exit_code == 1
    measured.write_text("[")
    broken = report(measured)
    assert broken.exit_code == 2
    assert "a.evaluation.json" in broken.stderr
    played.write_text('{"format": "moe-runtime.simulation", "version": 1}')
    assert "'setting' must be an object" in report(played).stderr


def test_only_pages_and_json(
    evaluation: Evaluation, simulation: dict[str, Any], tmp_path: Path
) -> None:
    for found in (EvaluationReport(evaluation), SimulationReport.from_dict(simulation)):
        with pytest.raises(ConfigError, match=r"\.html or \.json"):
            found.save(tmp_path / "x.pdf")
        saved = found.save(tmp_path / "x.json")
        assert json.loads(saved.read_text(encoding="utf-8")) == found.facts()
        assert repr(found).endswith(f"({found.outcome})")
    assert np.isfinite(EvaluationReport(evaluation).facts()["predictors"][0]["recall_k"])
