"""The GPU measurements go through without a GPU: tiny shapes, Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

BENCH = Path(__file__).parent.parent / "bench"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / "gpu.py", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_dry_run_goes_through_every_stage_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    outcome = run("--dry-run", "-o", str(output))
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert not output.exists()
    assert "the figures below mean nothing" in outcome.stdout
    rows = [line.split() for line in outcome.stdout.splitlines()]
    timed = {
        (row[0], row[1], row[3]) for row in rows if len(row) > 3 and row[2] in {"graph", "calls"}
    }
    for side in ("triton", "grouped_mm", "batched_mm"):
        assert {("decode", "1", side), ("decode", "2", side), ("prefill", "33", side)} <= timed
    assert "target 0.80" in outcome.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do() -> None:
    outcome = run()
    assert outcome.returncode == 2
    assert "--dry-run" in outcome.stderr


@pytest.mark.gpu
def test_on_a_device_it_writes_its_figures(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    outcome = run("--repeats", "5", "-o", str(output))
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    result = json.loads(output.read_text())
    assert not result["interpreter"]
    assert result["machine"]["gpu"]
