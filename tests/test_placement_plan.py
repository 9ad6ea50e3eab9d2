"""Plans: the file there and back, damaged files, and what engines ask of a plan."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.plan import TIERS, Certificate, LayerPlan, Plan, write_text
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
METRICS = st.dictionaries(
    st.text(max_size=5), NUMBERS | st.none() | st.text(max_size=5), max_size=3
)
CERTIFICATES = st.builds(
    Certificate,
    objective=st.text(max_size=9),
    value=NUMBERS,
    bound=NUMBERS,
    bound_method=st.text(max_size=9),
    status=st.sampled_from(("optimal", "feasible")),
    method=st.text(max_size=9),
    seconds=st.integers(0, 10**7).map(lambda thousandths: thousandths / 1000),
    seed=st.integers(0, 2**40),
)


@st.composite
def whole_plans(draw: st.DrawFn) -> Plan:
    """Plans with everything in them, layers of different sizes and in any order."""
    devices = draw(st.integers(1, 4))
    hosts = st.sets(st.integers(0, devices - 1), min_size=1).map(lambda some: tuple(sorted(some)))
    layers = []
    for layer in draw(st.lists(st.integers(0, 90), min_size=1, max_size=4, unique=True)):
        held = draw(st.lists(hosts, min_size=1, max_size=5))
        tiers = draw(
            st.lists(st.sampled_from(TIERS), min_size=len(held), max_size=len(held)) | st.just([])
        )
        layers.append(LayerPlan(layer=layer, hosts=tuple(held), tiers=tuple(tiers)))
    counts = st.lists(st.integers(0, 9), min_size=len(layers), max_size=len(layers))
    return Plan(
        topology=Topology.of(devices, draw(st.sampled_from((1, devices)))),
        layers=tuple(layers),
        model_id=draw(st.text(max_size=8)),
        fingerprint=draw(st.text(max_size=8)),
        top_k=tuple(draw(counts | st.just([]))),
        certificate=draw(st.none() | CERTIFICATES),
        metrics={"train": draw(METRICS), "baselines": {"random": {"train": draw(METRICS)}}},
        settings=draw(METRICS),
    )


def small_plan() -> Plan:
    return Plan(
        topology=Topology.of(2, 2, memory=100),
        layers=(
            LayerPlan(
                layer=1, hosts=((0,), (1,), (0, 1), (0, 1)), tiers=("device",) * 3 + ("host",)
            ),
            LayerPlan(layer=4, hosts=((1,), (0,), (0,), (1,))),
        ),
        model_id="some/model",
        fingerprint="abc",
        top_k=(2, 2),
        certificate=Certificate(
            objective="crossing",
            value=0.5,
            bound=0.4,
            bound_method="a bound",
            status="feasible",
            method="by hand",
            seconds=1.5,
            seed=7,
        ),
        metrics={"train": {"crossing": 0.5}},
        settings={"seed": 7},
    )


# -- there and back --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(plan=whole_plans())
def test_a_saved_plan_is_loaded_as_it_was(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plans") / "deeper" / "some.plan.json"
    assert plan.save(path) == path
    again = Plan.load(path)
    assert again == plan
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before


@settings(max_examples=40, deadline=None)
@given(plan=whole_plans())
def test_views_agree_with_the_hosts(plan: Plan) -> None:
    assert plan.experts == tuple(len(layer.hosts) for layer in plan.layers)
    assert plan.has_replicas == any(len(h) > 1 for layer in plan.layers for h in layer.hosts)
    for position, (layer, held) in enumerate(zip(plan.layers, plan.matrices(), strict=True)):
        assert held.shape == (layer.experts, plan.devices)
        assert held.sum() == layer.slots
        for expert, devices in enumerate(layer.hosts):
            assert np.flatnonzero(held[expert]).tolist() == list(devices)
        for device, mine in enumerate(plan.device_experts(position)):
            assert mine == [e for e, devices in enumerate(layer.hosts) if device in devices]
    assert plan.residents() == [
        (layer.layer, expert)
        for layer in plan.layers
        for expert in range(layer.experts)
        if layer.tiers[expert] == "device"
    ]


@pytest.mark.parametrize(
    ("value", "bound", "gap"), [(0.5, 0.4, 0.2), (0.5, 0.5, 0.0), (0.5, 0.6, 0.0), (0.0, -1.0, 0.0)]
)
def test_the_gap(value: float, bound: float, gap: float) -> None:
    certificate = small_plan().certificate
    assert certificate is not None
    certificate = replace(certificate, value=value, bound=bound)
    assert certificate.gap == pytest.approx(gap)
    assert certificate.to_dict()["gap"] == certificate.gap


# -- damaged files ---------------------------------------------------------------------------------

REQUIRED = [
    ("format",),
    ("version",),
    ("model",),
    ("model", "id"),
    ("model", "fingerprint"),
    ("topology",),
    ("topology", "devices"),
    ("layers",),
    ("layers", 0, "layer"),
    ("layers", 0, "top_k"),
    ("layers", 1, "devices"),
    ("layers", 1, "tiers"),
    *(
        ("certificate", name)
        for name in (
            "objective",
            "value",
            "bound",
            "bound_method",
            "status",
            "method",
            "seconds",
            "seed",
        )
    ),
    ("metrics",),
    ("settings",),
]


def changed(path: tuple[Any, ...], value: Any = None, *, drop: bool = False) -> dict[str, Any]:
    """The data of `small_plan` with one item changed."""
    data: dict[str, Any] = json.loads(json.dumps(small_plan().to_dict()))
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


def refused(data: Any, folder: Path) -> str:
    """The message that the file is refused with; it names the file."""
    path = folder / "damaged.plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_needed_and_of_its_type(path: tuple[Any, ...], tmp_path: Path) -> None:
    name = str(path[-1])
    assert name in refused(changed(path, drop=True), tmp_path)
    for value in (None, True, [3], 2.5, "seven", {"a": 1}):
        data = changed(path, value)
        numbers = path[-1] in ("value", "bound", "seconds")
        texts = path[-1] in ("id", "fingerprint", "objective", "bound_method", "method")
        fits = (
            (texts and isinstance(value, str))
            or (numbers and value == 2.5)
            or (name in ("metrics", "settings") and isinstance(value, dict))
        )
        if fits:
            assert Plan.from_dict(data).layer_ids == (1, 4)
        else:
            refused(data, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "moe-runtime.trace", "field 'format' is 'moe-runtime.trace'"),
        (("version",), 2, "field 'version' is 2, this release reads 1"),
        (("layers",), [], "one MoE layer at least"),
        (("layers", 0, "layer"), 4, r"layers of a plan must be distinct, found \(4, 4\)"),
        (("layers", 0, "layer"), -1, "layer -1"),
        (("layers", 0, "top_k"), -2, "top_k"),
        (("layers", 0, "devices"), [], "layer 1 of the plan has no experts"),
        (("layers", 0, "devices", 2), [], "layer 1 expert 2: devices must be one at least"),
        (("layers", 0, "devices", 2), [1, 0], r"layer 1 expert 2: .* ascending, found \[1, 0\]"),
        (("layers", 0, "devices", 2), [0, 0], r"layer 1 expert 2: .* distinct"),
        (("layers", 0, "devices", 2), [-1], r"layer 1 expert 2: .*found \[-1\]"),
        (("layers", 0, "devices", 2), [0.0], "layer 1 expert 2: devices must be a list of whole"),
        (("layers", 0, "devices", 2), [True], "layer 1 expert 2: devices must be a list of whole"),
        (("layers", 0, "devices", 2), 0, "layer 1 expert 2: devices must be a list of whole"),
        (("layers", 1, "devices", 3), [2], "layer 4 names device 2, but there are 2"),
        (("layers", 0, "tiers"), ["device"], "layer 1 of the plan: 1 tiers for 4 experts"),
        (("layers", 0, "tiers", 3), "tape", "layer 1: unknown tier 'tape'; known: device, host"),
        (("layers", 0, "tiers", 3), 3, "layer 1: tiers must be texts"),
        (("layers", 0), 3, "field 'devices' is missing or damaged"),
        (("topology", "devices"), 3, "nodes names 2 devices, devices says 3"),
        (("topology", "cost", 0, 1), -1.0, "costs must be finite and not negative"),
        (("certificate",), [], "field 'objective' is missing"),
        (("certificate", "status"), "great", "status must be optimal or feasible, not 'great'"),
        (("certificate", "value"), math.nan, "value, bound and seconds must be finite"),
        (("certificate", "bound"), math.inf, "value, bound and seconds must be finite"),
        (("certificate", "seconds"), math.nan, "value, bound and seconds must be finite"),
        pytest.param(("certificate", "value"), 10**400, "seconds must be finite", id="huge"),
    ],
)
def test_values_out_of_range(
    path: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    assert re.search(message, refused(changed(path, value), tmp_path))


@pytest.mark.parametrize("data", [None, 3, "plan", [], {}, [{"format": "moe-runtime.plan"}]])
def test_other_json_is_no_plan(data: Any, tmp_path: Path) -> None:
    assert "this is no plan" in refused(data, tmp_path)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from((10**400, 2**70, "device")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every item."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in items if isinstance(data, dict | list) else ():
        found += (
            [(*at, key), *places(value, (*at, key))]
            if isinstance(value, dict | list)
            else [(*at, key)]
        )
    return found


PLACES = places(small_plan().to_dict())


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.sampled_from(PLACES), JSON_VALUES, st.booleans()), max_size=2),
)
def test_any_change_gives_a_plan_or_a_plan_error(edits: list[Any]) -> None:
    data = copy.deepcopy(small_plan().to_dict())
    for path, value, drop in edits:
        inner: Any = data
        try:
            for key in path[:-1]:
                inner = inner[key]
            if drop:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit took this place away
    text = json.dumps(data)
    try:
        plan = Plan.from_dict(json.loads(text))
    except PlanError:
        return
    again = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(again).layers == plan.layers
    assert Plan.from_dict(again).certificate is None or plan.certificate is not None
    plan.matrices()


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damaged_byte_gives_a_plan_or_a_plan_error(
    at: int, byte: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.plan.json"
    content = bytearray(json.dumps(small_plan().to_dict()).encode())
    at %= len(content)
    content[at] = byte
    path.write_bytes(content[:at] if cut else content)
    try:
        plan = Plan.load(path)
    except PlanError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
    else:
        assert not cut
        assert plan.devices == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.plan\.json: cannot be read"):
        Plan.load(tmp_path / "none.plan.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(PlanError, match=r"bad\.json: not a JSON file"):
            Plan.load(tmp_path / "bad.json")


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_failed_save_leaves_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.plan.json"
    path.write_text("the old plan", encoding="utf-8")

    def write_half(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text[: len(text) // 2].encode(encoding))
        raise OSError(28, "No space left on device")

    def fail(*names: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if step == "write_text":
            patch.setattr(Path, "write_text", write_half)
        else:
            patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"No space|Input/output"):
            small_plan().save(path)
    assert path.read_text(encoding="utf-8") == "the old plan"
    assert list(tmp_path.iterdir()) == [path]


def test_a_plan_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    plan = replace(small_plan(), metrics={"crossing": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        plan.save(tmp_path / "some.plan.json")
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_whole_with_its_folder(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a" / "b.txt", "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    assert list(path.parent.iterdir()) == [path]


# -- what engines ask ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), devices=st.integers(1, 4), own=st.integers(1, 4))
def test_a_permutation_makes_contiguous_blocks_the_plan(seed: int, devices: int, own: int) -> None:
    home = np.random.default_rng(seed).permutation(np.repeat(np.arange(devices), own))
    plan = Plan(
        topology=Topology.of(devices),
        layers=(LayerPlan(layer=3, hosts=tuple((int(device),) for device in home)),),
    )
    permutation = plan.permutation(0)
    assert sorted(permutation.tolist()) == list(range(devices * own))
    assert home[permutation].tolist() == np.repeat(np.arange(devices), own).tolist()
    assert plan.physical_to_logical(0) == permutation.tolist()
    blocks = permutation.reshape(devices, own)
    assert (np.diff(blocks, axis=1) > 0).all()


def test_slots_with_replicas_are_no_permutation() -> None:
    plan = small_plan()
    assert plan.physical_to_logical(0) == [0, 2, 3, 1, 2, 3]
    with pytest.raises(PlanError, match="layer 1 has replicas"):
        plan.permutation(0)
    assert plan.permutation(1).tolist() == [1, 2, 0, 3]


def test_uneven_devices_have_no_slots() -> None:
    plan = Plan(topology=Topology.of(2), layers=(LayerPlan(layer=6, hosts=((0,), (0,), (1,))),))
    with pytest.raises(PlanError, match=r"layer 6: devices hold \[2, 1\] experts"):
        plan.physical_to_logical(0)


def test_a_plan_fits_its_model_only() -> None:
    plan = small_plan()
    plan.require_model(layer_ids=[1, 4], experts=[4, 4], fingerprint="abc")
    plan.require_model(layer_ids=[1, 4], experts=[4, 4])
    replace(plan, fingerprint="").require_model(
        layer_ids=(1, 4), experts=(4, 4), fingerprint="other"
    )
    for layer_ids, experts, fingerprint, message in (
        ((1, 4), (4, 4), "xyz", "some/model with fingerprint abc, the trace has xyz"),
        ((1, 2, 4), (4, 4, 4), "", "lacks layer 2"),
        ((1,), (4,), "", "has layer 4 too many"),
        ((4, 1), (4, 4), "", "orders layers otherwise"),
        ((1, 4), (4, 8), "", "layer 4: the plan places 4 experts, the trace has 8"),
    ):
        with pytest.raises(PlanError, match=message):
            plan.require_model(
                layer_ids=layer_ids, experts=experts, fingerprint=fingerprint, name="the trace"
            )


def test_plans_in_code_are_checked_too() -> None:
    layer = LayerPlan(layer=0, hosts=((0,), (1,)))
    assert layer.tiers == ("device", "device")
    with pytest.raises(PlanError, match="top_k names 2 layers, the plan has 1"):
        Plan(topology=Topology.of(2), layers=(layer,), top_k=(1, 1))
    with pytest.raises(PlanError, match="layer 0 names device 1, but there are 1"):
        Plan(topology=Topology.of(1), layers=(layer,))
    assert Plan(topology=Topology.of(2), layers=(layer,)).top_k == (0,)
