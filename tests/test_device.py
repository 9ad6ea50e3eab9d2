"""The order of copies and compute on a device where both are asynchronous, and the host tier.

Does not need a GPU: `later_device` is late and strict in its place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology
from transformers import PreTrainedModel

import later_device
import moe_runtime
from later_device import LaterDevice
from moe_runtime import store
from moe_runtime.device import CpuDevice, CudaDevice, open_device
from moe_runtime.errors import ConfigError, ExpertReadError
from moe_runtime.interface import HANDLE
from moe_runtime.model_spec import ExpertParam, MoELayer, MoESpec
from moe_runtime.store import HostTier
from tiny import EXPERT_BYTES, EXPERTS, HIDDEN, LAYERS, TOP_K, VOCAB, TinyCheckpoints, tiny_model

NEW = 6  # tokens added to each prompt


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LaterDevice:
    return later_device.install(monkeypatch)


def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the first padded on the left."""
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def prompts() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, VOCAB, (1, 20), generator=torch.Generator().manual_seed(6))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}, batch()]


def logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of prefill and of every decoded token, with the tokens themselves fixed by plain greed."""
    found = []
    for inputs in prompts():
        result = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found += [*result.logits, result.sequences]
    return found


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    return logits(tiny_model())


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def load(path: Path, **options: Any) -> PreTrainedModel:
    model = moe_runtime.from_pretrained(path, device="cuda", **options)
    assert isinstance(model, PreTrainedModel)
    return model


# The least host tier has as many slots as the device: memory is used again as soon as it can be.
@pytest.mark.parametrize("host_budget", ["20%", "45%", "100%"])
@pytest.mark.parametrize("threads", [1, 3])
def test_disk_to_host_to_device_in_order(
    tiny_checkpoints: TinyCheckpoints,
    device: LaterDevice,
    expected: list[torch.Tensor],
    host_budget: str,
    threads: int,
) -> None:
    model = load(
        tiny_checkpoints.per_expert,
        expert_budget="20%",
        host_budget=host_budget,
        reader_threads=threads,
    )
    assert_close(logits(model), expected)
    assert device.faults == []
    counters = moe_runtime.report(model).counters
    assert counters.evictions > 0
    assert counters.rereads > 0
    assert counters.bytes_read > 0
    if host_budget != "20%":
        assert counters.host_bytes > 0
    if host_budget == "100%":  # each expert is read from disk once, in three aligned pieces
        once = LAYERS * EXPERTS * (EXPERT_BYTES + 3 * 2 * 4096)
        assert counters.bytes_read <= once
    moe_runtime.runtime_of(model).check_integrity()


@pytest.mark.parametrize("budget", ["20%", "60%", "100%"])
def test_parameters_are_the_host_tier_of_an_attached_model(
    device: LaterDevice, expected: list[torch.Tensor], budget: str
) -> None:
    model = moe_runtime.attach(tiny_model(), expert_budget=budget, device="cuda")
    assert_close(logits(model), expected)
    assert device.faults == []
    counters = moe_runtime.report(model).counters
    assert counters.bytes_read == 0
    assert counters.host_bytes > 0
    moe_runtime.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(logits(model), expected, strict=True))


@pytest.mark.parametrize("exact", [False, True])
def test_bits_do_not_depend_on_what_is_resident(
    tiny_checkpoints: TinyCheckpoints,
    device: LaterDevice,
    expected: list[torch.Tensor],
    exact: bool,
) -> None:
    found = [
        logits(load(tiny_checkpoints.fused, expert_budget=budget, exact=exact, policy=policy))
        for budget, policy in [("100%", "lru"), ("50%", "lfu"), ("15%", "lru")]
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    assert_close(found[0], expected)
    assert device.faults == []


@pytest.mark.parametrize("wholly", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_bits_do_not_depend_on_what_a_plan_keeps(
    tiny_checkpoints: TinyCheckpoints,
    device: LaterDevice,
    expected: list[torch.Tensor],
    exact: bool,
    wholly: bool,
) -> None:
    """Some experts of two layers, or all of layer 1, which then runs without the host."""
    kept = {1: set(range(EXPERTS))} if wholly else {0: {1, 2, 9}, 3: {0, 15}}
    plan = Plan(
        topology=Topology.of(1),
        layers=tuple(
            LayerPlan(
                layer=layer,
                hosts=((0,),) * EXPERTS,
                tiers=tuple(
                    "device" if expert in kept.get(layer, ()) else "host"
                    for expert in range(EXPERTS)
                ),
            )
            for layer in range(LAYERS)
        ),
    )
    path = tiny_checkpoints.fused
    model = load(path, expert_budget="50%", exact=exact, plan=plan)
    runtime = moe_runtime.runtime_of(model)
    found = logits(model)
    plain = logits(load(path, expert_budget="100%", exact=exact))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert_close(found, expected)
    assert device.faults == []
    runtime.check_integrity()
    for layer, experts in kept.items():
        assert all(runtime.cache.is_resident(layer, expert) for expert in experts)
    assert runtime.cache.counters.evictions > 0


def test_the_device_itself_is_strict(device: LaterDevice) -> None:
    """What the other tests rely on: doing it wrong is noticed."""
    slot, other, source = torch.zeros(4), torch.zeros(4), torch.ones(4)
    token = device.copy([(slot, source)], device.fence())
    assert slot.isnan().all()
    device.compute(torch.tensor([0]), [slot.unsqueeze(0)])
    assert device.faults.pop() == "slot 0 is used before its copy was waited for"
    device.wait(token)
    assert torch.equal(slot, source)
    device.write([source])
    assert "host memory is written" in device.faults.pop()
    device.finish(token)
    device.write([source])
    assert device.faults == []
    early = device.fence()
    device.compute(torch.tensor([0]), [slot.unsqueeze(0)])
    device.copy([(slot, other)], early)
    assert "is overwritten" in device.faults.pop()


def test_a_fault_in_the_middle_leaves_the_device_in_order(
    tiny_checkpoints: TinyCheckpoints,
    device: LaterDevice,
    expected: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(tiny_checkpoints.per_expert, expert_budget="20%", host_budget="25%")
    plain = store.read_range
    for number in (1, 5, 23, 40):
        count = 0

        def read(fd: int, buffer: Any, offset: int, number: int = number) -> int:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return plain(fd, buffer, offset)

        monkeypatch.setattr(store, "read_range", read)
        with pytest.raises(ExpertReadError):
            logits(model)
        monkeypatch.setattr(store, "read_range", plain)
        moe_runtime.runtime_of(model).check_integrity()
    assert_close(logits(model), expected)
    assert device.faults == []


# -- no synchronisation where everything is resident ---------------------------------------------


class _Meta(CpuDevice):
    """A device whose numbers cannot be read on the host at all."""

    is_cpu = False

    def __init__(self) -> None:
        self.torch_device = torch.device("meta")

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_resident_layer_never_asks_the_device(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr("moe_runtime.lifecycle.open_device", lambda name: _Meta())
    monkeypatch.setattr("moe_runtime.lifecycle.move_dense", lambda *_: None)
    # grouped_mm has no meta kernel for float32.
    model = moe_runtime.attach(tiny_model().bfloat16(), expert_budget="100%", device="cuda")
    module = model.get_submodule("model.layers.2.mlp.experts")
    handle = module.__dict__[HANDLE]
    routing = (
        torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="meta"),
        torch.empty(tokens, TOP_K, dtype=torch.int64, device="meta"),
        torch.empty(tokens, TOP_K, dtype=torch.bfloat16, device="meta"),
    )
    output = handle.executor.forward(handle, module, *routing)
    assert output.shape == (tokens, HIDDEN)
    assert output.device.type == "meta"
    # One expert less, and the routing has to be known: the meta device cannot tell it.
    cache = moe_runtime.runtime_of(model).cache
    cache._slot_of[2 * EXPERTS + 3] = -1
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        handle.executor.forward(handle, module, *routing)


def test_a_resident_layer_waits_for_nothing(
    tiny_checkpoints: TinyCheckpoints, device: LaterDevice, expected: list[torch.Tensor]
) -> None:
    model = load(tiny_checkpoints.per_expert, expert_budget="100%")
    waits, copies = device.waits, len(device.copies)
    inputs = prompts()[0]
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    assert torch.equal(found, expected[NEW])
    assert device.waits == waits
    assert len(device.copies) == copies
    assert device.time >= NEW * LAYERS  # and yet it was the device that computed


def test_sentinels_of_expert_parallelism_add_nothing(
    tiny_checkpoints: TinyCheckpoints, device: LaterDevice
) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, HIDDEN, generator=generator)
    index = torch.randint(0, EXPERTS, (6, TOP_K), generator=generator)
    weights = torch.rand(6, TOP_K, generator=generator)
    elsewhere = torch.rand(6, TOP_K, generator=generator) < 0.4
    outputs = []
    for budget in ("100%", "20%"):
        model = load(tiny_checkpoints.per_expert, expert_budget=budget)
        experts = model.get_submodule("model.layers.1.mlp.experts")
        with torch.no_grad():
            outputs.append(experts(hidden, index.masked_fill(elsewhere, EXPERTS), weights))
            outputs.append(experts(hidden, index, weights.masked_fill(elsewhere, 0.0)))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert device.faults == []


# -- the host tier -------------------------------------------------------------------------------


def two_shapes() -> MoESpec:
    """Two layers of one expert shape, one of another."""

    def layer(number: int, width: int) -> MoELayer:
        param = ExpertParam(name="up_proj", shape=(width, 4), dtype=torch.float32)
        return MoELayer(
            layer=number,
            path=f"layers.{number}",
            class_name="Experts",
            num_experts=8,
            top_k=2,
            params=(param,),
        )

    layers = (layer(0, 3), layer(1, 3), layer(2, 5))
    return MoESpec(model_class="Model", model_id="", layers=layers, dense_bytes=0)


@pytest.fixture
def finished() -> list[Any]:
    """Tokens that the host tier has waited for."""
    return []


@pytest.fixture
def tier(finished: list[Any]) -> HostTier:
    """Three slots of the first shape, two of the second."""
    return HostTier(two_shapes(), (3, 2), CpuDevice().allocate, finished.append)


def hold(tier: HostTier, position: int, expert: int, value: float) -> int:
    """Read an expert in; its address."""
    (memory,) = tier.claim(position, expert, set()) or ()
    memory.fill_(value)
    tier.settle(position, expert, good=True)
    return memory.data_ptr()


def test_the_least_recently_used_leaves(tier: HostTier) -> None:
    for expert in range(3):
        hold(tier, expert % 2, expert, float(expert))
    assert tier.lookup(0, 0) is not None  # the oldest is used again
    hold(tier, 1, 7, 7.0)
    assert tier.lookup(1, 1) is None
    for position, expert in [(0, 0), (0, 2), (1, 7)]:
        (memory,) = tier.lookup(position, expert) or ()
        assert (memory == expert).all()


def test_what_is_being_written_is_neither_handed_out_nor_taken(tier: HostTier) -> None:
    claimed = [tier.claim(0, expert, set()) for expert in range(3)]
    addresses = {memory[0].data_ptr() for memory in claimed if memory}
    assert len(addresses) == 3
    assert tier.lookup(0, 1) is None
    assert tier.claim(1, 5, set()) is None
    tier.settle(0, 1, good=True)
    assert tier.lookup(0, 1) is not None
    assert tier.claim(1, 5, {(0, 1)}) is None
    assert tier.claim(1, 5, set()) is not None
    assert tier.lookup(0, 1) is None


def test_a_bad_read_gives_the_memory_back(tier: HostTier) -> None:
    claimed = tier.claim(0, 4, set())
    tier.settle(0, 4, good=False)
    assert tier.lookup(0, 4) is None
    again = tier.claim(0, 6, set())
    assert claimed is not None
    assert again is not None
    assert again[0].data_ptr() == claimed[0].data_ptr()
    tier.settle(0, 5, good=False)  # nothing was claimed for it: no memory appears
    for expert in (1, 2):
        assert tier.claim(0, expert, set()) is not None
    assert tier.claim(0, 3, set()) is None


def test_shapes_have_memory_of_their_own(tier: HostTier) -> None:
    for expert in range(3):
        hold(tier, 0, expert, 0.0)
    (memory,) = tier.claim(2, 0, set()) or ()
    assert memory.shape == (5, 4)
    tier.settle(2, 0, good=True)
    assert all(tier.lookup(0, expert) is not None for expert in range(3))


def test_memory_is_used_again_only_after_the_copies_out_of_it(
    tier: HostTier, finished: list[Any]
) -> None:
    for expert in range(3):
        hold(tier, 0, expert, 0.0)
        tier.lease(0, expert, f"copy of {expert}")
    assert finished == []
    hold(tier, 1, 0, 0.0)
    assert finished == ["copy of 0"]
    hold(tier, 1, 1, 0.0)
    assert finished == ["copy of 0", "copy of 1"]


# -- names ---------------------------------------------------------------------------------------


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_device("cpu"), CpuDevice)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device("auto"), CpuDevice)
    opens: list[Callable[[], Any]] = [
        lambda: open_device("cuda"),
        lambda: CudaDevice("cuda:0"),
        lambda: open_device("meta"),
        lambda: open_device("abacus"),
    ]
    for attempt in opens:
        with pytest.raises(ConfigError, match="device="):
            attempt()


def test_memory_of_the_cpu_is_page_aligned_and_goes_back() -> None:
    for nbytes in (0, 1, 5000, 64 << 20):
        memory = CpuDevice().allocate(nbytes)
        assert memory.dtype == torch.uint8
        assert memory.numel() == max(nbytes, 1)
        assert memory.data_ptr() % 4096 == 0
