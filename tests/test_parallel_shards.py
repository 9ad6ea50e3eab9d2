"""A rank's share of a checkpoint: its own experts, bit for bit, and no others' bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime import store
from moe_runtime.errors import PlanError
from moe_runtime.paged import PagedParameter
from moe_runtime.parallel.shards import Shard, experts_of, open_source, shard_of
from tiny import ALL_EXPERT_BYTES, EXPERT_BYTES, EXPERTS, FORMS, LAYERS, TinyCheckpoints, tiny_model

OWNED = {0: (0, 3), 1: (15,), 2: (), 3: tuple(range(8))}


def assert_same_experts(shard: Shard, whole: Any, owned: dict[int, tuple[int, ...]]) -> None:
    for layer in shard.spec.layers:
        tensors = shard.tensors[layer.layer]
        for param in layer.params:
            want = whole.get_parameter(f"{layer.path}.{param.name}").data
            chosen = want[list(owned[layer.layer])].to(param.dtype)
            assert tensors[param.name].dtype == param.dtype
            assert torch.equal(tensors[param.name], chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_experts_are_those_of_the_whole_model(
    tiny_checkpoints: TinyCheckpoints, form: str, dtype: torch.dtype
) -> None:
    path = tiny_checkpoints.form(form)
    shard = open_source(path, dtype=dtype).load(OWNED)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    assert_same_experts(shard, whole, OWNED)
    dense = {k: v for k, v in whole.state_dict().items() if ".experts." not in k}
    held = {k: v for k, v in shard.model.named_parameters() if not isinstance(v, PagedParameter)}
    for name, tensor in held.items():
        assert torch.equal(tensor, dense[name])
    assert set(held) == {name for name, _ in whole.named_parameters() if ".experts." not in name}


def test_slots_are_named_by_layer_and_expert(tiny_checkpoints: TinyCheckpoints) -> None:
    shard = open_source(tiny_checkpoints.fused).load(OWNED)
    assert shard.slot_of(0, 3) == 1
    assert shard.slot_of(1, 3) is None
    assert [shard.pool(layer).count for layer in OWNED] == [2, 1, 0, 8]
    up = shard.pool(0).tensors(1)[0]
    assert torch.equal(up, shard.tensors[0]["gate_up_proj"][1])
    assert shard.expert_bytes == 11 * EXPERT_BYTES


@pytest.mark.parametrize("form", FORMS)
def test_no_rank_reads_more_than_its_experts_and_the_blocks_they_lie_in(
    tiny_checkpoints: TinyCheckpoints, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    plain = store.read_range

    def counted(fd: int, buffer: memoryview, offset: int) -> int:
        nonlocal read
        got = plain(fd, buffer, offset)
        read += got
        return got

    monkeypatch.setattr(store, "read_range", counted)
    shard = open_source(tiny_checkpoints.form(form)).load(OWNED)
    pieces = 3 if form.startswith("per_expert") else 2
    least = 11 * EXPERT_BYTES
    assert read == shard.bytes_read
    assert least <= read <= least + 11 * pieces * 2 * 4096
    held = sum(p.numel() * p.itemsize for layer in shard.tensors.values() for p in layer.values())
    assert held == least < ALL_EXPERT_BYTES


def test_the_bundled_models_ranks_hold_it_together() -> None:
    path = moe_runtime.bundled_model()
    whole = AutoModelForCausalLM.from_pretrained(path)
    source = open_source(path)
    halves = [
        {layer.layer: tuple(range(rank, layer.num_experts, 2)) for layer in source.spec.layers}
        for rank in range(2)
    ]
    shards = [source.load(half) for half in halves]
    for shard, half in zip(shards, halves, strict=True):
        assert_same_experts(shard, whole, half)
    assert sum(shard.expert_bytes for shard in shards) == source.spec.total_expert_bytes


def test_a_model_in_memory_is_shared_out_alike(tiny_checkpoints: TinyCheckpoints) -> None:
    model = tiny_model()
    mine, loaded = shard_of(model, OWNED), open_source(tiny_checkpoints.fused).load(OWNED)
    assert mine.bytes_read == 0
    assert_same_experts(mine, model, OWNED)
    for layer in OWNED:
        for name, tensor in mine.tensors[layer].items():
            assert torch.equal(tensor, loaded.tensors[layer][name])


def plan_of(hosts: list[tuple[int, ...]], devices: int) -> Plan:
    layers = tuple(LayerPlan(layer=layer, hosts=tuple(hosts)) for layer in range(LAYERS))
    return Plan(topology=Topology.of(devices), layers=layers)


@given(hosts=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=EXPERTS, max_size=EXPERTS))
def test_every_expert_is_where_the_plan_says(hosts: list[set[int]]) -> None:
    plan = plan_of([tuple(sorted(one)) for one in hosts], 4)
    by_rank = [experts_of(plan, rank) for rank in range(4)]
    for expert, devices in enumerate(hosts):
        for layer in range(LAYERS):
            assert {rank for rank in range(4) if expert in by_rank[rank][layer]} == devices


def test_a_rank_without_a_device_is_told_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"rank 2 .* which has 2 .* start 2 ranks"):
        experts_of(plan_of([(0,)] * EXPERTS, 2), 2)
