"""`moe-runtime generate --expert-parallel`: rank 0 prints, every rank says what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moe_runtime
from moe_runtime.cli import app
from moe_runtime.parallel.run import FORMAT
from moe_runtime.parallel.shards import open_source
from moe_runtime.parallel.shares import contiguous_plan
from moe_runtime.report import ParallelReport
from parallel_ranks import two_ranks
from rank_program import command

PROMPTS = "The river was wide and\nOnce upon a time there was\nIn the morning\n"


def run_on_two(place: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each rank."""
    (place / "prompts.txt").write_text(PROMPTS)
    base = ["generate", moe_runtime.bundled_model(), "--prompts", str(place / "prompts.txt")]
    whole = [*base, "--max-new-tokens", "5", "--timeout", "60", *arguments]
    (place / "arguments.json").write_text(json.dumps(whole))
    with two_ranks(command, str(place), 60.0, place) as ranks:
        ended = [rank.ended() for rank in ranks]
        return [
            (code, rank.output("out"), errors)
            for rank, (code, errors) in zip(ranks, ended, strict=True)
        ]


@pytest.mark.slow
def test_both_modes_give_one_process_texts_and_only_rank_0_prints(tmp_path: Path) -> None:
    plan = contiguous_plan(open_source(moe_runtime.bundled_model()).spec.grid, 2)
    plan.save(tmp_path / "x.plan.json")
    alone = CliRunner().invoke(
        app,
        [
            "generate",
            moe_runtime.bundled_model(),
            *["--prompts", "-", "-n", "5", "--json", "--schedule", "order"],
        ],
        input=PROMPTS,
    )
    want = [one["tokens"] for one in json.loads(alone.stdout)["generated"]]
    for mode in ("coherent", "vanilla"):
        run = tmp_path / f"{mode}.parallel-run.json"
        results = run_on_two(
            tmp_path,
            *("--expert-parallel", mode, "--plan", str(tmp_path / "x.plan.json")),
            *("--json", "--run-file", str(run), "--report", str(run.with_suffix(".html"))),
            *("--link", "1Gbit,0.1ms"),
        )
        assert [code for code, _, _ in results] == [0, 0], results
        assert results[1][1] == ""
        data: dict[str, Any] = json.loads(results[0][1])
        assert [one["tokens"] for one in data["generated"]] == want
        assert data["run"]["mode"] == mode
        saved = json.loads(run.read_text())
        assert saved["format"] == FORMAT
        assert saved["traffic"] == data["run"]["traffic"]
        page = run.with_suffix(".html")
        assert data["report"] == str(page)
        assert page.read_text() == ParallelReport.load(run).to_html()
        foretold = data["run"]["predicted"]["prefill"]
        sent = sum(
            one["bytes"] + one["frame_bytes"]
            for one in data["run"]["traffic"]
            if one["kind"].startswith("prefill.")
        )
        assert foretold["cross_bytes"] == sent
        # One latency a call, and the bytes at 1 Gbit/s: between the busiest rank's and all ranks'.
        transfer = foretold["seconds"] - 1e-4 * foretold["calls"]
        assert sent / 2 / 1.25e8 - 1e-9 <= transfer <= sent / 1.25e8 + 1e-9
        assert "foretold" not in results[0][2]  # that is for people


@pytest.mark.slow
def test_a_plan_for_other_ranks_is_refused_on_both_with_what_to_do(tmp_path: Path) -> None:
    plan = contiguous_plan(open_source(moe_runtime.bundled_model()).spec.grid, 4)
    plan.save(tmp_path / "x.plan.json")
    results = run_on_two(
        tmp_path,
        *("--expert-parallel", "coherent", "--plan", str(tmp_path / "x.plan.json"), "--json"),
    )
    for code, _, errors in results:
        assert code == 2
        assert "4 devices, but 2 ranks run; start 4 ranks" in errors
    assert json.loads(results[0][1])["error"] == "PlanError"
    assert results[1][1] == ""


def test_without_torchrun_the_command_to_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "RANK" not in os.environ
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    result = CliRunner().invoke(
        app,
        [
            *("generate", moe_runtime.bundled_model(), "--prompts", str(tmp_path / "prompts.txt")),
            *("--expert-parallel", "coherent"),
        ],
    )
    assert result.exit_code == 1
    assert "torchrun --nproc-per-node 2 -m moe_runtime generate" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "a", "--expert-parallel", "coherent"),
        ("--prompts", "-", "--expert-parallel", "coherent"),
        ("--prompts", "x", "--expert-parallel", "coherent", "--expert-budget", "25%"),
        ("--prompts", "x", "--timeout", "5"),
        ("--prompts", "x", "--link", "1Gbit"),
        ("--prompt", "x", "--report", "page.json"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["generate", "somewhere", *arguments])
    assert result.exit_code == 2
