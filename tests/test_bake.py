"""Baking: the bytes that move, what stays, what is refused, and that nothing half-made is left.

The sweep over architectures is in `test_bake_architectures`, the command in `test_bake_command`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.bake import bake
from moe_runtime.placement.bake_check import check_in_budget, check_plain
from moe_runtime.placement.bake_record import RECORD_FILE, BakeRecord
from moe_runtime.placement.bake_source import open_source
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_runtime
from baking import GATE, baked, plan_of, random_orders, rewrite
from moe_runtime.errors import CheckpointError, PlanError
from tiny import EXPERTS, FORMS, LAYERS, TinyCheckpoints, tiny_model

Orders = list[list[int]]


def inverse(orders: Orders) -> Orders:
    return [np.argsort(order).tolist() for order in orders]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, as the bytes that it is."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: t.contiguous().view(torch.uint8) for name, t in load_file(path).items()}
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected_tensors(source: Path, orders: Orders) -> dict[str, torch.Tensor]:
    """What a baked Qwen3-MoE must have, by plain indexing of what the source has."""
    before = tensors(source)
    after = dict(before)
    for layer, order in enumerate(orders):
        block = f"model.layers.{layer}.mlp."
        for name in [name for name in before if name.startswith(block)]:
            rest = name.removeprefix(block)
            if rest == "gate.weight" or rest in {"experts.gate_up_proj", "experts.down_proj"}:
                after[name] = before[name][order]
                continue
            _, place, projection = rest.split(".", 2)
            after[name] = before[f"{block}experts.{order[int(place)]}.{projection}"]
    return after


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


permutations = st.lists(st.permutations(range(EXPERTS)), min_size=LAYERS, max_size=LAYERS)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(orders=permutations)
def test_every_byte_is_where_it_belongs_and_comes_back(
    tiny_checkpoints: TinyCheckpoints,
    tmp_path_factory: pytest.TempPathFactory,
    form: str,
    orders: Orders,
) -> None:
    source, place = tiny_checkpoints.form(form), tmp_path_factory.mktemp("baked")
    baked(source, orders, place / "once")
    assert_same(tensors(place / "once"), expected_tensors(source, orders))
    baked(place / "once", inverse(orders), place / "twice")
    back = files(place / "twice")
    assert back.pop(RECORD_FILE)
    assert back == files(source)  # shards, headers, index, configuration: to the byte


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["per_expert", "fused"])
def test_every_dtype_is_copied_as_it_is(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path / "source", save_original_format=form == "per_expert")
    orders = random_orders(open_source(tmp_path / "source").spec, 5)
    baked(tmp_path / "source", orders, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), expected_tensors(tmp_path / "source", orders))


@pytest.mark.parametrize("form", FORMS)
def test_contiguous_blocks_are_the_plans_devices(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, form: str
) -> None:
    source = open_source(tiny_checkpoints.form(form))
    plan = plan_of(source.spec, random_orders(source.spec, 1), devices=4)
    bake(source, plan, tmp_path / "out")
    before = Qwen3MoeForCausalLM.from_pretrained(source.folder)
    after = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
    for position in range(LAYERS):
        path = f"model.layers.{position}.mlp.experts.gate_up_proj"
        blocks = after.get_parameter(path).chunk(plan.devices)
        for block, experts in zip(blocks, plan.device_experts(position), strict=True):
            assert torch.equal(block, before.get_parameter(path)[experts])


def test_plain_transformers_generates_the_same_tokens(
    tiny_checkpoints: TinyCheckpoints,
    tmp_path: Path,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
) -> None:
    source = tiny_checkpoints.per_expert_sharded
    baked(source, random_orders(open_source(source).spec, 2), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", experts_implementation="eager"
    ).eval()
    assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False), eager_tokens)


def test_the_runtime_runs_what_was_baked(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, prompt: torch.Tensor
) -> None:
    source = tiny_checkpoints.fused_sharded
    orders = random_orders(open_source(source).spec, 3)
    baked(source, orders, tmp_path / "out")
    logits, chosen = [], []
    for folder in (source, tmp_path / "out"):
        model = moe_runtime.from_pretrained(folder, expert_budget="50%", device="cpu")
        with moe_runtime.record(model) as recorder, torch.no_grad():
            logits.append(model(prompt).logits)
        chosen.append(recorder.trace.topk_ids.astype(int))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    # A trace of the baked model is that of the original in the new numbers, and the record says so.
    record = BakeRecord.load(tmp_path / "out")
    assert record is not None
    for position, layer in enumerate(record.layer_ids):
        back = record.originals(layer)[chosen[1][:, position]]
        assert np.array_equal(np.sort(back), np.sort(chosen[0][:, position]))
        assert np.array_equal(record.places(layer)[back], chosen[1][:, position])


def test_equal_sizes_mislead_nobody(tmp_path: Path) -> None:
    """As many experts as hidden units, units of an expert and tokens of the vocabulary."""
    config = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    orders = random_orders(open_source(tmp_path / "source").spec, 7)
    baked(tmp_path / "source", orders, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), expected_tensors(tmp_path / "source", orders))


# -- what lies beside the weights ------------------------------------------------------------------


def test_other_files_are_copied_and_other_weights_are_not(
    writable_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    source = writable_checkpoints.per_expert_sharded
    (source / "tokenizer.json").write_text("{}")
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("kept")
    (source / ".cache").mkdir()
    (source / ".cache" / "hidden").write_text("not kept")
    for name in ("pytorch_model.bin", "extra/consolidated.00.pth", "other.safetensors"):
        (source / name).write_bytes(b"weights in the old order")
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    done = baked(source, [list(range(EXPERTS))[::-1]] * LAYERS, tmp_path / "out")
    assert (tmp_path / "out" / "extra" / "notes.txt").read_text() == "kept"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "out" / ".cache").exists()
    assert set(done.left_behind) == {
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "extra/consolidated.00.pth",
        "other.safetensors",
    }
    assert not any((tmp_path / "out" / name).exists() for name in done.left_behind)
    assert done.nbytes == sum(
        path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name != RECORD_FILE
    )


def test_a_checkpoint_of_links_is_copied_whole(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    """As the hub's cache is: links to files that are named by their contents."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in tiny_checkpoints.fused_sharded.iterdir():
        (snapshot / path.name).symlink_to(path)
    orders = random_orders(open_source(snapshot).spec, 1)
    baked(snapshot, orders, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_same(tensors(tmp_path / "out"), expected_tensors(snapshot, orders))


def test_a_checkpoint_on_the_hub(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    """Offline, in the cache's own layout: with what else the repository's snapshot has."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--someone--tiny-moe"
    shutil.copytree(tiny_checkpoints.per_expert_sharded, folder / "snapshots" / commit)
    (folder / "snapshots" / commit / "tokenizer.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    source = open_source("someone/tiny-moe", **options)
    orders = random_orders(source.spec, 1)
    done = bake(source, plan_of(source.spec, orders), tmp_path / "out")
    assert done.record.model_id == "someone/tiny-moe"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    expected = expected_tensors(tiny_checkpoints.per_expert_sharded, orders)
    assert_same(tensors(tmp_path / "out"), expected)


def test_a_subfolder_and_a_variant(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    inner = tmp_path / "model" / "inner"
    shutil.copytree(tiny_checkpoints.fused, inner)
    (inner / "model.safetensors").rename(inner / "model.half.safetensors")
    source = open_source(inner.parent, subfolder="inner", variant="half")
    bake(source, plan_of(source.spec, random_orders(source.spec, 1)), tmp_path / "out")
    assert (tmp_path / "out" / "model.half.safetensors").is_file()
    assert check_plain(source, tmp_path / "out", torch.float32).difference < 1e-5


def test_the_record_composes(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    source = tiny_checkpoints.fused
    spec = open_source(source).spec
    first, second = random_orders(spec, 1), random_orders(spec, 2)
    baked(source, first, tmp_path / "one")
    done = baked(tmp_path / "one", second, tmp_path / "two")
    assert done.record == BakeRecord.load(tmp_path / "two")
    assert done.record.model_id == str(source)
    assert done.record.fingerprint == spec.fingerprint
    assert [entry["plan"]["devices"] for entry in done.record.bakes] == [EXPERTS, EXPERTS]
    composed = [done.record.originals(layer).tolist() for layer in done.record.layer_ids]
    assert composed == [[a[i] for i in b] for a, b in zip(first, second, strict=True)]
    assert_same(tensors(tmp_path / "two"), expected_tensors(source, composed))
    with pytest.raises(PlanError, match="no layer 9"):
        done.record.originals(9)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"permutation": [', '"permutation": [0, '),
        lambda text: text.replace('"layers"', '"lairs"'),
        lambda text: text.replace('"layer": 3', '"layer": 5'),
        lambda text: "[]",
    ],
)
def test_a_damaged_record_is_refused(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    orders = [list(range(EXPERTS))] * LAYERS
    baked(tiny_checkpoints.fused, orders, tmp_path / "one")
    path = tmp_path / "one" / RECORD_FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=RECORD_FILE):
        baked(tmp_path / "one", orders, tmp_path / "two")
    assert not (tmp_path / "two").exists()


# -- the check -----------------------------------------------------------------------------------


def test_the_check_sees_equality_and_difference(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    source = open_source(tiny_checkpoints.fused)
    plan = plan_of(source.spec, random_orders(source.spec, 1))
    bake(source, plan, tmp_path / "out")
    good = check_plain(source, tmp_path / "out", torch.float32)
    assert good.difference < 1e-5
    assert good.same_choice == 1.0
    assert 0 < good.yardstick_difference < 1e-4
    good.require()

    def forget(found: dict[str, torch.Tensor]) -> None:
        original = load_file(source.folder / "model.safetensors")
        found[GATE] = original[GATE]

    rewrite(tmp_path / "out", forget)
    bad = check_plain(source, tmp_path / "out", torch.float32)
    assert bad.difference > 1e-2
    with pytest.raises(CheckpointError, match="something else"):
        bad.require()
    with pytest.raises(CheckpointError, match="something else"):
        replace(good, median_difference=float("nan")).require()


def test_the_check_in_a_budget(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    source = open_source(tiny_checkpoints.per_expert)
    bake(source, plan_of(source.spec, random_orders(source.spec, 1)), tmp_path / "out")

    def load(path: str, exact: bool) -> Any:
        return moe_runtime.from_pretrained(path, expert_budget="30%", device="cpu", exact=exact)

    found = check_in_budget(source, tmp_path / "out", load)
    assert found.difference < 1e-5
    assert found.tokens == 64
    found.require()
