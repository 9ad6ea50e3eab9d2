"""What kernels do with experts, types and installations they do not take: slower, said once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime.kernels import dispatch, grouped, triton_decode, triton_parts
from moe_runtime.kernels.grouped import grouped_experts
from moe_runtime.kernels.reference import slot_mlp

import later_device
import moe_runtime
from outputs import load, outputs
from slot_pools import slot_case
from tiny import TinyCheckpoints


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    dispatch._say_not_taken.cache_clear()
    grouped._say_refused.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "dtype", "why"),
    [
        ({"hidden": 15, "width": 11}, torch.float32, "multiple of 16 bytes"),
        ({"hidden": 15, "width": 11, "bias": True}, torch.bfloat16, "multiple of 16 bytes"),
        ({"hidden": 15, "width": 11, "transposed": True}, torch.float32, "multiple of 16 bytes"),
        ({}, torch.float64, "Float32"),
    ],
)
def test_what_the_grouped_product_refuses(
    caplog: pytest.LogCaptureFixture, sizes: dict[str, Any], dtype: torch.dtype, why: str
) -> None:
    case = slot_case(dtype=dtype, absent=0.0, tokens=6, **sizes)
    rows = case.hidden.repeat_interleave(2, dim=0)
    wanted = slot_mlp(case.hidden, case.slots, case.pool, case.form).flatten(0, 1)
    for _ in range(3):
        found = grouped_experts(rows, case.slots.view(-1), case.pool, case.form)
        torch.testing.assert_close(found, wanted)
    (said,) = warnings(caplog)
    assert why in said
    assert str(dtype) in said


def test_memory_and_mistakes_are_not_taken_for_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = slot_case(absent=0.0)
    flat = case.slots.view(-1)
    with pytest.raises(RuntimeError):  # too narrow for the experts
        grouped_experts(case.hidden[:, :7].repeat_interleave(2, 0), flat, case.pool, case.form)

    def full(*arguments: Any, **named: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(grouped, "_product", full)
    with pytest.raises(torch.OutOfMemoryError):
        grouped_experts(case.hidden.repeat_interleave(2, 0), flat, case.pool, case.form)
    assert warnings(caplog) == []


def test_types_that_triton_does_not_take_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    case = slot_case()
    mixed = (case.pool[0].bfloat16(), *case.pool[1:])
    for _ in range(2):
        assert not dispatch.triton_takes(case.hidden.double(), case.pool, case.form)
        assert not dispatch.triton_takes(case.hidden, mixed, case.form)
    said = warnings(caplog)
    assert len(said) == 2
    assert "hidden is torch.float64" in said[0]
    assert "torch.bfloat16, torch.float32" in said[1]


def test_without_triton(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "is_installed", lambda: False)
    case = slot_case()
    assert not dispatch.triton_takes(case.hidden, case.pool, case.form)
    assert not dispatch.triton_takes(case.hidden, case.pool, case.form)
    (said,) = warnings(caplog)
    assert "Triton is not installed" in said
    with pytest.raises(ValueError, match="Triton is not installed"):
        dispatch.slot_experts(
            case.hidden, case.slots, case.weights, case.pool, case.form, kernel="triton"
        )


def test_a_triton_that_cannot_be_imported_is_given_up_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A broken installation raises what it likes, and in an `except` clause too."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise AttributeError('no attribute bool')\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("triton") is not None
    for module in (triton_parts, triton_decode):
        monkeypatch.setattr(module, "scope", functools.cache(triton_parts.scope.__wrapped__))
    fresh = functools.cache(triton_parts.interpreted.__wrapped__)
    monkeypatch.setattr(triton_parts, "interpreted", fresh)
    monkeypatch.setattr(triton_decode, "interpreted", fresh)
    monkeypatch.setattr(
        triton_decode, "_kernel", functools.cache(triton_decode._kernel.__wrapped__)
    )
    monkeypatch.setattr(dispatch, "_failures", [])
    case = slot_case()
    for _ in range(2):
        parts = dispatch.contributions(
            case.hidden, case.slots, case.pool, case.form, distinct=5, kernel="triton"
        )
    wanted = dispatch.contributions(
        case.hidden, case.slots, case.pool, case.form, distinct=5, kernel="plain"
    )
    assert torch.equal(parts, wanted)
    (said,) = warnings(caplog)
    assert "Triton cannot be imported" in said
    assert "no attribute bool" in said


def test_a_model_on_a_device_runs_in_a_type_that_no_kernel_takes(
    tiny_checkpoints: TinyCheckpoints,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = outputs(load(tiny_checkpoints.fused, "100%", dtype=torch.float64))
    device = later_device.install(monkeypatch)
    model = load(tiny_checkpoints.fused, "30%", dtype=torch.float64)
    for one, other in zip(outputs(model), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert device.faults == []
    assert moe_runtime.report(model).counters.evictions > 0
    assert len([said for said in warnings(caplog) if "one by one" in said]) == 1
