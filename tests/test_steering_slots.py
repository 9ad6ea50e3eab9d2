"""Steered experts that are kept in their slots: while the block is active, and not after it.

Does not know what steering computes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_runtime
from moe_runtime.errors import BudgetError, ExpertReadError
from moe_runtime.runtime import Runtime
from moe_runtime.store import DiskStore
from test_steering_hook import hooks
from tiny import EXPERT_BYTES, LAYERS, TOP_K, TinyCheckpoints, tiny_model

BETAS = {(0, 3): 2.0, (2, 5): 1.0, (3, 15): 4.0}


def load(checkpoints: TinyCheckpoints, budget: int | str) -> tuple[Any, Runtime]:
    model = moe_runtime.from_pretrained(checkpoints.fused, expert_budget=budget, device="cpu")
    return model, moe_runtime.runtime_of(model)


def kept(runtime: Runtime) -> set[tuple[int, int]]:
    runtime.check_integrity()
    return {
        (position, expert)
        for position in range(LAYERS)
        for expert in runtime.cache.permanent(position)
    }


def generate(model: Any) -> torch.Tensor:
    prompt = torch.tensor([[5, 6, 7]])
    found: torch.Tensor = model.generate(prompt, max_new_tokens=12, do_sample=False)
    return found


def test_they_are_resident_throughout(tiny_checkpoints: TinyCheckpoints) -> None:
    model, runtime = load(tiny_checkpoints, "25%")
    generate(model)  # full of others
    with moe_runtime.steer(model, BETAS):
        expected = generate(model)
    before = hooks(model)
    with moe_runtime.steer(model, BETAS, pin=True) as handle:
        assert kept(runtime) == set(BETAS)
        assert all(runtime.cache.is_resident(*one) for one in BETAS)
        runtime.reset_counters()
        assert torch.equal(generate(model), expected)
        assert kept(runtime) == set(BETAS)
        # They miss no more; of those that are counted, each use in decoding was a hit.
        assert int(runtime.cache.counters.permanent_hits.sum()) >= sum(handle.uses.values()) > 0
    assert kept(runtime) == set()
    assert hooks(model) == before
    assert torch.equal(generate(model), generate(model))
    runtime.check_integrity()


def test_blocks_and_exceptions_release_what_is_their_own(tiny_checkpoints: TinyCheckpoints) -> None:
    model, runtime = load(tiny_checkpoints, "50%")
    outer = moe_runtime.steer(model, {(0, 3): 2.0, (1, 1): 2.0}, pin=True)
    inner = moe_runtime.steer(model, BETAS, pin=True)
    outer.__enter__()
    inner.__enter__()
    assert kept(runtime) == {*BETAS, (1, 1)}
    outer.__exit__(None, None, None)
    assert kept(runtime) == set(BETAS)
    inner.__exit__(None, None, None)
    assert kept(runtime) == set()
    with pytest.raises(KeyError), moe_runtime.steer(model, BETAS, pin=True):
        raise KeyError
    assert kept(runtime) == set()


def test_too_few_slots_are_told_in_numbers(tiny_checkpoints: TinyCheckpoints) -> None:
    model, runtime = load(tiny_checkpoints, "25%")
    slots = runtime.cache.slots[0]
    fits = {(at % LAYERS, at // LAYERS): 2.0 for at in range(slots - TOP_K)}
    with moe_runtime.steer(model, fits, pin=True):
        generate(model)
        assert kept(runtime) == set(fits)
    more = {(at % LAYERS, at // LAYERS): 2.0 for at in range(slots - TOP_K + 2)}
    before = hooks(model)
    with (
        pytest.raises(BudgetError, match=rf"the budget has {slots}; load the model with 2 more"),
        moe_runtime.steer(model, more, pin=True),
    ):
        pass
    assert hooks(model) == before
    assert kept(runtime) == set()
    assert EXPERT_BYTES * slots <= runtime.budget.total


def test_an_expert_that_cannot_be_read_is_not_kept(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runtime = load(tiny_checkpoints, "25%")
    expected = generate(model)
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "read", _fail)
        with (
            pytest.raises(ExpertReadError),
            moe_runtime.steer(model, {(1, expert): 2.0 for expert in range(8)}, pin=True),
        ):
            pass
    assert kept(runtime) == set()
    assert torch.equal(generate(model), expected)


def _fail(*_: Any, **__: Any) -> Any:
    raise ExpertReadError("the disk is gone")


def test_in_place_nothing_moves(tiny_checkpoints: TinyCheckpoints) -> None:
    model = moe_runtime.attach(tiny_model(), device="cpu")
    runtime = moe_runtime.runtime_of(model)
    with moe_runtime.steer(model, BETAS, pin=True):
        assert kept(runtime) == set(BETAS)
        generate(model)
    assert kept(runtime) == set()
    moe_runtime.detach(model)
