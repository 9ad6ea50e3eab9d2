"""The GPU measurements go through without a GPU: tiny shapes, Triton's interpreter, a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

from gpu_end_to_end import Plan, end_to_end  # noqa: E402
from gpu_figures import end_to_end_table  # noqa: E402
from gpu_routing import drawn_trace, folded, mapped  # noqa: E402
from gpu_rows import REFERENCE, rows_to_run  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / "gpu.py", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a dry run prints, and its file."""
    output = tmp_path_factory.mktemp("bench") / "gpu.json"
    outcome = run("--dry-run", "-o", str(output))
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return outcome.stdout, json.loads(output.read_text())


@pytest.mark.slow
def test_the_dry_run_goes_through_the_kernels(dry: tuple[str, dict[str, Any]]) -> None:
    printed, result = dry
    assert "the figures below mean nothing" in printed
    assert result["dry_run"]
    assert "failed" not in result["kernels"]
    for stage, tokens in (("decode", [1, 2]), ("prefill", [33])):
        rows = result["kernels"][stage]
        assert [row["tokens"] for row in rows] == tokens
        for row in rows:
            assert set(row["calls"]) == {"triton", "grouped_mm", "batched_mm"}
    assert "target 0.80" in printed


@pytest.mark.slow
def test_the_dry_run_has_every_row_and_every_row_the_same_tokens(
    dry: tuple[str, dict[str, Any]],
) -> None:
    printed, result = dry
    rows = result["end_to_end"]["rows"]
    assert list(rows) == [row.name for row in rows_to_run(full=True)]
    for row in rows_to_run(full=True):
        (found,) = rows[row.name]["rounds"]
        assert row.name in printed
        if "skipped" in found:
            assert "host_execution" in found["skipped"]
            continue
        assert "failed" not in found, found["where"]
        same = found["agreement"]
        assert same["tokens"] == same["same_argmax"] == 2
        assert same["largest_relative_error"] < 0.02
        if row.side == "runtime" and row.options.get("host_execution", "never") == "never":
            assert same["same_bits"] == 2  # what is resident must not show in the results
            assert result["end_to_end"]["figures"][row.name]["over_own_floor"] > 0


@pytest.mark.slow
def test_the_budgets_of_the_dry_run_miss_and_the_whole_does_not(
    dry: tuple[str, dict[str, Any]],
) -> None:
    rows = dry[1]["end_to_end"]["rows"]
    moved = {
        name: rows[name]["rounds"][0]["moved_bytes_per_token"]
        for name in (REFERENCE, "50 %, LRU", "12.5 %, LRU")
    }
    assert moved[REFERENCE] == 0
    assert 0 < moved["50 %, LRU"] < moved["12.5 %, LRU"]


def test_rows_that_come_too_late_are_named_and_saved() -> None:
    saved: list[int] = []
    plan = Plan.dry(minutes=0.0)
    result = end_to_end(plan, torch.device("cpu"), 1e9, lambda one: saved.append(len(one["rows"])))
    assert saved == list(range(1, len(rows_to_run(full=True)) + 1))
    assert all(
        "minutes were spent" in row["rounds"][0]["skipped"] for row in result["rows"].values()
    )


def test_a_row_that_fails_is_told_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a stand-in and without a GPU, rows of the runtime cannot be built.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = end_to_end(Plan.dry(only="100 %"), torch.device("cpu"), 1e9, lambda _: None)
    rows = {name: row["rounds"][0] for name, row in result["rows"].items()}
    assert "this PyTorch sees no GPU" in rows.pop(REFERENCE)["failed"]
    assert {"100 %, transformers grouped_mm", "100 %, transformers batched_mm"} == set(rows)
    for row in rows.values():
        assert row["agreement"]["same_argmax"] == row["tokens"] == 2
    assert "no GPU" in end_to_end_table(result)


@given(st.integers(1, 12).flatmap(
    lambda k: st.tuples(
        st.lists(st.permutations(range(40)).map(lambda p: p[:k]), min_size=1, max_size=4),
        st.integers(k, 40),
    )
))  # fmt: skip
def test_folded_choices_stay_apart(drawn: tuple[list[list[int]], int]) -> None:
    rows, experts = drawn
    found = folded(np.array(rows, np.int64), experts)
    assert found.max() < experts
    for before, after in zip(rows, found.tolist(), strict=True):
        assert len(set(after)) == len(after)
        if len({expert % experts for expert in before}) == len(before):
            assert after == [expert % experts for expert in before]


def test_further_layers_repeat_the_first_with_experts_renumbered() -> None:
    trace = drawn_trace(3, 16, 2, prompt=2, decode=20)
    wide = mapped(trace, 5, 8)
    assert wide.topk_ids.shape == (22, 5, 2)
    first, again = wide.topk_ids[:, 0], wide.topk_ids[:, 3]
    numbers = dict(zip(first.ravel().tolist(), again.ravel().tolist(), strict=True))
    assert np.array_equal(np.vectorize(numbers.get)(first), again)
    assert not np.array_equal(first, again)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do() -> None:
    outcome = run()
    assert outcome.returncode == 2
    assert "--dry-run" in outcome.stderr


@pytest.mark.gpu
def test_on_a_device_it_writes_its_figures(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    outcome = run("--only", "kernels", "--repeats", "5", "-o", str(output))
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    result = json.loads(output.read_text())
    assert not result["dry_run"]
    assert result["machine"]["gpu"]
