"""The runtime on a late and strict device under everything at once: small memories, forecasts,
experts on the host, reads and kernels that fail, Ctrl-C at any line, threads.

Whatever came before, what a layer answers has the bits of the same decisions computed plainly.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime.kernels import ExpertForm, combined, contributions, expert_mlp
from torch import nn
from transformers import PreTrainedModel

import later_device
import moe_runtime
from forecasters import Guess
from interrupts import lines_of, run_interrupted
from later_device import LaterDevice
from moe_runtime import (
    cache,
    executor,
    host_experts,
    loader,
    prefetch,
    prefetch_planner,
    slot_layers,
    slot_transfers,
    store,
)
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ExpertReadError
from moe_runtime.interface import HANDLE
from moe_runtime.runtime import Runtime, runtime_of
from test_hosting import Asked
from tiny import EXPERTS, LAYERS, VOCAB, TinyCheckpoints, tiny_model

GRID = ExpertGrid(layers=tuple(range(LAYERS)), experts=(EXPERTS,) * LAYERS)
MODULES = (
    *(cache, executor, host_experts, loader, prefetch, prefetch_planner),
    *(slot_layers, slot_transfers, store),
)


class BrokenError(RuntimeError):
    pass


@dataclass(eq=False)
class Layer:
    """What one call of an experts module was given and answered, and who went to the host."""

    position: int
    arguments: tuple[torch.Tensor, ...]
    output: torch.Tensor
    hosted: list[int]


@dataclass(eq=False)
class Stressed:
    """A model drawn from a seed, with everything that is needed to doubt its answers."""

    model: PreTrainedModel
    runtime: Runtime
    device: LaterDevice
    layers: list[Layer] = field(default_factory=list)
    chosen: dict[int, list[int]] = field(default_factory=dict)

    def call(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(ids, attention_mask=mask).logits
        return logits

    def form(self, position: int) -> ExpertForm:
        module = self.model.get_submodule(self.runtime.spec.layers[position].path)
        handle: executor.LayerHandle = module.__dict__[HANDLE]
        return handle.form

    def assert_whole(self) -> None:
        assert self.device.faults == []
        self.runtime.check_integrity()
        fetcher = self.runtime.executor.fetcher
        if fetcher._host is not None:
            fetcher._host.check_integrity(fetcher._in_flight)

    def assert_plain(self, plain: PreTrainedModel) -> None:
        """Each layer's output against the same decisions, all weights in one place."""
        assert self.layers
        for layer in self.layers:
            wanted = computed_plainly(layer, plain, self.runtime, self.form(layer.position))
            assert torch.equal(layer.output, wanted), (layer.position, layer.hosted)


def computed_plainly(
    layer: Layer, plain: PreTrainedModel, runtime: Runtime, form: ExpertForm
) -> torch.Tensor:
    """No slots, no copies, no threads: the device's experts at once, then the host's."""
    module = plain.get_submodule(f"model.layers.{layer.position}.mlp.experts")
    hidden, index, weights = layer.arguments
    names = [param.name for param in runtime.spec.layers[layer.position].params]
    pool = tuple(module.get_parameter(name).detach() for name in names)
    on_host = torch.isin(index, torch.tensor(layer.hosted, dtype=index.dtype))
    parts = contributions(
        hidden, index.masked_fill(on_host, -1), pool, form, distinct=EXPERTS, kernel="plain"
    )
    for expert in layer.hosted:
        rows, choices = torch.where(index == expert)
        # In the order in which the runtime counts pairs: choice by choice.
        order = torch.argsort(choices * len(hidden) + rows)
        rows, choices = rows[order], choices[order]
        outputs = expert_mlp(hidden[rows], tuple(tensor[expert] for tensor in pool), form)
        parts[0][rows * index.shape[1] + choices] = outputs
    return combined(parts, index, weights, form, hidden.dtype, kernel="plain")


@contextmanager
def stressed(seed: int, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Stressed]:
    """A model whose memory, tiers, forecasts and host are drawn."""
    draw = random.Random(seed)
    device = later_device.install(patch)
    device.patience = lambda: draw.choice((0, 1, 2, 9))
    choose = prefetch_planner.PrefetchPlanner.choose
    patch.setattr(
        prefetch_planner.PrefetchPlanner, "choose", lambda self, at, _: choose(self, at, 1e12)
    )
    options: dict[str, Any] = {
        "device": "cuda",
        "hardware": None,
        "expert_budget": draw.choice(("20%", "25%", "40%", "70%")),
        "policy": draw.choice(("lru", "lfu")),
    }
    if draw.random() < 0.6:
        options |= {
            "predictor": Guess(GRID, seed),
            "prediction_options": {"trial": False, "bar": 0.2},
        }
    if draw.random() < 0.7:
        options |= {
            "host_budget": draw.choice(("10%", "30%", "60%", "100%")),
            "reader_threads": draw.choice((1, 2, 3)),
        }
        model = moe_runtime.from_pretrained(folder, **options)
    else:
        model = moe_runtime.attach(tiny_model(), **options)
    runtime = runtime_of(model)
    found = Stressed(model, runtime, device)
    slots = runtime.executor.slots
    slots.kernel = "plain"
    share = draw.choice((0.0, 0.3, 0.7, 1.0))
    if share:
        slots.hosting = Asked(
            device="cuda:0",
            profile=None,
            ask=lambda misses, **_: [one.expert for one in misses if draw.random() < share],
        )
    choose_place = slots._chosen

    def chosen(position: int, *rest: Any) -> Any:
        places = choose_place(position, *rest)
        found.chosen[position] = list(places)
        return places

    patch.setattr(slots, "_chosen", chosen)

    def before(module: nn.Module, arguments: Any) -> None:
        found.chosen.pop(module.__dict__[HANDLE].position, None)

    def after(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        position = module.__dict__[HANDLE].position
        found.layers.append(
            Layer(position, arguments, output.clone(), found.chosen.get(position, []))
        )

    hooks = []
    for layer in runtime.spec.layers:
        module = model.get_submodule(layer.path)
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield found
    for hook in hooks:
        hook.remove()


def a_batch(draw: random.Random) -> torch.Tensor:
    shape = draw.choice(((1, 1), (1, 1), (1, 7), (3, 1), (2, 6)))
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    return torch.randint(1, VOCAB, shape, generator=generator)


def fail_at(number: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The same function, but for its n-th call."""
    left = [number]

    def failing(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise error
        return function(*arguments, **named)

    return failing


def disturb(one: Stressed, draw: random.Random) -> None:
    """A call that something happens to; nothing of it may be left."""
    ids = a_batch(draw)
    kind = draw.choice(("read", "kernel", "host", "merge", "line", "line"))
    with pytest.MonkeyPatch.context() as patch:
        number = draw.choice((1, 2, 3, 5, 8))
        broken = BrokenError(kind)
        if kind == "read":
            error = OSError(5, "Input/output error")
            patch.setattr(store, "read_range", fail_at(number, store.read_range, error))
        elif kind == "kernel":
            patch.setattr(
                slot_layers, "contributions", fail_at(number, slot_layers.contributions, broken)
            )
        elif kind == "host":
            mlp = fail_at(number, host_experts.expert_mlp, broken)
            patch.setattr(host_experts, "expert_mlp", mlp)
        elif kind == "merge":
            merge = fail_at(number, slot_layers.SlotLayers._merged, broken)
            patch.setattr(slot_layers.SlotLayers, "_merged", merge)
        if kind == "line":
            lines = lines_of(lambda: one.call(ids), MODULES)
            run_interrupted(lambda: one.call(ids), MODULES, draw.randint(1, lines))
        else:
            # Or nothing is left to fail.
            with contextlib.suppress(BrokenError, ExpertReadError):
                one.call(ids)
    one.assert_whole()


def in_two_threads(one: Stressed, plain: PreTrainedModel, draw: random.Random) -> None:
    batches = [a_batch(draw) for _ in range(2)]
    found: list[torch.Tensor | None] = [None, None]

    def work(number: int) -> None:
        for _ in range(2):
            found[number] = one.call(batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    for ids, logits in zip(batches, found, strict=True):
        assert logits is not None
        with torch.no_grad():
            torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-3)


def stress(seed: int, folder: Path) -> None:
    draw = random.Random(-seed - 1)
    plain = tiny_model()
    with pytest.MonkeyPatch.context() as patch, stressed(seed, folder, patch) as one:
        for _ in range(6):
            if draw.random() < 0.5:
                disturb(one, draw)
            one.layers.clear()
            ids = a_batch(draw)
            mask = torch.ones_like(ids)
            logits = one.call(ids, mask)
            assert len(one.layers) == LAYERS
            one.assert_plain(plain)
            one.assert_whole()
            with torch.no_grad():
                torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-3)
        in_two_threads(one, plain, draw)
        one.assert_whole()
        ids = a_batch(draw)
        if draw.random() < 0.5:
            disturb(one, draw)
        else:
            one.call(ids)  # loads ahead of need may be under way now
    moe_runtime.detach(one.model)
    with torch.no_grad():
        torch.testing.assert_close(one.model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-3)
    assert one.device.faults == []


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_the_bits_are_those_of_the_decisions(
    tiny_checkpoints: TinyCheckpoints, seed: int
) -> None:
    stress(seed, tiny_checkpoints.per_expert)
