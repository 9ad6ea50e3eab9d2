"""Steer files: what is written comes back; damage, other versions and other models are refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marked_traces import MARKERS, random_trace
from moe_runtime.errors import ConfigError
from moe_runtime.model_spec import MoESpec, read_spec
from moe_runtime.steering import (
    Identification,
    SteeredModel,
    Steering,
    identify,
    read_steering,
    write_steering,
)
from moe_runtime.steering.picture import save_picture
from tiny import tiny_model

FOUND = identify(random_trace(0), MARKERS, 2, least_joint=1, least_uses=1, bootstrap=20)
STEERING = Steering(betas=dict.fromkeys(FOUND.chosen, 64.0), thinking=("<think>", "</think>"))


@pytest.fixture(scope="module")
def spec() -> MoESpec:
    return read_spec(tiny_model())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_steering(tmp_path / "new" / "a.steer.json", STEERING, identification=FOUND)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_what_is_written_comes_back(path: Path) -> None:
    read = read_steering(path)
    assert read.steering == STEERING
    assert read.identification == FOUND
    assert read.model == SteeredModel.of(FOUND)
    assert read.model.fingerprint == "beef"
    assert read.path == path
    assert [one.name for one in path.parent.iterdir()] == ["a.steer.json"]


betas = st.floats(0, 1e6) | st.lists(st.floats(0, 1e6), min_size=1, max_size=3).map(tuple)


@settings(max_examples=25)
@given(
    steered=st.dictionaries(st.tuples(st.integers(1, 3), st.integers(0, 2)), betas),
    method=st.sampled_from(["multiply", "logit_bias", "force"]),
    renormalise=st.booleans(),
    thinking=st.none() | st.tuples(st.text(), st.text()),
)
def test_every_steering_comes_back(tmp_path_factory: Any, **given_: Any) -> None:
    steering = Steering(betas=given_.pop("steered"), **given_)
    path = write_steering(
        tmp_path_factory.getbasetemp() / "every.steer.json",
        steering,
        model=SteeredModel(layer_ids=(1, 2, 3), experts=(3, 3, 3)),
    )
    assert read_steering(path).steering == steering
    assert read_steering(path).identification is None


def test_an_identification_is_plain_data_and_again() -> None:
    assert Identification.from_dict(FOUND.to_dict()) == FOUND
    assert Identification.from_dict(json.loads(json.dumps(FOUND.to_dict()))) == FOUND


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format="moe-runtime.plan"), "'format' is 'moe-runtime.plan'.*no steer"),
        (lambda d: d.update(version=2), "'version' is 2, this release reads 1"),
        (lambda d: d.update(version=True), "'version' is True"),
        (lambda d: d.pop("model"), "'model' has to be an object, found None"),
        (lambda d: d["model"].pop("fingerprint"), "'fingerprint' has to be a text"),
        (lambda d: d["model"].update(experts=[3]), "3 layers, 1 counts"),
        (lambda d: d["model"].update(layer_ids=[1, 2, -3]), "'layer_ids'.*found -3"),
        (lambda d: d["steering"].update(method="pray"), "unknown method 'pray'"),
        (lambda d: d["steering"].update(renormalise=1), "'renormalise' has to be true or false"),
        (lambda d: d["steering"].update(thinking=["<think>"]), "'thinking' has to be null or two"),
        (lambda d: d["steering"].update(experts=["x"]), "'experts' has to be a list of objects"),
        (lambda d: d["steering"]["experts"][0].update(beta=-1), "beta of expert .* found -1"),
        (lambda d: d["steering"]["experts"][0].update(beta=float("nan")), "finite number"),
        (lambda d: d["steering"]["experts"][0].update(beta=10**400), "finite number"),
        (lambda d: d["steering"]["experts"][0].update(beta="much"), "'beta' has to be a number"),
        (lambda d: d["steering"]["experts"][0].update(beta=[1, None]), "'beta' has to be a number"),
        (lambda d: d["steering"]["experts"][0].update(layer=1.5), "'layer' has to be a whole"),
        (lambda d: d["steering"]["experts"][0].update(layer=9), "layer 9 has no routed experts"),
        (lambda d: d["steering"]["experts"][0].update(expert=99), "no expert 99 in layer"),
        (lambda d: d["steering"]["experts"].append(d["steering"]["experts"][0]), "twice"),
        (lambda d: d["identification"].pop("rows"), "'rows' has to be a whole number"),
        (lambda d: d["identification"].update(top=99), "'top' is 99, but"),
        (lambda d: d["identification"]["scores"].pop(), "'scores' has to be a list for each of 3"),
        (lambda d: d["identification"]["npmi"].pop(), "2 maps for 3 tokens"),
        (lambda d: d["identification"]["npmi"][0][0].pop(), "'npmi': row 0 has to have"),
        (lambda d: d["identification"]["ranked"][0].update(expert=99), "'ranked' names expert 99"),
        (lambda d: d["identification"]["ranked"][0]["joint"].pop(), "a number for each of 3"),
        (lambda d: d["identification"]["ranked"][0].update(interval=[1]), "'interval' has to be"),
    ],
)
def test_damage_is_named(path: Path, change: Callable[[dict[str, Any]], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        read_steering(changed(path, change))
    assert str(path) in str(caught.value)


def test_a_file_without_smoothing_had_none(path: Path) -> None:
    read = read_steering(changed(path, lambda data: data["identification"].pop("smoothing")))
    assert read.identification == FOUND


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "no JSON text"),
        (b"{", "no JSON text"),
        (b"\xff\xfe\x00", "no JSON text"),
        (b"[" * 100_000, "no JSON text"),
        (b"[]", "'format' is 'list'"),
        (b"null", "no steering file"),
    ],
)
def test_what_is_no_steer_file(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "a.steer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        read_steering(path)


@settings(max_examples=60)
@given(data=st.data())
def test_a_cut_or_twisted_file_is_refused_or_read(tmp_path_factory: Any, data: Any) -> None:
    """Whatever stands in a field, the reader raises its own error or gives a whole file."""
    path = tmp_path_factory.getbasetemp() / "twisted.steer.json"
    write_steering(path, STEERING, identification=FOUND)
    tree = json.loads(path.read_text(encoding="utf-8"))
    place: Any = tree
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(
        st.sampled_from([None, True, -1, 0, 1.5, 10**400, "x", [], {}, [None], [[1]], {"a": 1}])
    )
    path.write_text(json.dumps(tree), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        read_steering(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such steering file; check the path"):
        read_steering(tmp_path / "none.steer.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_steering(tmp_path)


def test_a_file_of_another_model_is_refused(tmp_path: Path, spec: MoESpec, path: Path) -> None:
    with pytest.raises(ConfigError, match=f"fingerprint beef.*{spec.fingerprint}; find experts"):
        read_steering(path).check(spec)
    layer = spec.grid.layers[0]
    own = write_steering(tmp_path / "b.steer.json", Steering(betas={(layer, 0): 2.0}), model=spec)
    read_steering(own).check(spec)
    assert read_steering(own).model.layer_ids == spec.grid.layers
    # Without a fingerprint its experts have to be there.
    for betas_, text in (
        ({(99, 0): 2.0}, "layer 99 has no"),
        ({(layer, 999): 2.0}, "no expert 999"),
    ):
        nameless = write_steering(
            tmp_path / "c.steer.json", Steering(betas=betas_), model=SteeredModel()
        )
        with pytest.raises(ConfigError, match=text):
            read_steering(nameless).check(spec)


def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, spec: MoESpec) -> None:
    path = tmp_path / "a.steer.json"
    with pytest.raises(ConfigError, match="says for which model it is"):
        write_steering(path, STEERING)
    with pytest.raises(ConfigError, match="layer 99"):
        write_steering(path, Steering(betas={(99, 0): 2.0}), model=spec)
    assert not list(tmp_path.iterdir())


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    path = save_picture(FOUND, tmp_path / "new" / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [one.name for one in path.parent.iterdir()] == ["a.png"]
    blank = replace(FOUND, scores=tuple((None,) * count for count in FOUND.experts))
    save_picture(blank, path)  # nothing to draw is no error
