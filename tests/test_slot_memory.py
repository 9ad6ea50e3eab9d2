"""Memory that runs out while slots are allocated: fewer slots, said once, or an error with numbers.

Does not need a GPU: a fake device refuses, and once the operating system does.
"""

from __future__ import annotations

import errno
import logging
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import later_device
import moe_runtime
from later_device import LaterDevice
from limited_device import LimitedDevice
from moe_runtime.budget import BudgetPlan, least_slots, plan_budget, working_room
from moe_runtime.device import CpuDevice, Device
from moe_runtime.errors import BudgetError
from moe_runtime.memory import refusal
from moe_runtime.model_spec import ExpertParam, MoELayer, MoESpec
from moe_runtime.report import Report
from moe_runtime.slot_memory import allocate_host_tier, allocate_pools
from moe_runtime.slots import SlotPool, slot_bytes
from outputs import load, outputs, same_bits
from running import SMALL
from tiny import ALL_EXPERT_BYTES, EXPERTS, LAYERS, TOP_K, TinyCheckpoints, tiny_config, tiny_model

ROOM = 1000


def layer(at: int, width: int, experts: int) -> MoELayer:
    params = tuple(
        ExpertParam(name=name, shape=shape, dtype=torch.float32)
        for name, shape in (("gate_up_proj", (2 * width, 16)), ("down_proj", (16, width)))
    )
    return MoELayer(
        layer=at,
        path=f"layers.{at}",
        class_name="Tiny",
        num_experts=experts,
        top_k=2,
        params=params,
        transposed=False,
    )


def spec(*widths: int, experts: int = 24) -> MoESpec:
    """One layer for each width; equal widths share a pool."""
    layers = tuple(layer(at, width, experts) for at, width in enumerate(widths))
    return MoESpec(model_id="tiny", model_class="Tiny", layers=layers, dense_bytes=0)


ONE, SEVERAL = spec(8, 8, 8), spec(8, 24, 8)


def planned(of: MoESpec, total: int) -> BudgetPlan:
    return plan_budget(of, total, "as asked", threads=1, floor=0, disk=False)


def allocated(
    of: MoESpec, plan: BudgetPlan, device: Device, room: int = ROOM
) -> tuple[list[SlotPool], BudgetPlan]:
    rows = [None] * len(of.groups)
    return allocate_pools(of, plan, device, rows=rows, least=least_slots(of, ()), room=room)


def held(pools: list[SlotPool]) -> int:
    return sum(t.untyped_storage().nbytes() for pool in pools for t in pool.stacked)


def refused(call: Callable[[], object]) -> str:
    """What the error says. It is gone afterwards, with all that its frames hold."""
    try:
        call()
    except BudgetError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@settings(max_examples=60)
@given(
    of=st.sampled_from([ONE, SEVERAL]),
    share=st.floats(0.2, 1.2),
    limit=st.integers(0, 200_000),
    error=st.sampled_from([torch.OutOfMemoryError, MemoryError]),
)
def test_as_many_slots_as_there_is_memory_for(
    of: MoESpec, share: float, limit: int, error: type[Exception]
) -> None:
    plan = planned(of, int(share * of.total_expert_bytes))
    least = least_slots(of, ())
    sizes = [slot_bytes(group) for group in of.groups]
    smallest = sum(size * count for size, count in zip(sizes, least, strict=True))
    device = LimitedDevice(limit, error)
    if smallest > limit:
        text = refused(lambda: allocated(of, plan, device))
        assert device.held == 0
        assert f"{sum(plan.slots)} expert slots were refused" in text
        assert f"{sum(least)} slots of" in text
        assert "Free memory" in text
        return
    pools, got = allocated(of, plan, device)
    assert [pool.count for pool in pools] == list(got.slots)
    assert device.held == held(pools) == got.pools <= limit
    assert device.most <= limit
    assert all(a <= b <= c for a, b, c in zip(least, got.slots, plan.slots, strict=True))
    if plan.pools <= limit:
        assert got == plan
        assert device.refused == 0
        return
    assert got.shrunk is not None
    assert got.shrunk.asked == plan.slots
    assert got.shrunk.nbytes == plan.pools
    # What is left beside the room is less than what halving does not look into.
    step = (plan.pools - smallest) / 64 + sum(sizes)
    assert got.pools + ROOM + step >= limit or got.slots == tuple(least)
    if got.pools + ROOM <= limit:
        assert f"{ROOM} B left free" in got.explanation
    else:
        assert "nothing left free" in got.explanation
        assert got.slots == tuple(least)
    del pools
    assert device.held == 0


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    plan = planned(ONE, ONE.total_expert_bytes)
    _, got = allocated(ONE, plan, LimitedDevice(plan.pools // 2))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "out of memory on cpu" in record.getMessage()
    assert f"{sum(got.slots)} slots" in record.getMessage()
    assert f"instead of {sum(plan.slots)}" in record.getMessage()
    assert "CUDA out of memory. Tried to allocate" in record.getMessage()
    assert record.getMessage() in got.explanation


def test_an_error_of_another_kind_is_not_taken_for_it() -> None:
    for error in (RuntimeError("device-side assert"), OSError(errno.EPERM, "not permitted")):

        class Broken(CpuDevice):
            def allocate(self, nbytes: int, error: Exception = error) -> NoReturn:
                raise error

        with pytest.raises(type(error)):
            allocated(ONE, planned(ONE, ONE.total_expert_bytes), Broken())


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "CUDA out of memory"),
        (RuntimeError("CUDA error: out of memory\nCompile with"), "CUDA error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "Default"),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate"),
        (RuntimeError("CUDA error: illegal address"), ""),
        (OSError(errno.EIO, "I/O error"), ""),
        (ValueError("out of memory"), ""),
    ],
)
def test_each_way_of_saying_that_there_is_no_memory(error: Exception, word: str) -> None:
    assert bool(refusal(error)) == bool(word)
    assert word in refusal(error)


def test_pytorch_on_the_cpu_says_it_so() -> None:
    """The words that are looked for are the allocator's own."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert refusal(caught.value)


def test_a_mapping_that_the_system_refuses_shrinks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(SEVERAL, SEVERAL.total_expert_bytes)
    real, limit = mmap.mmap, plan.pools // 6

    def refuse(fileno: int, length: int) -> mmap.mmap:
        if length > limit:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(fileno, length)

    monkeypatch.setattr("moe_runtime.device.mmap.mmap", refuse)
    pools, got = allocated(SEVERAL, plan, CpuDevice())
    assert got.pools < plan.pools
    assert held(pools) >= got.pools
    assert "Cannot allocate memory" in got.explanation


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space as Linux has it")
def test_under_a_limit_of_the_process(caplog: pytest.LogCaptureFixture) -> None:
    """The system itself refuses: 64 MiB are left, four times as much is asked for."""
    import resource

    of = spec(4096, 4096, experts=200)
    plan = planned(of, of.total_expert_bytes)
    assert plan.pools > 256 << 20
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), before[1]))
    try:
        pools, got = allocated(of, plan, CpuDevice(), room=8 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 30 << 20 < held(pools) <= 64 << 20
    assert "8.00 MiB left free" in got.explanation
    assert len(caplog.records) == 1


def test_the_room_is_for_keys_values_and_a_margin() -> None:
    config = tiny_config()
    rooms = [
        working_room(config, batch=batch, length=length, nbytes=nbytes)
        for batch, length, nbytes in ((1, 10, 0), (2, 10, 0), (1, 20, 0), (1, 10, 8 << 30))
    ]
    assert rooms[1] == rooms[2] == 2 * rooms[0] > 0
    assert rooms[3] - rooms[0] == (8 << 30) // 20


# -- whole models ----------------------------------------------------------------------------------


def limited(monkeypatch: pytest.MonkeyPatch, **limits: int) -> LaterDevice:
    """A device in the place of a GPU whose `allocate` or `allocate_host` has a limit."""
    device = later_device.install(monkeypatch)
    for name, limit in limits.items():
        monkeypatch.setattr(device, name, LimitedDevice(limit).allocate)
    return device


def test_a_model_runs_in_what_memory_there_is(
    tiny_checkpoints: TinyCheckpoints,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    later_device.install(monkeypatch)
    expected = outputs(load(tiny_checkpoints.fused, "100%"))
    monkeypatch.undo()
    device = limited(monkeypatch, allocate=ALL_EXPERT_BYTES // 2)
    model = load(tiny_checkpoints.fused, "100%", max_length=32)
    assert same_bits(outputs(model), expected)
    assert device.faults == []
    report = moe_runtime.report(model)
    budget = report.to_dict()["budget"]
    assert TOP_K <= budget["slots"] <= LAYERS * EXPERTS // 2
    assert budget["shrunk"]["slots"] == LAYERS * EXPERTS
    assert budget["shrunk"]["slot_bytes"] >= ALL_EXPERT_BYTES > budget["slot_bytes"]
    assert "out of memory" in budget["shrunk"]["why"]
    assert budget["slots"] == len(moe_runtime.runtime_of(model).cache.residents())
    assert "instead of 64" in str(report)
    read = Report.load(report.save(tmp_path / "run.json"))
    assert read.to_dict()["budget"] == budget
    told = [r for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(told) == 1


def test_pinned_memory_shrinks_to_what_the_device_holds(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, allocate_host=ALL_EXPERT_BYTES // 2)
    options: dict[str, Any] = {"host_budget": "100%"}
    model = load(tiny_checkpoints.fused, "25%", **options)
    plan = moe_runtime.runtime_of(model).budget
    assert plan.shrunk is None
    assert "out of pinned host memory" in plan.explanation
    assert all(one.isfinite().all() for one in outputs(model))
    with pytest.raises(BudgetError, match=r"pinned host memory.*ulimit -l"):
        load(tiny_checkpoints.fused, "75%", **options)


def test_host_memory_is_given_back() -> None:
    device = LimitedDevice(SEVERAL.total_expert_bytes // 2)
    full = (48, 24)
    tier, change = allocate_host_tier(SEVERAL, full, device, least=(2, 2), finish=device.finish)
    assert "instead of 72" in change
    assert 0 < device.held <= device.limit
    del tier
    device.limit = 100
    text = refused(
        lambda: allocate_host_tier(SEVERAL, full, device, least=(2, 2), finish=device.finish)
    )
    assert "CUDA out of memory" in text
    assert device.held == 0


def test_not_one_tokens_experts_fit(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, allocate=2 * ALL_EXPERT_BYTES // (LAYERS * EXPERTS))
    with pytest.raises(BudgetError) as caught:
        load(tiny_checkpoints.fused, SMALL)
    text = str(caught.value)
    assert f"{TOP_K} slots of" in text
    assert re.search(r"[\d.]+ [KMG]iB are free", text)
    assert "smaller dtype" in text


@pytest.mark.parametrize("where", ["dense", "slots"])
def test_a_model_that_cannot_be_attached_is_as_before(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Of the weights that had moved, none stays where they do not fit."""
    model = tiny_model()
    expected = outputs(model)
    limited(monkeypatch, allocate=1000)
    moved: list[torch.device] = []
    move = moe_runtime.lifecycle.move_dense

    def full(model: Any, spec: MoESpec, device: torch.device) -> None:
        moved.append(device)
        if where == "dense" and len(moved) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        move(model, spec, device)

    monkeypatch.setattr("moe_runtime.lifecycle.move_dense", full)
    hint = "weights other than experts take" if where == "dense" else "4 slots of"
    with pytest.raises(BudgetError, match=hint):
        moe_runtime.attach(model, expert_budget="100%", device="cuda")
    assert len(moved) == 2
    assert moved[1] == torch.device("cpu")
    assert same_bits(outputs(model), expected)
    monkeypatch.undo()
    moe_runtime.detach(moe_runtime.attach(model, device="cpu"))


def test_dense_weights_that_do_not_fit_are_said_with_numbers(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    later_device.install(monkeypatch)

    def full(self: Any, *arguments: Any) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(BudgetError, match=r"weights other than experts take .* are free.*dtype="):
        load(tiny_checkpoints.fused, "100%")
