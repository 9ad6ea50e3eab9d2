"""Baking: what is refused, and that an interrupted or refused bake leaves nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_runtime.placement import bake as bake_module
from moe_runtime.placement import bake_copy
from moe_runtime.placement.bake import bake
from moe_runtime.placement.bake_copy import Patch, write_patched
from moe_runtime.placement.bake_source import open_source
from moe_runtime.placement.plan import Plan
from safetensors.torch import load_file

from baking import GATE, baked, plan_of, random_orders, rewrite
from moe_runtime.errors import CheckpointError, ConfigError, PlanError, UnsupportedModelError
from tiny import EXPERTS, LAYERS, TinyCheckpoints, expert_shard

# -- nothing half-made -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk")])
@pytest.mark.parametrize("empty_folder", [False, True])
def test_an_interrupted_bake_leaves_nothing(
    tiny_checkpoints: TinyCheckpoints,
    tmp_path: Path,
    error: BaseException | type[BaseException],
    *,
    empty_folder: bool,
) -> None:
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if empty_folder:
        out.mkdir()
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total // 2:
            raise error

    source = tiny_checkpoints.per_expert_sharded
    orders = random_orders(open_source(source).spec, 1)
    with pytest.raises((KeyboardInterrupt, OSError)):
        baked(source, orders, out, progress=stop)
    assert len(seen) > 5
    assert list(out.parent.iterdir()) == ([out] if empty_folder else [])
    assert not (empty_folder and list(out.iterdir()))
    done = baked(source, orders, out, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (done.nbytes, done.nbytes)
    assert list(out.parent.iterdir()) == [out]


def test_a_failed_check_keeps_nothing(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        baked(
            tiny_checkpoints.fused,
            [list(range(EXPERTS))] * LAYERS,
            tmp_path / "out",
            check=refuse,
        )
    assert not list(tmp_path.iterdir())


def test_copying_holds_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bake_copy, "CHUNK", 1 << 16)
    size = 6 << 20
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    (tmp_path / "a").write_bytes(source.tobytes())
    half = size // 2
    patches = [Patch(half, half, 0, 0), Patch(0, half, 0, half)]
    tracemalloc.start()
    try:
        write_patched([str(tmp_path / "a")], 0, patches, tmp_path / "b", lambda count: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 16
    assert (tmp_path / "b").read_bytes() == np.roll(source, half).tobytes()


def test_many_shards_are_read_with_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bake_copy, "_OPEN_FILES", 2)
    paths = [tmp_path / f"{number}" for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 9)
    patches = [Patch(at, 1, at, 8 - at) for at in range(9)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    opened: Counter[int] = Counter()

    def advance(count: int) -> None:
        if before:
            opened[len(os.listdir("/proc/self/fd")) - before] += 1

    write_patched([str(path) for path in paths], 4, patches, tmp_path / "out", advance)
    assert (tmp_path / "out").read_bytes() == bytes(range(9))
    assert not opened or max(opened) <= 3  # two to read, one to write


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8))
    with pytest.raises(CheckpointError, match="overlap"):
        write_patched(
            [str(tmp_path / "a")],
            0,
            [Patch(0, 4, 0, 4), Patch(2, 4, 0, 0)],
            tmp_path / "b",
            lambda count: None,
        )


# -- what is refused -------------------------------------------------------------------------------


def _other_model(plan: Plan) -> Plan:
    return replace(plan, fingerprint="0" * 16, model_id="other/model")


def _other_layers(plan: Plan) -> Plan:
    last = replace(plan.layers[-1], layer=7)
    return replace(plan, fingerprint="", layers=(*plan.layers[:-1], last))


def _fewer_experts(plan: Plan) -> Plan:
    last = replace(plan.layers[1], hosts=plan.layers[1].hosts[:8], tiers=())
    return replace(plan, fingerprint="", layers=(plan.layers[0], last, *plan.layers[2:]))


def _replicas(plan: Plan) -> Plan:
    hosts = ((0, 1), *plan.layers[2].hosts[1:])
    last = replace(plan.layers[2], hosts=hosts)
    return replace(plan, layers=(*plan.layers[:2], last, plan.layers[3]))


def _unequal(plan: Plan) -> Plan:
    last = replace(plan.layers[2], hosts=((0,),) * EXPERTS)
    return replace(plan, layers=(*plan.layers[:2], last, plan.layers[3]))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (_other_model, "other/model with fingerprint 0000"),
        (_other_layers, "lacks layer 3"),
        (_fewer_experts, "layer 1: the plan places 8 experts"),
        (_replicas, "layer 2 has replicas"),
        (_unequal, "layer 2: devices hold"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, change: Callable[[Plan], Plan], hint: str
) -> None:
    source = open_source(tiny_checkpoints.fused)
    plan = change(plan_of(source.spec, random_orders(source.spec, 1), devices=4))
    with pytest.raises(PlanError, match=hint):
        bake(source, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_refused(
    writable_checkpoints: TinyCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = writable_checkpoints.fused
    orders = [list(range(EXPERTS))] * LAYERS
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(ConfigError, match="exists"):
            baked(source, orders, taken)
    assert (tmp_path / "folder" / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="inside the checkpoint"):
        baked(source, orders, source / "baked")
    full = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(bake_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigError, match="0 B are free"):
        baked(source, orders, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "hint"),
    [
        (lambda t: t.pop(GATE), CheckpointError, f"no tensor for {GATE}"),
        (lambda t: t.update({GATE: torch.zeros(8, 32)}), CheckpointError, r"has shape \(8, 32\)"),
        (lambda t: t.update({EXPERT: t[EXPERT].half()}), CheckpointError, "different ways"),
        (
            lambda t: t.update({f"{EXPERT}_scale": torch.ones(1)}),
            UnsupportedModelError,
            "up_proj.weight_scale .* lies among the experts of layer 1",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.gate.bias": torch.ones(EXPERTS)}),
            UnsupportedModelError,
            "gate.bias .* lies among",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    writable_checkpoints: TinyCheckpoints,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    error: type[Exception],
    hint: str,
) -> None:
    source = writable_checkpoints.per_expert
    rewrite(source, change)
    with pytest.raises(error, match=hint):
        baked(source, [list(range(EXPERTS))[::-1]] * LAYERS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unused_tensors_elsewhere_are_copied(
    writable_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    """Layers for speculation that transformers leaves out keep their own order."""
    source = writable_checkpoints.per_expert
    extra = {"model.layers.4.mlp.experts.0.up_proj.weight": torch.ones(2, 3)}
    rewrite(source, lambda found: found.update(extra))
    orders = random_orders(open_source(source).spec, 4)
    baked(source, orders, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())


def test_a_truncated_shard_is_refused(
    writable_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    source = writable_checkpoints.per_expert_sharded
    shard = expert_shard(source)
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        open_source(source)


def test_quantised_checkpoints_are_refused(writable_checkpoints: TinyCheckpoints) -> None:
    path = writable_checkpoints.fused / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="fp8"):
        open_source(writable_checkpoints.fused)
