"""`moe-runtime bake`: what it prints and writes, its check, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime.placement import bake_check
from moe_runtime.placement.bake_record import RECORD_FILE
from moe_runtime.placement.bake_source import open_source
from typer.testing import CliRunner

import moe_runtime
from baking import plan_of, random_orders
from moe_runtime.cli import app
from tiny import EXPERTS, LAYERS, TinyCheckpoints, tiny_model


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def plan(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> Path:
    spec = open_source(tiny_checkpoints.fused).spec
    found = plan_of(spec, random_orders(spec, 1), devices=4)
    return found.save(tmp_path / "x.plan.json")


def test_it_bakes_checks_and_says_so(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, plan: Path
) -> None:
    result = run("bake", tiny_checkpoints.fused, "--plan", plan, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert f"of {LAYERS * EXPERTS} experts in 4 layers stand at other places" in result.stdout
    assert "float32: logits differ by" in result.stdout
    assert "eager against grouped_mm" in result.stdout
    assert f"wrote {tmp_path / 'out'}" in result.stdout
    assert (tmp_path / "out" / RECORD_FILE).is_file()


def test_json_is_all_that_it_prints(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, plan: Path
) -> None:
    bake = ("bake", tiny_checkpoints.per_expert_sharded, "-p", plan, "--json")
    facts = json.loads(run(*bake, "-o", tmp_path / "out").stdout)
    assert facts["shards"] == len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert (facts["devices"], facts["layers"], facts["bakes"]) == (4, LAYERS, 1)
    assert facts["tensors_rewritten"] == LAYERS
    (check,) = facts["check"]  # the checkpoint's own dtype is float32
    assert check["difference"] < 1e-5
    assert check["same_choice"] == 1.0
    assert facts["check_skipped"] == ""
    again = json.loads(run(*bake, "--no-check", "-o", tmp_path / "other").stdout)
    assert (again["check"], again["check_skipped"]) == ([], "not asked for")


def test_a_checkpoint_in_bfloat16_is_compared_in_float32_too(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    spec = open_source(tmp_path / "source").spec
    plan_of(spec, random_orders(spec, 2)).save(tmp_path / "x.plan.json")
    bake = ("bake", tmp_path / "source", "-p", tmp_path / "x.plan.json", "-o", tmp_path / "out")
    result = run(*bake, "--json")
    rows = {row["dtype"]: row for row in json.loads(result.stdout)["check"]}
    assert list(rows) == ["float32", "bfloat16"]
    assert rows["float32"]["difference"] < 1e-5 < rows["bfloat16"]["difference"]
    assert rows["bfloat16"]["yardstick_difference"] > 1e-5


def test_a_model_too_large_for_memory_is_checked_in_a_budget(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bake_check, "free_memory", lambda device: 0)
    bake = ("bake", tiny_checkpoints.per_expert, "-p", plan, "--json")
    facts = json.loads(run(*bake, "--expert-budget", "40%", "-o", tmp_path / "one").stdout)
    assert facts["check"][0]["difference"] < 1e-5
    assert facts["check"][0]["yardstick"].startswith("the runtime's own")
    facts = json.loads(run(*bake, "--expert-budget", "1", "-o", tmp_path / "two").stdout)
    assert facts["check"] == []
    assert "does not fit in memory" in facts["check_skipped"]


def test_a_model_that_does_not_run_on_tokens_is_baked_unchecked(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_images(model: Any) -> torch.Tensor:
        raise ValueError("no images")

    monkeypatch.setattr(bake_check, "logits", needs_images)
    result = run("bake", tiny_checkpoints.fused, "-p", plan, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "not checked: Qwen3MoeForCausalLM does not run on tokens alone" in result.stdout
    assert (tmp_path / "out" / RECORD_FILE).is_file()


def test_what_computes_something_else_is_not_kept(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bake_check.logits
    calls = []

    def wrong_at_last(model: Any) -> torch.Tensor:
        calls.append(model)
        return real(model) if len(calls) < 3 else real(model).flip(0)

    monkeypatch.setattr(bake_check, "logits", wrong_at_last)
    result = run("bake", tiny_checkpoints.fused, "-p", plan, "-o", tmp_path / "new" / "out")
    assert result.exit_code == 1
    assert "computes something else" in result.stderr
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda data: data["model"].update(fingerprint="f" * 16), "fingerprint ffff"),
        (lambda data: data["layers"][2]["devices"].__setitem__(0, [0, 1]), "layer 2 has replicas"),
        (lambda data: data["layers"].pop(), "lacks layer 3"),
        (lambda data: data.update(version=9), "version"),
    ],
)
def test_an_unusable_plan_exits_with_2(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, plan: Path, damage: Any, hint: str
) -> None:
    data = json.loads(plan.read_text())
    damage(data)
    plan.write_text(json.dumps(data))
    out = tmp_path / "out"
    result = run("bake", tiny_checkpoints.fused, "-p", plan, "-o", out, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)
    assert error["error"] == "PlanError"
    assert str(plan) in error["message"]
    assert hint in error["message"]
    assert not out.exists()


def test_the_bundled_model(tmp_path: Path, prompt: torch.Tensor) -> None:
    spec = open_source(moe_runtime.bundled_model()).spec
    plan_of(spec, random_orders(spec, 4), devices=8).save(tmp_path / "x.plan.json")
    result = run(
        *("bake", moe_runtime.bundled_model(), "-p", tmp_path / "x.plan.json", "--no-check"),
        *("-o", tmp_path / "baked"),
    )
    assert result.exit_code == 0, result.stderr
    logits = []
    for folder in (moe_runtime.bundled_model(), tmp_path / "baked"):
        model = moe_runtime.from_pretrained(
            folder, expert_budget="50%", device="cpu", dtype=torch.float32
        )
        with torch.no_grad():
            logits.append(model(prompt).logits)
    assert float((logits[1] - logits[0]).abs().max() / logits[0].abs().max()) < 1e-5
