"""Ctrl-C at any line of what moves and computes experts, and once more while that is undone."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch
from moe_runtime.kernels import ExpertForm, Gate

import moe_runtime
from forecasters import Guess
from interrupts import lines_of, run_interrupted
from later_device import LaterDevice
from moe_runtime import cache, executor, loader, prefetch, prefetch_planner, slot_transfers, store
from moe_runtime.core import ExpertGrid
from moe_runtime.device import CpuDevice
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.host_experts import HostExpert, HostExperts
from moe_runtime.loader import ExpertLoader
from moe_runtime.prefetch import Fetcher
from moe_runtime.slot_transfers import SlotTransfers
from moe_runtime.store import HostTier, ParameterStore
from running import assert_usable, generate, load
from test_device import two_shapes
from tiny import EXPERTS, HIDDEN, LAYERS, TOP_K, TinyCheckpoints, tiny_model

GRID = ExpertGrid(layers=tuple(range(LAYERS)), experts=(EXPERTS,) * LAYERS)
MODULES = (cache, executor, loader, prefetch, prefetch_planner, slot_transfers, store)
FORM = ExpertForm(
    up=0, down=1, up_bias=None, down_bias=None, transposed=False, activation=Gate(), gate=Gate()
)


def press(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("predicting", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_any_line_may_be_the_last(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    exact: bool,
    predicting: bool,
) -> None:
    options: dict[str, Any] = {"exact": exact}
    if predicting:
        options["predictor"] = Guess(GRID, 1)
        options["prediction_options"] = {"trial": False, "bar": 0.2}
    model = load(tiny_checkpoints.per_expert, **options)

    def work() -> None:
        with torch.no_grad():
            model(prompt)

    lines = lines_of(work, MODULES)
    draw = random.Random(7)
    where = {run_interrupted(work, MODULES, draw.randint(1, lines)) for _ in range(6)}
    assert len(where) > 3
    assert_usable(model, prompt, eager_tokens)


def test_ctrl_c_while_a_failure_is_undone_is_made_up_for_by_the_next_call(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(tiny_checkpoints.per_expert)
    for method in (Fetcher.cancel, ExpertLoader.abandon):
        owner = Fetcher if method is Fetcher.cancel else ExpertLoader
        with monkeypatch.context() as patch:
            patch.setattr(ExpertLoader, "_arrived", press)
            patch.setattr(owner, method.__name__, press)
            with pytest.raises(KeyboardInterrupt):
                generate(model, prompt)
        assert torch.equal(generate(model, prompt), eager_tokens)  # would wait for good
        assert_usable(model, prompt, eager_tokens)


def test_ctrl_c_before_a_load_ahead_has_begun_leaves_no_expert_that_never_comes(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = prefetch_planner.PrefetchPlanner.choose
    monkeypatch.setattr(
        prefetch_planner.PrefetchPlanner, "choose", lambda self, at, _: choose(self, at, 1e12)
    )
    model = load(
        tiny_checkpoints.per_expert,
        predictor=Guess(GRID, 2),
        prediction_options={"trial": False, "bar": 0.2},
    )
    generate(model, prompt)
    with monkeypatch.context() as patch:
        # The first is asked for as the call begins, before any layer.
        patch.setattr(SlotTransfers, "start", press)
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompt)
    moe_runtime.runtime_of(model).check_integrity()
    assert_usable(model, prompt, eager_tokens)


# -- host memory -----------------------------------------------------------------------------------


def test_ctrl_c_while_waiting_for_a_copy_leaves_the_host_memory_where_it_was() -> None:
    waiting = [press]
    tier = HostTier(two_shapes(), (3, 2), CpuDevice().allocate, lambda token: waiting[0]())
    for expert in range(3):
        assert tier.claim(0, expert, set()) is not None
        tier.settle(0, expert, good=True)
        tier.lease(0, expert, "a copy")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tier.claim(1, 5, set())
        tier.check_integrity()
    waiting[0] = lambda: None
    assert tier.claim(1, 5, set()) is not None


def test_what_was_claimed_and_forgotten_is_free_again() -> None:
    tier = HostTier(two_shapes(), (3, 2), CpuDevice().allocate, lambda token: None)
    assert tier.claim(0, 1, set()) is not None
    tier.settle(0, 1, good=True)
    for expert in (2, 3):
        assert tier.claim(0, expert, set()) is not None
    with pytest.raises(AssertionError, match="nobody reads into"):
        tier.check_integrity()
    tier.abandon()
    tier.check_integrity()
    assert tier.lookup(0, 1) is not None
    assert all(tier.claim(1, expert, set()) is not None for expert in (5, 6))


# -- copies, readers and the host's thread ---------------------------------------------------------


def a_fetcher(device: Any, threads: int = 2) -> Fetcher:
    weights = torch.arange(12.0).view(3, 4)
    return Fetcher(ParameterStore([(weights,)]), device, threads=threads, chunk=4096)


def test_a_copy_whose_token_got_lost_is_waited_for_all_the_same() -> None:
    device = LaterDevice()
    fetcher = a_fetcher(device)
    slots = [torch.zeros(4) for _ in range(3)]
    for expert, ahead in ((0, False), (1, True), (2, False)):
        fetcher.submit(0, expert, (slots[expert],), after=device.fence(), ahead=ahead)
    for _ in range(3):
        fetcher._finished.get()  # Ctrl-C came before anybody noted it
    fetcher._in_flight.clear()
    fetcher.cancel()
    assert device.pending() == []
    assert [slot.tolist() for slot in slots] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_reader_that_nobody_listed_ends_with_the_others() -> None:
    """Ctrl-C in `Thread.start` leaves a thread running that is in no list."""
    fetcher = a_fetcher(CpuDevice())
    fetcher._start_threads()
    more = [threading.Thread(target=fetcher._read_forever, daemon=True) for _ in range(3)]
    for thread in more:
        thread.start()
    closing = threading.Thread(target=fetcher.close, daemon=True)
    closing.start()
    for thread in (closing, *more):
        thread.join(timeout=60)
        assert not thread.is_alive(), "it waits for an end that another took"


def test_a_host_batch_that_nobody_noted_is_waited_for() -> None:
    host = HostExperts(threads=1)
    begun, ended = threading.Event(), []

    def slow() -> torch.Tensor:
        begun.set()
        time.sleep(0.2)
        ended.append(1)
        return torch.randn(3, 16)

    expert = HostExpert(tensors=(torch.randn(32, 16), torch.randn(16, 16)), rows=torch.arange(3))
    host.submit([expert], FORM, slow)
    begun.wait()
    host._latest = None  # Ctrl-C came before it was noted
    host.abandon()
    assert ended
    host.abandon()
    assert len(host.submit([expert], FORM, lambda: torch.randn(3, 16)).outputs()) == 3
    host.close()
    host.abandon()  # no thread: nothing to wait for


# -- routers that choose what there is not ---------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("budget", ["40%", "100%"])
def test_an_expert_below_zero_is_an_error_and_no_other_layers_expert(
    tokens: int, budget: str
) -> None:
    model = moe_runtime.attach(tiny_model(), expert_budget=budget, device="cpu")
    module = model.get_submodule("model.layers.2.mlp.experts")
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    index = torch.arange(TOP_K).repeat(tokens, 1)
    weights = torch.full((tokens, TOP_K), 0.25)
    with torch.no_grad():
        wanted = module(hidden, index, weights)
        with pytest.raises(UnsupportedModelError, match=r"MoE layer 2 .* chose expert -1;"):
            module(hidden, index - 1, weights)
        assert torch.equal(module(hidden, index, weights), wanted)
        assert module(hidden[:0], index[:0], weights[:0]).shape == (0, HIDDEN)
    moe_runtime.runtime_of(model).check_integrity()
