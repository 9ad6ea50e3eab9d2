"""`moe-runtime plan --objective time --mode`: chosen by predicted time, and shown everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_runtime.placement.cost import measure
from moe_runtime.placement.plan import Plan
from typer.testing import CliRunner

import moe_runtime
from moe_runtime.cli import app
from moe_runtime.routing_counts import RoutingCounts
from routing_traces import planted_trace

QUICK = ("--time-limit", "1.5", "--starts", "2", "--smoothing", "none")
LINK = ("--link", "1Gbit,0.2ms")
WIDTHS = ("--widths", "2048,128,6,2")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_trace().save(tmp_path_factory.mktemp("time") / "a.trace.safetensors")


@pytest.fixture(scope="module", params=["vanilla", "coherent"])
def made(request: pytest.FixtureRequest, trace: Path) -> tuple[str, Path, dict[str, Any]]:
    place = trace.with_name(f"{request.param}.plan.json")
    asked = ("--devices", 4, "--objective", "time", "--mode", request.param, "--batch", 16)
    result = run("plan", trace, *asked, *LINK, *WIDTHS, *QUICK, "-o", place, "--json")
    assert result.exit_code == 0, result.stderr
    return request.param, place, json.loads(result.stdout)


def test_a_mode_gets_the_plan_that_is_fastest_in_it(
    made: tuple[str, Path, dict[str, Any]],
) -> None:
    mode, place, shown = made
    plan = Plan.load(place)
    step = plan.metrics["step_time"]
    assert step == shown["metrics"]["step_time"]
    assert (step["mode"], step["rows"], step["measured_on"]) == (mode, 16, "held_out")
    assert plan.settings["objective"] == "time"
    assert plan.top_k == (2,) * 4
    # Experts of one home were planted: no mode is slower than with experts as they come.
    assert step["plan"][mode]["seconds"] < step["contiguous"][mode]["seconds"]
    assert step["tried"][0]["seconds"] <= min(one["seconds"] for one in step["tried"])
    metrics = measure(plan.matrices(), plan.topology, planted_trace())
    assert metrics.distinct_devices == pytest.approx(1.0)
    if mode == "coherent":
        assert metrics.crossing is not None
        assert metrics.crossing < 0.5
    text = run("plan", "show", place).stdout
    assert "step time     predicted for 16 rows on held-out tokens; use " in text
    assert "collectives" in text
    for name in ("plan", "contiguous"):
        prefill = step[name]["prefill"]
        assert prefill["vanilla"]["rows"] == prefill["coherent"]["rows"] <= 16 * 128
        # Coherent ranks hand keys and values round, whatever the plan.
        assert prefill["coherent"]["seconds"] > prefill["vanilla"]["seconds"] > 0
    tokens = round(step["plan"]["prefill"]["vanilla"]["rows"])
    assert f"prefill       {tokens:,} tokens of prompts: vanilla " in text


def test_compare_times_plans_and_contiguous_experts(
    trace: Path, made: tuple[str, Path, dict[str, Any]]
) -> None:
    mode, place, _ = made
    asked = ("plan", "compare", place, "--trace", trace, *LINK, *WIDTHS)
    rows = json.loads(run(*asked, "--json").stdout)["plans"]
    times = [row["step_time"][mode]["seconds"] for row in rows]
    assert times[0] < times[1]
    prefill = [row["step_time"]["prefill"][mode] for row in rows]
    assert prefill[0]["seconds"] < prefill[1]["seconds"]
    short = json.loads(run(*asked, "--prompt-tokens", 2, "--json").stdout)["plans"]
    assert [row["step_time"]["prefill"][mode]["rows"] for row in short] == [64, 64]
    shown = run(*asked).stdout
    assert "vanilla ms" in shown
    assert f"{1e3 * times[0]:.3f}" in shown
    assert "step_time" not in run("plan", "compare", place, "--trace", trace, "--json").stdout


def test_widths_are_read_from_a_model(tmp_path: Path) -> None:
    """The bundled model: hidden 128, six layers; its own heads and dtype."""
    from transformers import AutoConfig

    model = moe_runtime.bundled_model()
    config = AutoConfig.from_pretrained(model)
    trace = planted_trace(layers=6, first_layer=0, experts=32, model_id="", fingerprint="")
    path = trace.save(tmp_path / "b.trace.safetensors")
    out = tmp_path / "x.plan.json"
    asked = ("--devices", 2, "--objective", "load", *LINK, "--model", model, "--seed", 3)
    result = run("plan", path, *asked, *QUICK, "-o", out)
    assert result.exit_code == 0, result.stderr
    sizes = Plan.load(out).metrics["step_time"]["sizes"]
    width = np.dtype(str(config.dtype).removeprefix("torch.").replace("bfloat16", "float16"))
    heads = config.num_key_value_heads * config.head_dim
    # Beside the numbers a byte each for the layer and the sequence.
    assert sizes["keys_values"] == 2 * heads * width.itemsize + 2
    assert sizes["combine"] == 128 * width.itemsize
    assert sizes["layers"] == 6


def test_counts_are_enough_for_a_mode(trace: Path, tmp_path: Path) -> None:
    counts = RoutingCounts.from_trace(planted_trace()).save(tmp_path / "a.counts.safetensors")
    out = tmp_path / "x.plan.json"
    asked = ("--devices", 4, "--objective", "time", "--mode", "vanilla", *LINK, *WIDTHS)
    result = run("plan", counts, *asked, *QUICK, "-o", out)
    assert result.exit_code == 0, result.stderr
    step = Plan.load(out).metrics["step_time"]
    assert step["measured_on"] == "train"
    assert step["plan"]["vanilla"]["bytes_by_kind"]["dispatch"] > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--mode", "coherent", *LINK, *WIDTHS), "needs --objective time"),
        (("--objective", "time", "--mode", "fast", *LINK, *WIDTHS), "none of vanilla, coherent"),
        (("--objective", "time", "--mode", "vanilla", *LINK), "--widths"),
        (("--objective", "time", "--mode", "vanilla", *WIDTHS), "hops"),
        (("--objective", "time", "--mode", "vanilla", *LINK, "--widths", "2048"), "four whole"),
        (("--objective", "time", "--mode", "vanilla", *LINK, "--widths", "64,8,3,2"), "layer 4"),
        (("--objective", "time", "--mode", "vanilla", "--link", "quick", *WIDTHS), "quick"),
        (
            ("--objective", "time", "--mode", "vanilla", "--node-link", "1Gbit", *WIDTHS),
            "--node-link needs --link",
        ),
        (("--objective", "time", "--mode", "vanilla", "--groups", 4, *LINK, *WIDTHS), "--groups"),
        (("--link", "1Gbit", *WIDTHS, "--batch", 5000), "5000"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    trace: Path, tmp_path: Path, arguments: tuple[object, ...], text: str
) -> None:
    result = run("plan", trace, "--devices", 4, *arguments, *QUICK, "-o", tmp_path / "x.plan.json")
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
