"""The cost of steering: as a value and file, and measured on a model in an expert budget."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import moe_runtime
from moe_runtime.cli import app
from moe_runtime.errors import AttachError, ConfigError
from moe_runtime.steering.cost import SteeringCost
from moe_runtime.steering.cost_run import measure_cost
from moe_runtime.steering.files import write_steering
from moe_runtime.steering.values import Steering
from steering_files import made_cost
from tiny import tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))


from planted_steering import PLANTED, prompt_of, save_planted

RUBBISH = (None, "x", True, [], {}, -1, 1.5, float("nan"), float("inf"))
PROMPTS = [[5, 9, 17, 3], [40, 41], [99, 7, 7, 60, 12]]


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    return moe_runtime.attach(model, expert_budget="50%")


# -- the value ------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    found = made_cost()
    path = found.save(tmp_path / "a.steer-cost.json")
    assert SteeringCost.load(path) == found
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_medians_and_ratios_are_of_rounds() -> None:
    found = made_cost()
    arms = {arm.name: arm for arm in found.arms}
    slow = arms["steered"].rounds[0]
    bent = replace(arms["steered"], rounds=(replace(slow, decode_seconds=64.0), slow, slow))
    found = replace(found, arms=(arms["unsteered"], bent))
    ratio = found.ratios("steered", lambda one: one.tokens_per_second)
    assert ratio is not None
    plain = [one.tokens_per_second for one in arms["unsteered"].rounds]
    assert ratio[1] == pytest.approx((632 / 64.0) / plain[0])
    assert ratio[1] < ratio[0] <= ratio[2]
    assert found.arm("own") is None
    assert found.ratios("own", lambda one: one.hit_rate) is None


def test_nothing_decoded_has_no_speed() -> None:
    arm = made_cost().arms[0]
    still = replace(arm.rounds[0], decode_tokens=0, decode_seconds=0.0, new_tokens=0)
    arm = replace(arm, rounds=(still, *arm.rounds[1:]))
    assert still.tokens_per_second is None
    assert arm.tokens_per_second is None  # not the median of the others
    assert arm.bytes_per_token is None
    assert arm.hit_rate is not None


def places(data: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every field of plain data, by its keys; lists by their first entry."""
    found = [where] if where else []
    if isinstance(data, dict):
        found += [p for name, one in data.items() for p in places(one, (*where, name))]
    elif isinstance(data, list) and data:
        found += places(data[0], (*where, 0))
    return found


PLAIN = json.loads(json.dumps(made_cost().to_dict()))


@given(st.sampled_from(places(PLAIN)), st.sampled_from(RUBBISH), st.booleans())
@settings(max_examples=150)
def test_damage_is_refused_by_name_or_does_not_matter(
    place: tuple[Any, ...], rubbish: Any, gone: bool
) -> None:
    data = copy.deepcopy(PLAIN)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if gone and isinstance(inner, dict):
        del inner[place[-1]]
    else:
        inner[place[-1]] = rubbish
    try:
        found = SteeringCost.from_dict(data)
    except ConfigError as error:
        said = str(error)
    else:
        said = ""
        assert SteeringCost.from_dict(found.to_dict()) == found
    remedies = ("measure again", "(moe-runtime steer cost)", "this is no cost of steering")
    assert not said or said.endswith(remedies)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["arms"].reverse(), "has to begin with 'unsteered'"),
        (lambda d: d["arms"][0]["rounds"].pop(), "same number of rounds, found \\[2, 3\\]"),
        (lambda d: d["arms"][1]["rounds"][0].update(misses=-1), "arm 'steered' has a number below"),
        (lambda d: d["experts"][0].update(uses=1.5), "uses of expert 17 in layer 4 .* 1.5"),
        (lambda d: d["shift"]["layers"][2].update(changed=2.0), "changed of layer 2"),
        (lambda d: d.update(version=2), "'version' is 2, this release reads 1"),
        (lambda d: d.update(format="x"), "no cost of steering"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path
) -> None:
    data = copy.deepcopy(PLAIN)
    change(data)
    path = tmp_path / "a.steer-cost.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=words) as error:
        SteeringCost.load(path)
    assert str(path) in str(error.value)


# -- measured -------------------------------------------------------------------------------------


def steering_of(model: Any, beta: float, layer: int = 1) -> Steering:
    """The expert of a layer that the prompts use most, at this beta."""
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for prompt in PROMPTS:
            model(torch.tensor([prompt]))
    chosen = torch.from_numpy(recorder.trace.topk_ids[:, layer].astype("int64")).ravel()
    return Steering(betas={(layer, int(chosen.bincount().argmax())): beta})


def test_beta_1_costs_nothing_and_moves_nothing(model: Any) -> None:
    found = measure_cost(
        model, steering_of(model, 1.0), PROMPTS, max_new_tokens=8, rounds=2, pin=False
    )
    assert [arm.name for arm in found.arms] == ["unsteered", "steered", "own"]
    plain = found.arms[0].rounds[0]
    assert plain.new_tokens == 8 * len(PROMPTS)
    assert plain.decode_tokens == plain.new_tokens - len(PROMPTS)  # the first is the prefill's
    assert plain.misses > 0
    assert plain.hits > 0
    for arm in found.arms:
        for one in arm.rounds:
            # The same tokens in a cache warmed up by them: the very same hits.
            assert (one.hits, one.misses, one.bytes_read) == (
                plain.hits,
                plain.misses,
                plain.bytes_read,
            )
    assert all((one.changed, one.jaccard) == (0.0, 1.0) for one in found.shift.layers)
    assert found.experts[0].uses == found.experts[0].steered_uses > 0
    assert (found.budget, found.all_experts, found.prompts) == ("50%", 64, 3)
    assert 0 < found.slots < 64


def test_a_large_beta_shifts_later_layers_on_the_same_tokens(model: Any) -> None:
    steering = steering_of(model, 64.0)
    said: list[str] = []
    found = measure_cost(
        model,
        steering,
        PROMPTS,
        max_new_tokens=12,
        rounds=1,
        pin=False,
        name="a.steer.json",
        progress=said.append,
    )
    counts = {arm.name: arm.rounds[0].new_tokens for arm in found.arms}
    assert counts["steered"] == counts["unsteered"]
    assert found.shift.tokens == sum(map(len, PROMPTS)) + counts["unsteered"]
    moved = [one.changed > 0 for one in found.shift.layers]
    assert moved[:2] == [False, False]
    assert any(moved[2:])
    assert found.steering == "a.steer.json"
    assert said[-1] == "round 1 of 1: steered, its own text"


def test_steered_experts_stay_in_their_slots(model: Any) -> None:
    steering = steering_of(model, 4.0)
    found = measure_cost(model, steering, PROMPTS, max_new_tokens=6, rounds=1)
    assert [arm.name for arm in found.arms] == ["unsteered", "steered", "pinned", "own"]
    pinned, steered = found.arm("pinned"), found.arm("steered")
    assert pinned is not None
    assert steered is not None
    uses = [arm.rounds[0].hits + arm.rounds[0].misses for arm in (pinned, steered)]
    assert uses[0] == uses[1]
    moe_runtime.runtime_of(model).check_integrity()


@pytest.mark.parametrize(
    ("prompts", "betas", "rounds", "words"),
    [
        ([], {(1, 0): 2.0}, 1, "no prompts"),
        ([[3], []], {(1, 0): 2.0}, 1, "prompt 1 has no token"),
        ([[3]], {(1, 0): (2.0, 1.0)}, 1, "expert 0 in layer 1 is for the rows of a batch"),
        ([[3]], {(1, 0): 2.0}, 0, "rounds has to be 1 or more, found 0"),
        ([[3]], {(1, 99): 2.0}, 1, "expert 99"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: Any, prompts: list[list[int]], betas: Any, rounds: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        measure_cost(model, Steering(betas=betas), prompts, rounds=rounds, max_new_tokens=1)


def test_a_plain_model_has_no_cache_to_measure() -> None:
    with pytest.raises(AttachError):
        measure_cost(tiny_model(), Steering(betas={}), [[1]])


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model as a checkpoint, a steering file for it, and prompts."""
    folder = save_planted(tmp_path_factory.mktemp("planted"))
    loaded = moe_runtime.from_pretrained(folder, expert_budget="100%", device="cpu")
    write_steering(
        folder / "a.steer.json",
        Steering(betas={PLANTED: 8.0}),
        model=moe_runtime.runtime_of(loaded).spec,
    )
    (folder / "prompts.txt").write_text("\n".join(map(prompt_of, range(6))))
    return folder


def steer_cost(folder: Path, *words: object) -> Result:
    given = (folder, "--steer", folder / "a.steer.json", "--prompts", folder / "prompts.txt")
    return CliRunner().invoke(app, ["steer", "cost", *map(str, (*given, *words))])


def test_the_command_measures_and_the_report_reads_it(planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "a.steer-cost.json"
    result = steer_cost(
        planted, *("--limit", 2, "-n", 6, "--rounds", 1, "--expert-budget", "50%"), "-o", out
    )
    assert result.exit_code == 0, result.stderr
    found = SteeringCost.load(out)
    assert (found.prompts, found.budget, found.steering) == (2, "50%", "a.steer.json")
    assert [(one.layer, one.expert, one.beta) for one in found.experts] == [(*PLANTED, 8.0)]
    assert [arm.name for arm in found.arms] == ["unsteered", "steered", "pinned", "own"]
    assert all(one.changed == 0 for one in found.shift.layers[: PLANTED[0] + 1])
    assert found.experts[0].uses > 0
    assert "cost at 50%" in result.stdout
    shown = CliRunner().invoke(app, ["report", str(out)])
    assert shown.stdout.splitlines()[0] == result.stdout.splitlines()[0]


def test_the_command_gives_json_and_another_beta(planted: Path) -> None:
    result = steer_cost(
        planted, *("--limit", 1, "-n", 4, "--rounds", 1, "--no-pin", "--beta", 1), "--json"
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [arm["name"] for arm in told["cost"]["arms"]] == ["unsteered", "steered", "own"]
    assert told["cost"]["changed"] == 0.0  # beta 1 changes nothing
    assert told["file"] is None


def test_a_steering_of_another_model_is_refused(planted: Path, tmp_path: Path) -> None:
    data = json.loads((planted / "a.steer.json").read_text())
    data["model"]["fingerprint"] = "beef"
    other = tmp_path / "b.steer.json"
    other.write_text(json.dumps(data))
    out = tmp_path / "b.steer-cost.json"
    result = steer_cost(planted, "--steer", other, "-o", out)
    assert result.exit_code == 1
    assert "fingerprint beef" in result.stderr
    assert not out.exists()
