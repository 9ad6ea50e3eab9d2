"""`moe-runtime steer find`: it prints and writes what `identify` finds; errors, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import moe_runtime
from marked_traces import random_trace
from moe_runtime.cli import app
from moe_runtime.steering import Identification, identify, read_steering
from moe_runtime.trace import RoutingTrace

MODEL = moe_runtime.bundled_model()
THINK = ("--token", "<think>=1", "--token", "</think>=-1")
QUICK = ("--least-joint", "1", "--least-uses", "1", "--bootstrap", "20")
TOKENS = {1: 3, 2: 4}  # the start and end marker of the trace as the bundled tokenizer's


def run(*arguments: object) -> Any:
    return CliRunner().invoke(
        app, ["steer", "find", *map(str, arguments), "--tokenizer", MODEL], env={"COLUMNS": "120"}
    )


def trace() -> RoutingTrace:
    """As `random_trace`, with the bundled tokenizer's markers."""
    made = random_trace(0)
    tokens = made.token_ids.copy()
    for mine, theirs in TOKENS.items():
        tokens[made.token_ids == mine] = theirs
    tokens[(made.token_ids == 3) | (made.token_ids == 4)] = 20
    return random_trace(0, token_ids=tokens, tokenizer_id="somewhere/bundled")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return trace().save(tmp_path / "a.trace.safetensors")


def expected(path: Path, **options: Any) -> Identification:
    return identify(
        [path],
        {"<think>": 1.0, "</think>": -1.0},
        **{"top": 2, "least_joint": 1, "least_uses": 1, "bootstrap": 20, **options},
        tokenizer=AutoTokenizer.from_pretrained(MODEL),
    )


def test_it_writes_what_identify_finds(path: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "new" / "a.steer.json", tmp_path / "new" / "a.png"
    result = run(path, *THINK, *QUICK, "-o", out, "--picture", picture, "--beta", "8")
    assert result.exit_code == 0, result.stderr
    file = read_steering(out)
    assert file.identification == expected(path)
    assert dict(file.steering.betas) == dict.fromkeys(expected(path).chosen, 8.0)
    assert file.model.fingerprint == "beef"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(out) in result.stdout
    first = expected(path).ranked[0]
    line = next(line for line in result.stdout.splitlines() if line.lstrip().startswith("1 "))
    assert line.split()[1:3] == [str(first.layer), str(first.expert)]
    assert f"{first.score:.3f}" in line


def test_json_is_one_object(path: Path) -> None:
    result = run(path, *THINK, *QUICK, "--json", "--top", "3", "--seed", "4", "--no-prompt")
    assert result.exit_code == 2  # the start marker stands in the prompt
    assert "count the prompt too" in json.loads(result.stdout)["message"]
    data = json.loads(run(path, *THINK, *QUICK, "--json", "--top", "3", "--seed", "4").stdout)
    wanted = expected(path, top=3, seed=4)
    assert Identification.from_dict(data["identification"]) == wanted
    assert [(one["layer"], one["expert"]) for one in data["chosen"]] == list(wanted.chosen)
    assert data["steering"] is None
    assert data["beta"] == 64.0


def test_several_traces_add_up(path: Path, tmp_path: Path) -> None:
    other = trace().save(tmp_path / "b.trace.safetensors")
    data = json.loads(run(path, other, *THINK, *QUICK, "--json").stdout)
    assert data["identification"]["rows"] == 2 * len(trace())
    assert data["identification"]["sequences"] == 12
    assert data["identification"]["traces"] == [str(path), str(other)]


def test_small_counts_and_another_tokenizer_are_said(path: Path, tmp_path: Path) -> None:
    shown = " ".join(run(path, *THINK, *QUICK).stdout.split())
    assert "6 sequences are few" in shown
    assert "recorded with the tokenizer" not in shown
    other = random_trace(0, token_ids=trace().token_ids).save(tmp_path / "b.trace.safetensors")
    shown = " ".join(run(other, *THINK, "--bootstrap", "0", "--least-joint", "1").stdout.split())
    assert "recorded with the tokenizer some/tokenizer" in shown
    assert "no intervals" in shown


def test_the_paper_s_markers_have_to_be_there(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.steer.json"
    result = run(path, "-o", out)
    assert result.exit_code == 2
    assert "marker 'Alternatively' does not occur" in result.stderr
    assert "Leave it out" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "token", ["<think>", "=1", "<think>=", "<think>=x", "<think>=0", "<think>=nan", "<think>=inf"]
)
def test_a_token_needs_marker_and_coefficient(path: Path, token: str) -> None:
    result = run(path, "--token", token)
    assert result.exit_code == 2
    assert "MARKER=COEFFICIENT" in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--beta", "nan"), "beta"),
        (("--beta", "-1"), "beta"),
        (("--token", "a=1", "--token", "a=2"), "given twice"),
        (("--top", "0"), "--top"),
    ],
)
def test_wrong_usage(path: Path, options: tuple[str, ...], text: str) -> None:
    result = run(path, *options)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_marker_may_hold_an_equals_sign(path: Path) -> None:
    result = run(path, "--token", "x=y=1")
    assert "marker 'x=y' does not occur" in result.stderr


def test_errors_leave_nothing_behind(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.trace.safetensors"
    broken.write_bytes(path.read_bytes()[:1000])
    out = tmp_path / "a.steer.json"
    result = run(broken, *THINK, "-o", out, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "TraceError"
    same = run(path, *THINK, *QUICK, "-o", out, "--picture", out)
    assert same.exit_code == 1
    assert "different names" in same.stderr
    assert not out.exists()
