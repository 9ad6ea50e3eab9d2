"""Exporters: files mean the plan to the engines, and what an engine would refuse is refused."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement import LayerPlan, Plan, Topology
from moe_runtime.placement.export_base import Extras, Target
from moe_runtime.placement.export_ktransformers import gpu_share
from moe_runtime.placement.export_registry import (
    EXPORTERS,
    check_export,
    exporter,
    write_export,
)
from moe_runtime.placement.export_sglang import read_map
from moe_runtime.placement.export_trtllm import read_trtllm
from moe_runtime.placement.export_vllm_ascend import read_vllm_ascend
from typer.testing import CliRunner

import engine_oracles
from moe_runtime.cli import app
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.trace import RoutingTrace
from random_plans import plans, random_plan

HIDDEN = 9  # layers 0 to 7 may be MoE layers
FORMS = [
    (name, suffix)
    for name, each in EXPORTERS.items()
    for suffix in each.suffixes
    if suffix != ".yml"
]
PLAN = random_plan(3, devices=2, own=3, redundant=1, layers=(1, 2, 5))


def extras_of(plan: Plan) -> Extras:
    counts = np.arange(len(plan.layers) * plan.experts[0]).reshape(len(plan.layers), -1)
    return Extras(hidden_layers=HIDDEN, counts=counts)


def written(plan: Plan, name: str, path: Path) -> Path:
    write_export(plan, EXPORTERS[name], path, extras_of(plan))
    return path


def hosts_of(plan: Plan) -> dict[int, list[set[int]]]:
    return {layer.layer: [set(devices) for devices in layer.hosts] for layer in plan.layers}


def redundant_of(plan: Plan) -> int:
    return plan.layers[0].slots - plan.layers[0].experts


# -- the same placement there ----------------------------------------------------------------------


@settings(max_examples=40)
@given(plan=plans(), suffix=st.sampled_from([".json", ".pt"]))
def test_sglang_places_what_the_plan_places(plan: Plan, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(plan, "sglang", Path(folder) / f"x{suffix}")
        found = engine_oracles.sglang(
            path,
            hidden_layers=HIDDEN,
            experts=plan.experts[0],
            redundant=redundant_of(plan),
            ep_size=plan.devices,
        )
        assert {layer: found[layer] for layer in plan.layer_ids} == hosts_of(plan)
        dense = set(range(HIDDEN)) - set(plan.layer_ids)
        room = plan.layers[0].slots // plan.devices
        for layer in dense:  # in order, so that nothing depends on it
            assert all(expert // room in found[layer][expert] for expert in range(plan.experts[0]))
        read = read_map(path, Target.of(plan, extras_of(plan), whole_model=True))
        assert read == {layer.layer: layer.hosts for layer in plan.layers}


@settings(max_examples=40)
@given(plan=plans())
def test_trtllm_places_what_the_plan_places(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(plan, "trtllm", Path(folder) / "x.yaml")
        found = engine_oracles.trtllm(
            path, layers=list(plan.layer_ids), experts=plan.experts[0], ep_size=plan.devices
        )
        assert found == hosts_of(plan)
        read = read_trtllm(path, Target.of(plan, Extras()))
        assert read == {layer.layer: layer.hosts for layer in plan.layers}


@settings(max_examples=40)
@given(plan=plans())
def test_vllm_ascend_places_what_the_plan_places(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(plan, "vllm-ascend", Path(folder) / "x.json")
        room = plan.layers[0].slots // plan.devices
        for ordinal, layer in enumerate(plan.layers):
            for rank in range(plan.devices):
                local, physical, redundant = engine_oracles.vllm_ascend(path, ordinal, rank)
                assert redundant == redundant_of(plan)
                for expert, devices in enumerate(layer.hosts):
                    assert (local[expert] >= 0) == (rank in devices)
                    assert physical[expert] // room in devices
        read = read_vllm_ascend(path, Target.of(plan, Extras()))
        assert read == {layer.layer: layer.hosts for layer in plan.layers}


@settings(max_examples=40)
@given(plan=plans())
def test_ktransformers_takes_the_device_tier(plan: Plan) -> None:
    wanted = np.array([[tier == "device" for tier in layer.tiers] for layer in plan.layers])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        advice = write_export(plan, EXPORTERS["ktransformers"], path, extras_of(plan))
        mask = engine_oracles.ktransformers(path, int(wanted.sum())).numpy()
        assert mask.shape == (HIDDEN, plan.experts[0])
        assert (mask[list(plan.layer_ids)] == wanted).all()
    # The engine derives the number of experts from the option; it must come out exactly.
    words = advice.flags[0].split()
    if "--kt-num-gpu-experts" in words:
        number = int(words[words.index("--kt-num-gpu-experts") + 1]) * len(plan.layers)
    else:
        number = int(wanted.size * float(words[words.index("--kt-gpu-experts-ratio") + 1]))
    assert number == wanted.sum()


@given(experts=st.integers(1, 20_000), share=st.floats(0, 1))
def test_a_gpu_share_gives_the_number_back(experts: int, share: float) -> None:
    number = int(experts * share)
    assert int(experts * float(gpu_share(number, experts))) == number


def test_the_vllm_ascend_stand_in_gives_the_engines_own_example(tmp_path: Path) -> None:
    held = [[7, 2, 0, 3, 5], [6, 1, 4, 7, 2]]
    path = tmp_path / "expert_map.json"
    devices = [{"device_id": i, "device_expert": row} for i, row in enumerate(held)]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    path.write_text(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))
    local, physical, redundant = engine_oracles.vllm_ascend(path, 0, 1)
    assert local == [-1, 1, 4, -1, 2, -1, 0, 3]
    assert physical == [2, 6, 9, 3, 7, 4, 5, 8]
    assert redundant == 2
    # Ours reads the same file: MoE layer 0 is, say, the model's layer 3.
    hosts = read_vllm_ascend(path, Target(layer_ids=(3,), experts=8, devices=2))
    assert hosts == {3: ((0,), (1,), (0, 1), (0,), (1,), (0,), (1,), (0, 1))}


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_counts_stand_in_the_rows_of_their_layers(suffix: str, tmp_path: Path) -> None:
    path = written(PLAN, "counts", tmp_path / f"x{suffix}")
    if suffix == ".pt":
        table = engine_oracles.load_tensors(path)["logical_count"].numpy()
    else:
        table = np.array(json.loads(path.read_text())["logical_count"])
    assert table.shape == (HIDDEN, 6)
    assert (table[[1, 2, 5]] == np.arange(18).reshape(3, 6)).all()
    assert table.sum() == np.arange(18).sum()  # dense rows are zero


# -- refusals --------------------------------------------------------------------------------------


def edited(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change a file's data in place."""
    if path.suffix == ".pt":
        data = engine_oracles.load_tensors(path)
        edit(data)
        torch.save(data, path)
        return
    load, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.dump)
    data = load(path.read_text())
    edit(data)
    path.write_text(dump(data))


MAP, SLOTS, LAYERS = "physical_to_logical_map", "num_slots", "initial_global_assignments"


def device(data: Any, layer: int = 0, number: int = 0) -> Any:
    return data["layer_list"][layer]["device_list"][number]


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("sglang", lambda d: d.update(note="x"), "'note' is one too many"),
        ("sglang", lambda d: d.update({"other": d.pop(MAP)}), "must be an object with the key"),
        ("sglang", lambda d: d[MAP].pop(), r"must have shape \[9, any\], found \[8, 8\]"),
        ("sglang", lambda d: d[MAP][0].pop(), "different lengths"),
        ("sglang", lambda d: [row.pop() for row in d[MAP]], "cannot be dealt out evenly"),
        ("sglang", lambda d: d[MAP][0].__setitem__(0, 6), "layer 0, slot 0: expert 6"),
        ("sglang", lambda d: d[MAP].__setitem__(1, [0] * 8), "layer 1: expert 1 has no slot"),
        ("sglang", lambda d: d[MAP][1].reverse(), "layer 1 expert"),
        ("sglang", lambda d: d[MAP][1].__setitem__(0, 1.0), "whole numbers"),
        ("trtllm", lambda d: d.update(note="x"), "'note' is one too many"),
        ("trtllm", lambda d: d.update(num_slots=7), "must be a multiple of 2 devices"),
        ("trtllm", lambda d: d.update(num_slots=10), r"must have shape \[10\], found \[8\]"),
        ("trtllm", lambda d: d.update(layer_updates_per_iter=4), "must be 0 for a static"),
        ("trtllm", lambda d: d[LAYERS].pop(2), "layer 2 is missing"),
        ("trtllm", lambda d: d[LAYERS].update({0: [0]}), "layer 0 is no MoE layer"),
        ("trtllm", lambda d: d.update({LAYERS: {"1": []}}), "must map absolute layer indices"),
        ("trtllm", lambda d: d[LAYERS].update({5: [0] * 8}), "layer 5: expert 1 has no slot"),
        ("trtllm", lambda d: d[LAYERS][5].reverse(), "layer 5 expert"),
        ("vllm-ascend", lambda d: d["layer_list"].pop(), "has 2 layers; the model has 3"),
        ("vllm-ascend", lambda d: d["layer_list"].reverse(), "layer_id must be 0, found 2"),
        ("vllm-ascend", lambda d: device(d)["device_expert"].pop(), "all must hold as many"),
        (
            "vllm-ascend",
            lambda d: device(d).update(device_expert=[0, 0, 1, 2]),
            "an expert is there twice",
        ),
        ("vllm-ascend", lambda d: device(d).update(device_id=1), "device_id must be 0, found 1"),
        ("vllm-ascend", lambda d: d["layer_list"][1].update(device_count=4), "must be 2, found 4"),
        ("counts", lambda d: d["logical_count"].pop(), "must have 9 hidden layers of 6 experts"),
        ("counts", lambda d: d["logical_count"][1].__setitem__(0, -1), "counts must be 0"),
        ("counts", lambda d: d["logical_count"][1].__setitem__(0, 77), "the file counts 77"),
    ],
)
def test_what_the_engine_would_refuse(
    name: str, edit: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    suffix = ".yaml" if name == "trtllm" else ".json"
    path = written(PLAN, name, tmp_path / f"x{suffix}")
    check_export(PLAN, EXPORTERS[name], path, extras_of(PLAN))
    edited(path, edit)
    with pytest.raises(PlanError, match=message) as caught:
        check_export(PLAN, EXPORTERS[name], path, extras_of(PLAN))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(logical_count=d["logical_count"][0]), "3 dimensions"),
        (lambda d: d["logical_count"].fill_(1), "the engine would take any of them"),
        (lambda d: d.update(logical_count=d["logical_count"].flip(2)), "tier"),
        (lambda d: d.update(logical_count=d["logical_count"].float()), "whole numbers"),
    ],
)
def test_what_ktransformers_would_refuse(
    edit: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    tiers = ("device",) * 2 + ("host",) * 4
    plan = replace(PLAN, layers=tuple(replace(layer, tiers=tiers) for layer in PLAN.layers))
    path = written(plan, "ktransformers", tmp_path / "x.pt")
    edited(path, edit)
    with pytest.raises(PlanError, match=message):
        check_export(plan, EXPORTERS["ktransformers"], path, extras_of(plan))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "x.pt"
    torch.save({MAP: Bomb()}, path)
    with pytest.raises(PlanError, match=r"not a \.pt file of plain tensors"):
        check_export(PLAN, EXPORTERS["sglang"], path, extras_of(PLAN))
    assert not (tmp_path / "ran").exists()


def one_layer(*hosts: tuple[int, ...], layer: int = 0) -> LayerPlan:
    return LayerPlan(layer=layer, hosts=hosts)


@pytest.mark.parametrize("name", ["sglang", "trtllm", "vllm-ascend"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([one_layer((0,), (0,), (1,))], "devices hold"),
        (
            [one_layer((0,), (1,)), one_layer((0, 1), (0, 1), layer=1)],
            "engines want the same number in every layer",
        ),
        (
            [one_layer((0,), (1,)), one_layer((0,), (1,), (0,), (1,), layer=1)],
            "different numbers of experts",
        ),
    ],
)
def test_plans_that_an_engine_cannot_hold(
    name: str, layers: list[LayerPlan], message: str, tmp_path: Path
) -> None:
    plan = Plan(topology=Topology.of(2), layers=tuple(layers))
    path = tmp_path / f"x{EXPORTERS[name].suffixes[0]}"
    path.write_text("kept")
    with pytest.raises(PlanError, match=message):
        write_export(plan, EXPORTERS[name], path, Extras(hidden_layers=4))
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["sglang", "counts", "ktransformers"])
def test_hidden_layers_are_needed_and_checked(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    counts = extras_of(PLAN).counts
    with pytest.raises(PlanError, match="--num-hidden-layers"):
        write_export(PLAN, EXPORTERS[name], path, Extras(counts=counts))
    with pytest.raises(PlanError, match="the plan has layer 5, but the model has 5 hidden"):
        write_export(PLAN, EXPORTERS[name], path, Extras(hidden_layers=5, counts=counts))
    assert not list(tmp_path.iterdir())


def test_a_file_is_checked_before_it_gets_its_name(tmp_path: Path) -> None:
    def wrong(plan: Plan, path: Path, extras: Extras) -> None:
        path.write_text(json.dumps({MAP: [[0] * 8] * HIDDEN}))

    path = tmp_path / "x.json"
    broken = replace(EXPORTERS["sglang"], write=wrong)
    with pytest.raises(PlanError, match="has no slot"):
        write_export(PLAN, broken, path, extras_of(PLAN))
    assert not list(tmp_path.iterdir())


def test_engines_without_a_file_point_to_bake() -> None:
    with pytest.raises(ConfigError, match=r"no placement from a file.*moe-runtime bake"):
        exporter("vllm")
    with pytest.raises(ConfigError, match="known: sglang, trtllm, vllm-ascend"):
        exporter("sglong")


# -- damaged files: our errors only ----------------------------------------------------------------


def only_our_errors(name: str, path: Path) -> None:
    with contextlib.suppress(PlanError):
        check_export(PLAN, EXPORTERS[name], path, extras_of(PLAN))


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], bytes]:
    folder = tmp_path_factory.mktemp("good")
    return {
        (name, suffix): written(PLAN, name, folder / f"{name}{suffix}").read_bytes()
        for name, suffix in FORMS
    }


@pytest.mark.parametrize(("name", "suffix"), FORMS)
@settings(max_examples=60)
@given(data=st.data())
def test_changed_bytes(
    name: str,
    suffix: str,
    good_files: dict[tuple[str, str], bytes],
    data: st.DataObject,
) -> None:
    good = good_files[name, suffix]
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    kept = data.draw(st.integers(0, len(changed)) | st.just(len(changed)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(bytes(changed[:kept]))
        only_our_errors(name, path)


def spots(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside nested data."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    found = [(data, key) for key in keys]
    for key in keys:
        if isinstance(data[key], dict | list):
            found += spots(data[key])
    return found


ODD: list[Any] = [None, True, -1, 3, 2**63, 10**40, 0.5, float("nan"), "x", [], [[]], {}, {"a": 1}]


@pytest.mark.parametrize(("name", "suffix"), [form for form in FORMS if form[1] != ".pt"])
@settings(max_examples=60)
@given(data=st.data())
def test_changed_values(
    name: str,
    suffix: str,
    good_files: dict[tuple[str, str], bytes],
    data: st.DataObject,
) -> None:
    load, dump = (json.loads, json.dumps) if suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = load(good_files[name, suffix].decode())
    container, key = data.draw(st.sampled_from(spots(content)))
    container[key] = data.draw(st.sampled_from(ODD))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_text(dump(content))
        only_our_errors(name, path)


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return PLAN.save(tmp_path / "x.plan.json")


@pytest.mark.parametrize(
    ("name", "suffix", "flag"),
    [
        ("sglang", ".json", "--ep-size 2 --ep-num-redundant-experts 2 --init-expert-location"),
        ("trtllm", ".yaml", "moe_expert_parallel_size: 2"),
        ("vllm-ascend", ".json", "expert_map_path"),
        ("ktransformers", ".pt", "--kt-expert-placement-strategy frequency"),
    ],
)
def test_the_command_writes_and_checks(
    name: str, suffix: str, flag: str, plan_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"out{suffix}"
    options = ["--to", name, "--num-hidden-layers", HIDDEN]
    result = run("export", plan_file, *options, "-o", path)
    assert result.exit_code == 0, result.stderr
    assert flag in result.stdout
    result = run("export", plan_file, *options, "--check", path, "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["engine"] == EXPORTERS[name].engine
    assert not shown["written"]
    assert any(flag in line for line in shown["flags"])


def test_the_command_refuses_with_2(plan_file: Path, tmp_path: Path) -> None:
    result = run("export", plan_file, "--to", "sglang", "-o", tmp_path / "x.json", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "PlanError"
    result = run("export", plan_file, "--to", "trtllm", "-o", tmp_path / "x.json")
    assert result.exit_code == 2
    assert ".yaml or .yml" in result.stderr
    result = run("export", plan_file, "--to", "vllm", "-o", tmp_path / "x.json")
    assert result.exit_code == 2
    assert "bake" in result.stderr
    assert run("export", plan_file, "--to", "trtllm").exit_code == 2
    result = run("export", tmp_path / "none", "--to", "trtllm", "-o", tmp_path / "x.yaml")
    assert result.exit_code == 2
    assert not list(tmp_path.glob("x.[jy]*"))


def a_trace(layers: tuple[int, ...]) -> RoutingTrace:
    ids = np.array([[[0, 1], [5, 4], [0, 65535]], [[0, 2], [5, 3], [1, 65535]]], dtype=np.uint16)
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=np.zeros(ids.shape, dtype=np.float16),
        token_ids=np.zeros(2, dtype=np.int32),
        sequence_ids=np.zeros(2, dtype=np.int32),
        positions=np.arange(2, dtype=np.int32),
        phase=np.zeros(2, dtype=np.uint8),
        step_ids=np.zeros(2, dtype=np.int32),
        layer_ids=layers,
        experts=(6, 6, 6),
    )


def test_counts_come_from_a_trace_or_a_count_file(plan_file: Path, tmp_path: Path) -> None:
    trace = a_trace((1, 2, 5)).save(tmp_path / "t.trace.safetensors")
    first, second = tmp_path / "a.pt", tmp_path / "b.json"
    options = ["--to", "counts", "--num-hidden-layers", HIDDEN]
    assert run("export", plan_file, *options, "--counts", trace, "-o", first).exit_code == 0
    result = run("export", plan_file, *options, "--counts", first, "-o", second)
    assert result.exit_code == 0
    assert "the plan is NOT carried" in result.stdout
    table = json.loads(second.read_text())["logical_count"]
    assert [table[layer] for layer in (1, 2, 5)] == [
        [2, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 2],
        [1, 1, 0, 0, 0, 0],
    ]
    other = a_trace((0, 2, 5)).save(tmp_path / "other.trace.safetensors")
    result = run("export", plan_file, *options, "--counts", other, "-o", tmp_path / "c.pt")
    assert result.exit_code == 2
    assert "lacks layer 0" in result.stderr
    assert not (tmp_path / "c.pt").exists()


def test_hidden_layers_come_from_a_model(plan_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 9}
    (model / "config.json").write_text(json.dumps(config))
    path = tmp_path / "out.json"
    result = run("export", plan_file, "--to", "sglang", "--model", model, "-o", path)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(path.read_text())[MAP]) == 9
