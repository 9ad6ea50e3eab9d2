"""Evaluation: figures against counting by hand, held-out rows, the file, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_runtime.predictors import save_predictor
from moe_runtime.predictors.baselines import AsTokenBefore
from moe_runtime.predictors.evaluate import evaluate
from moe_runtime.predictors.evaluation import Evaluation, Settings
from moe_runtime.predictors.frequency import PopularityPredictor
from moe_runtime.predictors.history import multi_hot
from moe_runtime.predictors.replay import put_together
from typer.testing import CliRunner

from moe_runtime.cli import app
from moe_runtime.errors import PredictorError, TraceError
from moe_runtime.trace import RoutingTrace
from routing_traces import planted_trace
from test_predictors import made_trace

KNOWN, HELD, CODE = made_trace(60), made_trace(48, seed=6), made_trace(32, seed=7, token=0.5)
SETTINGS = Settings(lookahead=2, batch_sizes=(1, 4))


class Oracle:
    """Knows what comes, and says `doubt` of it less."""

    name = "oracle"
    needs_token_ids = needs_hidden = False

    def __init__(self, trace: RoutingTrace, doubt: float = 0.0) -> None:
        self.grid = trace.grid
        self.truth = {
            (int(s), int(p)): ids
            for s, p, ids in zip(trace.sequence_ids, trace.positions, trace.topk_ids, strict=True)
        }
        self.doubt = doubt

    def begin_step(self, rows: Any) -> None:
        self.rows = rows

    def observe(self, *_: Any) -> None:
        pass

    def predict(self, position: int) -> Any:
        places = zip(self.rows.sequence_ids.tolist(), self.rows.positions.tolist(), strict=True)
        ids = np.stack([self.truth[key][position] for key in places]).astype(np.int64)
        return multi_hot(ids, self.grid.experts[position]) * np.float32(1 - self.doubt)

    def reset(self) -> None:
        pass


@pytest.fixture(scope="module")
def result() -> Evaluation:
    predictors: dict[str, Any] = {
        "popularity": PopularityPredictor.fit([KNOWN]),
        "oracle": Oracle(HELD),
        "shy oracle": Oracle(HELD, doubt=0.5),
        "repeats": AsTokenBefore(HELD.grid),
    }
    return evaluate(predictors, {"text": [HELD]}, SETTINGS)


def figures(result: Evaluation, name: str) -> Any:
    return next(one for one in result.figures if one.predictor == name)


def test_an_oracle_is_right(result: Evaluation) -> None:
    for score in figures(result, "oracle").scores:
        for column in ("recall_k", "precision_k", "recall_2k"):
            assert score.mean(column) == 1
    assert figures(result, "oracle").calibration_error == 0
    assert figures(result, "shy oracle").calibration_error == pytest.approx(0.5 * 2 / 12, abs=1e-6)
    assert figures(result, "shy oracle").calibration_error_top == pytest.approx(0.25, abs=1e-6)


def test_figures_are_those_of_counting_by_hand(result: Evaluation) -> None:
    hits, rows = 0, 0
    for before, row in zip(range(len(HELD) - 1), range(1, len(HELD)), strict=True):
        rows += 1
        if HELD.sequence_ids[before] == HELD.sequence_ids[row]:
            hits += len(set(HELD.topk_ids[before, 1]) & set(HELD.topk_ids[row, 1]))
        else:
            rows -= 1  # a sequence's first row is a prompt
    score = figures(result, "repeats").score(phase="decode", batch_size=1, distance=1)
    assert score.batches == rows
    assert score.recall_k[1] == pytest.approx(hits / (2 * rows), abs=1e-6)
    assert score.precision_2k[1] <= score.recall_2k[1]


def test_batches_are_unions(result: Evaluation) -> None:
    together = put_together(HELD, 4).decode()
    truth = [
        len(np.unique(together.topk_ids[together.step_ids == step, 2]))
        for step in np.unique(together.step_ids)
    ]
    score = figures(result, "popularity").score(phase="decode", batch_size=4, distance=1)
    assert score.batches == len(truth)
    assert score.experts[2] == pytest.approx(np.mean(truth), abs=1e-6)
    single = figures(result, "popularity").score(phase="decode", batch_size=1, distance=1)
    assert score.experts[2] > single.experts[2] == 2


def test_what_stands_beside(result: Evaluation) -> None:
    domain = result.domains[0]
    assert (domain.tokens, domain.decoded, domain.sequences) == (48, 44, 4)
    assert all(0.9 < value <= 1 for value in domain.entropy)
    one = figures(result, "popularity")
    assert sum(one.count) == 48 * 3 * 12
    assert one.microseconds > 0
    assert result.held_out
    second = one.score(phase="decode", batch_size=1, distance=2)
    assert second.recall_k[0] is None  # nothing is two layers before the first
    assert second.recall_k[1] is not None


def test_the_file(result: Evaluation, tmp_path: Path) -> None:
    path = result.save(tmp_path / "a.evaluation.json")
    assert Evaluation.load(path) == result
    data = json.loads(path.read_text())
    assert (data["format"], data["version"]) == ("moe-runtime.evaluation", 1)


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("format", "x", "this is no evaluation"),
        ("version", 2, "this release reads 1"),
        ("figures", [{}], "damaged .KeyError"),
        ("settings", None, "damaged"),
        ("layer_ids", [1], "entries for 1 layers"),
        ("domains", [], "no such domain"),
    ],
)
def test_a_damaged_file(
    result: Evaluation, tmp_path: Path, field: str, value: Any, found: str
) -> None:
    path = tmp_path / "a.evaluation.json"
    path.write_text(json.dumps({**result.to_dict(), field: value}))
    with pytest.raises(PredictorError, match=found) as error:
        Evaluation.load(path)
    assert str(path) in str(error.value)
    path.write_text("[")
    with pytest.raises(PredictorError, match="no JSON text"):
        Evaluation.load(path)


def test_refusals() -> None:
    fitted = PopularityPredictor.fit([KNOWN])
    with pytest.raises(PredictorError, match="are among those that the predictor was fitted to"):
        evaluate({"p": fitted}, {"text": [HELD], "again": [KNOWN]}, SETTINGS)
    allowed = evaluate({"p": fitted}, {"again": [KNOWN]}, SETTINGS, allow_fitted=True)
    assert not allowed.held_out
    with pytest.raises(TraceError, match="another layer_ids"):
        evaluate({"p": fitted}, {"a": [HELD], "b": [planted_trace(tokens=9)]}, SETTINGS)
    with pytest.raises(PredictorError, match="made for layers"):
        evaluate({"p": fitted}, {"b": [planted_trace(tokens=9)]}, SETTINGS)
    with pytest.raises(PredictorError, match="nothing to evaluate"):
        evaluate({}, {"text": [HELD]}, SETTINGS)
    broken = Oracle(HELD, doubt=float("nan"))
    with pytest.raises(PredictorError, match="oracle predictor gave"):
        evaluate({"broken": broken}, {"text": [HELD]}, SETTINGS)
    with pytest.raises(PredictorError, match="1 or more"):
        Settings(batch_sizes=(0,))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate-predictor", *map(str, arguments)])


def test_the_command(tmp_path: Path) -> None:
    known = KNOWN.save(tmp_path / "known.trace.safetensors")
    held = HELD.save(tmp_path / "held.trace.safetensors")
    code = CODE.save(tmp_path / "code.trace.safetensors")
    file = save_predictor(PopularityPredictor.fit([KNOWN]), tmp_path / "p.predictor.safetensors")
    out = tmp_path / "e.evaluation.json"
    few = ("--batch-sizes", "1,2", "--lookahead", 1)
    shown = run(file, "--trace", f"text={held}", "--trace", f"code={code}", "-o", out, *few)
    assert shown.exit_code == 0, shown.stderr
    assert "code: 32 tokens" in shown.stdout
    assert "recall" in shown.stdout
    assert "measuring p on text" in shown.stderr
    written = Evaluation.load(out)
    assert {one.predictor for one in written.figures} == {
        *("p", "as the token before", "as the layer before")
    }
    assert [domain.name for domain in written.domains] == ["text", "code"]

    unfitted = run("--trace", held, "--json", "--max-tokens", 24, *few)
    data = json.loads(unfitted.stdout)
    assert {one["predictor"] for one in data["figures"]} >= {"transition", "token table"}
    assert data["domains"][0]["name"] == "held out"

    fitted = run("--fit", known, "--trace", held, "--json", "--token-by-token", *few)
    names = {one["predictor"] for one in json.loads(fitted.stdout)["figures"]}
    assert names == {one["predictor"] for one in data["figures"]}
    assert json.loads(fitted.stdout)["domains"][0]["decoded"] == 44
    refitted = run("--fit", held, "--trace", held, *few)
    assert refitted.exit_code == 2

    refused = run(file, "--trace", known, *few)
    assert refused.exit_code == 2
    assert "give a trace of other text" in refused.stderr
    assert run(file, "--trace", known, "--allow-fitted", *few).exit_code == 0


def test_wrong_usage(tmp_path: Path) -> None:
    assert run().exit_code == 2
    assert run("--trace", "x", "--batch-sizes", "a").exit_code == 2
    missing = run(tmp_path / "no.safetensors", "--trace", HELD.save(tmp_path / "h.safetensors"))
    assert missing.exit_code == 2
    assert "no such predictor" in missing.stderr
