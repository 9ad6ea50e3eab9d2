"""`moe-runtime generate --prompts`: a file of prompts in, texts in their order out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime.predictors.files import save_predictor
from moe_runtime.predictors.token_table import TokenTablePredictor
from transformers import AutoTokenizer
from typer.testing import CliRunner

import moe_runtime
from moe_runtime.cli import app
from moe_runtime.report import Report

TEXTS = ["def one(a):", "The State of the Union", "x = 3\ny =", "When we", "import os\nimport"]
NEW = 4


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def trace() -> moe_runtime.RoutingTrace:
    """A few tokens of the bundled model."""
    model = moe_runtime.from_pretrained(moe_runtime.bundled_model(), device="cpu")
    with moe_runtime.record(model) as recorder:
        moe_runtime.generate_batches(
            model, [[5, 6, 7], [9, 10]], batch_size=2, max_new_tokens=4, stop_tokens=()
        )
    return recorder.trace


def generate(prompts: Path, *more: object) -> Any:
    return run(
        *("generate", moe_runtime.bundled_model(), "--prompts", prompts, "-n", NEW),
        *("--batch-size", 2, "--expert-budget", "30%", "--dtype", "float32", *more),
    )


def test_texts_come_in_the_order_of_the_prompts(prompts: Path, tmp_path: Path) -> None:
    lines, record = tmp_path / "texts.jsonl", tmp_path / "run.json"
    page = tmp_path / "run.html"
    written_to = ("-o", lines, "--run", record, "--report", page)
    result = generate(prompts, "--compare", "--verify", "--json", *written_to)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["report"] == str(page)
    assert page.read_text(encoding="utf-8") == Report.load(record).to_html()
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert data["generated"] == written
    assert [one["prompt"] for one in written] == TEXTS
    path = moe_runtime.bundled_model()
    model = moe_runtime.from_pretrained(path, device="cpu", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for one in written:
        ids = tokenizer(one["prompt"], return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
        assert one["tokens"] == alone.tolist()
        assert one["text"] == tokenizer.decode(alone, skip_special_tokens=True)
    assert data["run"]["schedule"] == "union"
    assert data["run"]["decode"]["active"] > 0
    assert data["run"]["agreement"]["different"] == 0
    assert data["in_order"]["schedule"] == "order"
    assert json.loads(record.read_text())["generated"][1]["prompt"] == TEXTS[1]


def test_a_summary_for_people(prompts: Path) -> None:
    result = generate(prompts, "--compare", "--verify", "--window", "all")
    assert result.exit_code == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line[:2] == "1:"] == ["1"]
    for said in ("active experts a batch", "over in order", "0 of 5 prompts", "near tie"):
        assert said in result.stderr


def test_a_predictor_file_schedules(
    prompts: Path, trace: moe_runtime.RoutingTrace, tmp_path: Path
) -> None:
    path = tmp_path / "table.predictor.safetensors"
    save_predictor(TokenTablePredictor.fit(trace), path)
    result = generate(prompts, "--predictor", path, "--json")
    assert result.exit_code == 0, result.stderr
    outcome = json.loads(result.stdout)["run"]
    assert outcome["predictor"] == "token table"
    assert outcome["scheduled"]
    assert not outcome["fallback"]


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_bad_predictor_file_is_a_message(
    prompts: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "bad.predictor.safetensors"
    if content is not None:
        path.write_bytes(content)
    result = generate(prompts, "--predictor", path)
    assert result.exit_code in {1, 2}
    assert f"error: {path}" in result.stderr
    assert not result.stdout


def test_a_predictor_for_another_model_is_a_message(
    prompts: Path, trace: moe_runtime.RoutingTrace, tmp_path: Path
) -> None:
    path = tmp_path / "other.predictor.safetensors"
    save_predictor(TokenTablePredictor.fit(replace(trace, fingerprint="0" * 16)), path)
    result = generate(prompts, "--predictor", path)
    assert result.exit_code in {1, 2}
    assert f"error: {path}" in result.stderr


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", (), "empty or blank"),
        ("one\n", ("--schedule", "magic"), "union, k-medoids, order"),
        ("one\n", ("--window", "few"), "'all'"),
    ],
)
def test_bad_input_is_a_message(
    tmp_path: Path, text: str, options: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    result = generate(path, *options)
    assert result.exit_code == 1
    assert said in result.stderr
