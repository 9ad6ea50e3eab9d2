"""The report of a run with a predictor: what is refused, what is said, what is drawn."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from moe_runtime.report import Report, RunError
from moe_runtime.report.summary import percent
from run_records import EXPERT_BYTES, run_record

KEPT = {"step": 64, "state": "predicting", "ratio": 0.93, "error": 0.02, "why": "faster <1>"}
TRIAL = {"step": 0, "state": "trial", "ratio": None, "error": None, "why": ""}
GIVEN_UP = {"step": 96, "state": "plain", "ratio": 1.08, "error": 0.03, "why": "slower"}


def with_prediction(**changes: Any) -> dict[str, Any]:
    """A run of which a third of the hits came ahead and a fifth of the misses were late."""
    record = run_record()
    layers = []
    for at, row in enumerate(record["layers"]):
        in_time, late = row["hits"] // 3, row["misses"] // 5
        layers.append(
            {
                "layer": row["layer"],
                "resident": row["hits"] - in_time,
                "in_time": in_time,
                "late": late,
                "unused": 4,
                "withdrawn": 2,
                "missed": row["misses"] - late,
                "recall": [round(0.8 - 0.05 * at, 4) if at else None, None if at < 2 else 0.6],
            }
        )
    total = {
        name: sum(row[name] for row in layers)
        for name in ("in_time", "late", "unused", "withdrawn")
    }
    record["prediction"] = {
        "predictor": "transition <2>",
        "rules": {"lookahead": 2, "bar": 0.4},
        "seconds": 0.02,
        "failure": "",
        "state": "plain",
        "decisions": [TRIAL, GIVEN_UP],
        "loads": {"ahead": sum(total.values()) + 3, **total, "pending": 3, "evictions": 30},
        "bytes": {
            "ahead": (total["in_time"] + total["late"] + total["unused"] + 3) * EXPERT_BYTES + 500,
            **{name: value * EXPERT_BYTES for name, value in total.items()},
            "withdrawn": 500,
        },
        "layers": layers,
    } | changes
    return record


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "tried for 96 steps and given up: steps with it took 1.08 times as long",
        ),
        (
            {"state": "predicting", "decisions": [TRIAL, KEPT]},
            "tried for 64 steps and kept: steps with it took 0.93 times as long",
        ),
        (
            {
                "state": "trial",
                "decisions": [TRIAL, GIVEN_UP, {**TRIAL, "step": 2144}],
            },
            "1.08 times as long; from step 2,144 on it was tried again, undecided at the end",
        ),
        (
            {
                "decisions": [TRIAL, KEPT, {**TRIAL, "step": 1088}, {**GIVEN_UP, "step": 1152}],
            },
            "tried for 64 steps and given up",
        ),
        ({"state": "trial", "decisions": [TRIAL]}, "ended before its trial"),
        ({"state": "predicting", "decisions": [TRIAL]}, "no trial was made"),
        ({"failure": "layer 2: NaN"}, "prediction failed and was given up: layer 2: NaN"),
    ],
)
def test_the_verdict_says_what_the_trial_decided(changes: dict[str, Any], sentence: str) -> None:
    report = Report.from_run(with_prediction(**changes))
    assert report.prediction is not None
    untried = sentence == "no trial was made"
    assert ("From decode step" in report.to_html()) != untried
    assert sentence in report.prediction["verdict"]
    assert sentence in str(report)
    assert sentence[1:] in report.to_html()  # a sentence of the page begins with a capital


def test_the_figures_are_the_record_s() -> None:
    record = with_prediction()
    report = Report.from_run(record)
    shown, counters, section = report.prediction, record["counters"], record["prediction"]
    assert shown is not None
    uses = counters["hits"] + counters["misses"]
    assert sum(shown["outcomes"].values()) == pytest.approx(1)
    assert shown["outcomes"]["resident"] + shown["outcomes"]["in_time"] == pytest.approx(
        counters["hits"] / uses
    )
    wasted = section["bytes"]["unused"] + section["bytes"]["withdrawn"]
    assert shown["wasted_bytes"] == wasted
    loaded = (
        sum(row["missed"] for row in section["layers"]) * EXPERT_BYTES
        + sum(section["loads"][name] for name in ("in_time", "late", "pending")) * EXPERT_BYTES
        + wasted
    )
    assert shown["wasted_share"] == wasted / loaded
    assert shown["seconds_per_token"] == section["seconds"] / counters["tokens"]
    assert shown["recall"] == pytest.approx([(0.75 + 0.7 + 0.65) / 3, 0.6])
    assert json.dumps(shown, allow_nan=False)
    text = str(report)
    assert f"read in vain, {percent(wasted / loaded)} of all expert bytes" in text


def test_the_page_draws_and_lists_it() -> None:
    page = Report.from_run(with_prediction()).to_html()
    plain = Report.from_run(run_record()).to_html()
    assert page.count("<svg") == plain.count("<svg") + 3
    for words in (
        "Experts needed, by layer",
        "Recall, by layer",
        "Bytes and misses",
        "transition &lt;2&gt;",
        "<td>1.080</td>",
        "this run, measured",
        "lru with prediction, as run",
        "no policy that loads on demand can miss less",
    ):
        assert words in page
        assert words not in plain
    assert "#010a" not in page
    assert not re.search(r"url\((?!#)", page)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", page))


def test_a_run_without_predictor_says_nothing_of_it() -> None:
    report = Report.from_run(run_record())
    assert report.prediction is None
    assert "predict" not in str(report)


def test_a_run_that_used_nothing_renders() -> None:
    record = with_prediction(layers=[], decisions=[], seconds=0)
    for name in ("loads", "bytes"):
        record["prediction"][name] = dict.fromkeys(record["prediction"][name], 0)
    report = Report.from_run(record)
    assert "no byte that was read ahead was wasted" in str(report)
    assert "<td>in time</td><td>0</td>" in report.to_html()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((), 3, "prediction must be an object, found int"),
        (("predictor",), None, "prediction.predictor must be a name"),
        (("seconds",), -1, "prediction.seconds must be finite and not negative"),
        (("state",), "maybe", "prediction.state must be one of"),
        (("decisions",), "none", "prediction.decisions must be a list"),
        (("decisions", 1, "ratio"), "slow", r"decisions\[1\].ratio must be a number"),
        (("decisions", 0, "state"), "", r"decisions\[0\].state must be one of"),
        (("loads", "late"), 1.5, "prediction.loads.late must be a whole number"),
        (("bytes",), [], "prediction.bytes must be an object, found list"),
        (("layers", 2), 1, r"prediction.layers\[2\] must be an object, found int"),
        (("layers", 1, "layer"), 9, r"layers\[1\] is of layer 9, which model.layers lacks"),
        (("layers", 1, "recall"), None, r"layers\[1\].recall must be a list"),
        (("layers", 1, "recall"), [2], r"layers\[1\].recall\[0\] must be a share of 0 to 1"),
    ],
)
def test_damaged_sections_are_refused(
    place: tuple[str | int, ...], value: Any, message: str
) -> None:
    record = copy.deepcopy(with_prediction())
    inner: Any = record
    path = ("prediction", *place)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(RunError, match=message):
        Report.from_run(record)
