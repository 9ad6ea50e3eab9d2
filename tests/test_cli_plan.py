"""`moe-runtime plan`: plans made, shown and compared; what is refused, and that nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_runtime.placement.plan import Plan
from typer.testing import CliRunner

import moe_runtime
import moe_runtime.cli.plan_make as plan_make
from moe_runtime.cli import app
from moe_runtime.routing_counts import RoutingCounts
from routing_traces import DEVICES, LAYERS, planted_homes, planted_trace
from tiny import ALL_EXPERT_BYTES, EXPERT_BYTES, TinyCheckpoints

QUICK = ("--time-limit", "1.5", "--starts", "2", "--smoothing", "none")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_trace().save(tmp_path_factory.mktemp("plan") / "a.trace.safetensors")


@pytest.fixture(scope="module")
def counts(trace: Path) -> Path:
    return RoutingCounts.from_trace(planted_trace()).save(trace.with_name("a.counts.safetensors"))


@pytest.fixture(scope="module")
def made(trace: Path) -> Path:
    path = trace.with_name("made.plan.json")
    result = run("plan", trace, "--devices", DEVICES, *QUICK, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


def refused(out: Path, *arguments: object) -> str:
    """The message of a command that ends with exit code 2 and writes nothing."""
    result = run("plan", *arguments, *QUICK, "-o", out)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert not list(out.parent.iterdir())
    return str(result.stderr)


def test_the_planted_homes_are_found(made: Path) -> None:
    homes = planted_homes()
    plan = Plan.load(made)
    for row, layer in zip(homes, plan.layers, strict=True):
        together = {frozenset(np.flatnonzero(row == home).tolist()) for home in range(DEVICES)}
        found = np.array([hosts[0] for hosts in layer.hosts])
        assert together == {
            frozenset(np.flatnonzero(found == device).tolist()) for device in range(DEVICES)
        }


def test_json_of_make(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.plan.json"
    result = run("plan", "make", trace, "--devices", 4, "--nodes", 2, *QUICK, "-o", out, "--json")
    data = json.loads(result.stdout)
    assert data["plan"] == str(out)
    assert {"train", "held_out", "baselines", "support"} <= set(data["metrics"])
    assert "blocks" not in data["metrics"]
    assert data["settings"]["stages"] == 2
    assert data["settings"]["traces"] == ["a.trace.safetensors"]
    assert data["certificate"]["bound"] <= data["certificate"]["value"] + 1e-9
    blocks = Plan.load(out).metrics["blocks"]
    np.testing.assert_allclose(np.sum(blocks["load"], axis=1), 1.0, atol=1e-3)
    # What the flows say of crossings is what was measured on the same tokens.
    crossing = np.mean([1 - np.trace(flow) for flow in np.asarray(blocks["flows"])])
    assert crossing == pytest.approx(data["metrics"]["held_out"]["crossing"], abs=1e-3)


def test_text_of_make_names_rivals_and_next_steps(trace: Path, tmp_path: Path) -> None:
    result = run("plan", trace, "--devices", 2, *QUICK, "-o", tmp_path / "x.plan.json")
    for words in ("contiguous", "eplb", "certificate:", "support:", "next: moe-runtime export"):
        assert words in result.stdout


def test_a_seed_gives_the_same_plan(trace: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.plan.json"
    run("plan", trace, "--devices", DEVICES, *QUICK, "-o", again)
    first, second = json.loads(made.read_text()), json.loads(again.read_text())
    del first["certificate"]["seconds"], second["certificate"]["seconds"]
    assert json.dumps(first) == json.dumps(second)


def test_the_shuffled_control_gains_nothing(trace: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.plan.json"
    assert run("plan", trace, "--devices", 4, "--shuffled", *QUICK, "-o", out).exit_code == 0
    control, plan = Plan.load(out).metrics, Plan.load(made).metrics
    rival = plan["baselines"]["contiguous"]["held_out"]["crossing"]
    gain = rival - plan["held_out"]["crossing"]
    assert abs(rival - control["held_out"]["crossing"]) < 0.3 * gain


def test_several_traces_keep_their_sequences_apart(trace: Path, tmp_path: Path) -> None:
    other = planted_trace(seed=5).save(tmp_path / "b.trace.safetensors")
    together = plan_make.read_recordings([trace, other])
    assert together.tokens == 1200
    assert len(np.unique(together.sequence_ids)) == 20  # type: ignore[union-attr]


def test_counts_plan_the_load_only(counts: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.plan.json"
    assert run("plan", counts, "-G", 4, "--objective", "load", *QUICK, "-o", out).exit_code == 0
    assert Plan.load(out).metrics["train"]["load"] < 1.2
    out.unlink()
    message = refused(out, counts, "-G", 4)
    assert "counts without tokens" in message
    assert "--objective load" in message


def test_memory_of_one_device_makes_a_residency_plan(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    trace = planted_trace(top_k=4, devices=4, first_layer=0, model_id="", fingerprint="")
    path = trace.save(tmp_path / "t.trace.safetensors")
    out, model = tmp_path / "r.plan.json", tiny_checkpoints.per_expert
    memory = ALL_EXPERT_BYTES // 2
    arguments = ("-G", 1, "--memory", memory, "--model", model, *QUICK, "-o", out)
    result = run("plan", path, *arguments)
    assert result.exit_code == 0, result.stderr
    pinned = len(Plan.load(out).residents())
    assert 0 < pinned * EXPERT_BYTES < memory
    loaded = moe_runtime.from_pretrained(model, plan=out, expert_budget=memory, device="cpu")
    assert moe_runtime.report(loaded).to_dict()["plan"]["pinned"] == pinned


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"tokens": 0}, (), ("bad.trace.safetensors", "no tokens")),
        ({"layers": 1}, (), ("one MoE layer (layer 1)", "--objective load")),
        ({}, ("--load-cap", "1.0001"), ("load cap of 1.0001", "layer")),
        ({"experts": 18, "devices": 3}, (), ("layer 1", "18 experts", "4 devices")),
        ({}, ("--memory", "1KiB", "--expert-bytes", "1KiB"), ("too little", "15.00 KiB")),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, change: dict[str, Any], options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    bad = planted_trace(**change).save(tmp_path / "bad.trace.safetensors")
    (tmp_path / "out").mkdir()
    message = refused(tmp_path / "out" / "x.plan.json", bad, "-G", 4, *options)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "change",
    [{"top_k": 3}, {"model_id": "other"}, {"fingerprint": "beef"}, {"first_layer": 0}],
)
def test_recordings_of_different_models_are_refused(
    trace: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    other = planted_trace(**change).save(tmp_path / "other.trace.safetensors")
    (tmp_path / "out").mkdir()
    message = refused(tmp_path / "out" / "x.plan.json", trace, other, "-G", 4)
    assert str(other) in message


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.trace.safetensors"
    bad.write_bytes(b"\x80\x04pickle")
    (tmp_path / "out").mkdir()
    assert str(bad) in refused(tmp_path / "out" / "x.plan.json", bad, "-G", 4)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-G", 4, "--topology", "t.yaml"),
        ("-G", 4, "--counts", "odd"),
        ("-G", 4, "--memory", "x"),
    ],
)
def test_wrong_usage(trace: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    assert run("plan", trace, *options, "-o", tmp_path / "x.plan.json").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_an_interrupted_plan_leaves_nothing(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_make, "make_plan", stop)
    result = run("plan", trace, "-G", 4, "-o", tmp_path / "x.plan.json")
    assert result.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_show(made: Path) -> None:
    text = run("plan", "show", made).stdout
    assert "planted (f00d)" in text
    data = json.loads(run("plan", "show", made, "--json").stdout)
    assert [row["layer"] for row in data["layers"]] == [1, 2, 3, 4]
    assert len(data["layers"]) == LAYERS


def test_compare(made: Path, trace: Path) -> None:
    data = json.loads(run("plan", "compare", made, "--trace", trace, "--json").stdout)
    plan, contiguous = data["plans"]
    assert contiguous["plan"] == "contiguous"
    assert plan["crossing"] < contiguous["crossing"]
    assert "contiguous" in run("plan", "compare", made, "--trace", trace).stdout


@pytest.mark.parametrize("change", [{"fingerprint": "beef"}, {"first_layer": 0}, {"experts": 20}])
def test_compare_refuses_another_model(made: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    other = planted_trace(**change).save(tmp_path / "o.trace.safetensors")
    result = run("plan", "compare", made, "--trace", other)
    assert result.exit_code == 2
    assert str(made) in result.stderr


@pytest.mark.parametrize("text", ["{", '{"format": "other"}', '{"format": "moe-runtime.plan"}'])
@pytest.mark.parametrize("command", ["show", "compare"])
def test_a_damaged_plan_is_refused(trace: Path, tmp_path: Path, text: str, command: str) -> None:
    bad = tmp_path / "bad.plan.json"
    bad.write_text(text)
    more = ("--trace", trace) if command == "compare" else ()
    result = run("plan", command, bad, *more)
    assert result.exit_code == 2
    assert str(bad) in result.stderr
