"""`moe-runtime simulate`: its figures, what it refuses, and who may know what before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moe_runtime.predictors.files import save_predictor
from moe_runtime.predictors.frequency import PopularityPredictor
from typer.testing import CliRunner, Result

from moe_runtime.cache_baselines import BASELINES
from moe_runtime.cli import app
from routing_traces import planted_trace

QUICK = ("lru", "belady", "lru-per-layer", "popularity", "pre-gated", "oracle", "static")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("traces")
    return [
        planted_trace(tokens=60, seed=seed).save(folder / f"{seed}.trace.safetensors")
        for seed in (1, 2, 3)
    ]


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


def chosen(*names: str) -> list[str]:
    return [word for name in names for word in ("--policy", name)]


def test_its_figures(traces: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "sim.json"
    result = run(
        *traces[:2], "--expert-bytes", "1MB", "--link-gbps", 2, "--json", "-o", out, *chosen(*QUICK)
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert (found["format"], found["version"]) == ("moe-runtime.simulation", 1)
    assert found["setting"]["link"]["bytes_per_second"] == 2e9
    assert found["setting"]["slots"] == [16]  # a quarter of 64
    assert found["tokens"] == 40  # a third of the rows decode
    rows = {row["title"]: row for row in found["contenders"]}
    assert list(rows) == [name.replace("pre-gated", "pre-gated (recall 0.9)") for name in QUICK]
    for row in rows.values():
        assert row["uses"] == sum(row[n] for n in ("resident", "in_time", "late", "missed"))
        assert row["tokens_per_second"] == pytest.approx(40 / row["seconds"], rel=1e-3)
        assert row["bytes_over_belady"] >= 1
        assert row["stall_seconds"] < row["seconds"]
    assert rows["lru"]["speed_over_lru"] == rows["belady"]["bytes_over_belady"] == 1
    assert rows["belady"]["missed"] < rows["lru"]["missed"]
    assert rows["lru"]["bytes"]["read"] == 10**6 * rows["lru"]["missed"]


def test_its_table(traces: list[Path]) -> None:
    result = run(traces[0], "--expert-bytes", "1MB", *chosen("lru", "oracle"))
    assert result.exit_code == 0
    assert "20 tokens, 16 of 64 experts fit" in result.stdout
    assert "tokens/s" in result.stdout
    assert any(line.startswith("oracle") for line in result.stdout.splitlines())


def test_a_predictor_file_serves_what_it_was_not_fitted_to(
    traces: list[Path], tmp_path: Path
) -> None:
    fitted = PopularityPredictor.fit([planted_trace(tokens=60, seed=1)])
    file = save_predictor(fitted, tmp_path / "p.predictor.safetensors")
    words = ("--expert-bytes", "1MB", "--json", "--predictor", file, *chosen("lru"))
    found = json.loads(run(traces[1], *words).stdout)
    assert [row["title"] for row in found["contenders"]] == ["lru", file.name]
    refused = run(traces[0], *words)
    assert refused.exit_code == 2
    assert "flatter" in json.loads(refused.stdout)["message"]


def test_traces_to_fit_to(traces: list[Path]) -> None:
    words = ("--expert-bytes", "1MB", "--json", *chosen("static", "popularity"))
    assert run(traces[0], "--fit", traces[1], "--fit", traces[2], *words).exit_code == 0
    refused = run(traces[0], "--fit", traces[0], *words)
    assert refused.exit_code == 2
    assert "give a trace of other text" in json.loads(refused.stdout)["message"]


def test_what_cannot_run_is_left_out_of_all_and_refused_by_name(
    traces: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: BASELINES[name] for name in ("lru", "belady", "static")}
    for name in set(BASELINES) - set(kept):
        monkeypatch.delitem(BASELINES, name)
    words = (traces[0], "--expert-bytes", "1MB", "--json", "--phase", "all")
    found = json.loads(run(*words).stdout)
    assert [row["title"] for row in found["contenders"]] == ["lru", "belady"]
    assert found["left_out"][0]["title"] == "static"
    assert found["tokens"] == 60
    refused = run(*words, *chosen("static"))
    assert refused.exit_code == 1
    assert "other recordings" in json.loads(refused.stdout)["message"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "--expert-bytes"),
        (("--expert-bytes", "1MB", "--model", "x"), 2, "--expert-bytes"),
        (("--expert-bytes", "1MB", "--phase", "some"), 2, "decode or all"),
        (("--expert-bytes", "1MB", "--budget", "auto"), 2, "share"),
        (("--expert-bytes", "1MB", "--budget", "0%"), 1, "larger budget"),
        (("--expert-bytes", "0"), 1, "a byte at least"),
        (("--expert-bytes", "1MB", "--policy", "mru"), 1, "unknown baseline 'mru'"),
    ],
)
def test_what_it_refuses(traces: list[Path], words: tuple[str, ...], code: int, says: str) -> None:
    result = run(traces[0], *words)
    assert result.exit_code == code
    assert says in " ".join(result.output.replace("│", " ").split())
