"""`moe-runtime hardware`: measured once, kept, shown; and what inspect makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moe_runtime
from moe_runtime.cli import app
from moe_runtime.errors import ConfigError
from moe_runtime.hardware import (
    ExpertShape,
    HardwareProfile,
    cached_path,
    load_profile,
    profile_from_dict,
    save_profile,
)
from profiles import gpu_profile, host_profile


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExpertShape]]:
    """The experts that were measured, one entry for each time; measuring takes no time here."""
    asked: list[ExpertShape] = []

    def measure(*, path: Path, expert: ExpertShape, progress: Any) -> HardwareProfile:
        progress("disk", 0.5)
        asked.append(expert)
        return replace(host_profile(), expert=expert)

    monkeypatch.setattr("moe_runtime.hardware.measure_hardware", measure)
    monkeypatch.setattr("moe_runtime.hardware.devices.find_devices", lambda: ([], []))
    return asked


def test_it_is_measured_once(tmp_path: Path, measured: list[ExpertShape]) -> None:
    first = json.loads(run("hardware", "--cache-dir", tmp_path, "--json").stdout)
    second = json.loads(run("hardware", "--cache-dir", tmp_path, "--json").stdout)
    assert (first.pop("fresh"), second.pop("fresh")) == (True, False)
    assert first == second
    assert first.pop("file") == str(cached_path(tmp_path))
    assert profile_from_dict(first) == load_profile(cached_path(tmp_path))
    assert len(measured) == 1
    assert not run("hardware", "--cache-dir", tmp_path, "--refresh").stderr
    assert len(measured) == 2


def test_another_question_is_another_measurement(
    tmp_path: Path, measured: list[ExpertShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("hardware", "--cache-dir", tmp_path)
    assert "another expert" in run("hardware", "--cache-dir", tmp_path, "--dtype", "float32").stderr
    # What is not asked for may be as it was kept.
    run("hardware", "--cache-dir", tmp_path, "--expert-shape", "2048,768")
    run("hardware", "--cache-dir", tmp_path, "--path", tmp_path)
    assert [expert.dtype for expert in measured] == ["bfloat16", "float32"]
    monkeypatch.setattr("moe_runtime.hardware.disk.mount_of", lambda path: ("/other", "xfs"))
    assert "another disk" in run("hardware", "--cache-dir", tmp_path, "--path", tmp_path).stderr
    monkeypatch.setattr(
        "moe_runtime.hardware.devices.find_devices", lambda: (list(gpu_profile().devices), [])
    )
    assert "other GPUs" in run("hardware", "--cache-dir", tmp_path).stderr


def test_a_damaged_file_is_measured_anew(tmp_path: Path, measured: list[ExpertShape]) -> None:
    cached_path(tmp_path).write_text("{")
    result = run("hardware", "--cache-dir", tmp_path)
    assert result.exit_code == 0
    assert "not a JSON file" in result.stderr
    assert load_profile(cached_path(tmp_path)).measured in result.stdout or measured


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(
    tmp_path: Path, measured: list[ExpertShape]
) -> None:
    (tmp_path / "file").write_text("")
    result = run("hardware", "--cache-dir", tmp_path / "file" / "inside", "--json")
    assert result.exit_code == 0
    assert "not kept" in result.stderr
    assert json.loads(result.stdout)["file"] is None
    assert len(measured) == 1


def test_the_table_says_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = gpu_profile()
    save_profile(profile, cached_path(tmp_path))
    monkeypatch.setattr(
        "moe_runtime.hardware.devices.find_devices", lambda: (list(profile.devices), [])
    )
    monkeypatch.setenv("COLUMNS", "150")
    result = run("hardware", "--cache-dir", tmp_path)
    assert result.exit_code == 0
    for text in (
        "Processor [bold]",  # names are shown as they are
        "link 31.5 GB/s",
        "direct reads",
        "2.00 (1.05)",  # GB/s of two threads, milliseconds of a read of 1 MiB
        "pinned",
        "an expert of 2048 x 768, bfloat16, 9.00 MiB (host: 2 threads)",
        "GPUs: there is none",
        "at load 0.25",
    ):
        assert text in result.stdout, result.stdout


@pytest.mark.parametrize("shape", ["2048", "a,b", "0,5", "1,2,3", "-1,2"])
def test_a_shape_that_is_none(shape: str) -> None:
    result = run("hardware", "--expert-shape", shape)
    assert result.exit_code == 2
    assert "hidden,intermediate" in result.stderr


def test_a_dtype_or_path_that_is_none(tmp_path: Path) -> None:
    result = run("hardware", "--cache-dir", tmp_path, "--dtype", "int3")
    assert (result.exit_code, "int3" in result.stderr) == (1, True)
    result = run("hardware", "--cache-dir", tmp_path, "--path", tmp_path / "nowhere")
    assert (result.exit_code, "nowhere" in result.stderr) == (1, True)


def test_inspect_says_what_a_miss_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = save_profile(host_profile(), tmp_path / "p.json")
    model = moe_runtime.bundled_model()
    monkeypatch.setattr("moe_runtime.budget.free_memory", lambda device: 264 << 20)
    told = []
    for batch, length in ((1, 1024), (1, 2048), (2, 1024)):
        room = ("--max-batch", batch, "--max-length", length)
        data = json.loads(run("inspect", model, "--hardware", kept, "--json", *room).stdout)
        told.append(data["budgets"][-1])
    assert "for the other weights" in told[0]["explanation"]
    assert "from disk (measured 2026-11-24)" in told[0]["explanation"]
    assert "of 2048 tokens" in told[1]["explanation"]
    assert "of 2 times 1024 tokens" in told[2]["explanation"]
    assert told[0]["bytes"] > told[1]["bytes"] == told[2]["bytes"]
    result = run("inspect", model, "--hardware", tmp_path / "none.json")
    assert result.exit_code == 1
    assert "none.json" in result.stderr


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        moe_runtime.from_pretrained(
            moe_runtime.bundled_model(), device="cpu", hardware=str(tmp_path / "none.json")
        )
