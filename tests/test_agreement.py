"""How far the default mode is from eager, exact mode's bits, and what padding costs: nothing.

Does not compare one budget with another: `test_identity` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.store import DiskStore
from outputs import (
    Checkpoint,
    deviation,
    least,
    load,
    load_plain,
    outputs,
    prompts,
    same_bits,
)
from tiny import LAYERS, VOCAB, TinyCheckpoints

# -- beside eager --------------------------------------------------------------------------------


def test_exact_mode_is_eager_bit_for_bit(checkpoint: Checkpoint) -> None:
    path, options = checkpoint
    dtype = options["dtype"]
    expected = outputs(load_plain(path, dtype))
    for budget in ("100%", "25%", least(path, dtype=dtype, exact=True)):
        assert same_bits(outputs(load(path, budget, dtype=dtype, exact=True)), expected)


# The largest deviation of an experts layer's output from eager's on the same input, in standard
# deviations. float32: sums in another order. bfloat16: eager rounds each of the partial sums.
DEVIATION = {torch.float32: 2e-6, torch.bfloat16: 0.06}


def test_the_default_mode_is_this_close_to_eager(checkpoint: Checkpoint) -> None:
    path, options = checkpoint
    dtype = options["dtype"]
    plain = load_plain(path, dtype)
    calls: list[tuple[str, tuple[torch.Tensor, ...], torch.Tensor]] = []
    for name, module in plain.named_modules():
        if name.endswith(".experts"):
            module.register_forward_hook(
                lambda _, arguments, output, name=name: calls.append((name, arguments, output))
            )
    expected = outputs(plain)
    model = load(path, "25%", dtype=dtype)
    worst = 0.0
    for name, arguments, output in calls:
        with torch.no_grad():
            found = model.get_submodule(name)(*arguments)
        difference = (found.float() - output.float()).abs().max() / output.float().std()
        worst = max(worst, float(difference))
    assert 0 < worst <= DEVIATION[dtype]
    if dtype == torch.float32:
        assert deviation(outputs(model), expected) < 1e-4


def test_parameters_in_place_give_the_same_tokens(tiny_checkpoints: TinyCheckpoints) -> None:
    plain = load_plain(tiny_checkpoints.per_expert, torch.float32)
    expected = outputs(plain)
    found = outputs(moe_runtime.attach(plain, device="cpu"))
    assert deviation(found, expected) < 1e-4
    assert all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a.dtype == torch.int64
    )


# -- padding -------------------------------------------------------------------------------------


def routed(model: PreTrainedModel, run: Callable[[], Any]) -> list[tuple[int, torch.Tensor]]:
    """(layer, top-k indices `[rows, K]`) of each call of a plain model's experts."""
    found: list[tuple[int, torch.Tensor]] = []

    def note(layer: int, _: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        found.append((layer, arguments[1].clone()))

    hooks = [
        model.get_submodule(f"model.layers.{layer}.mlp.experts").register_forward_pre_hook(
            functools.partial(note, layer)
        )
        for layer in range(LAYERS)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def test_padding_neither_loads_experts_nor_counts(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(1, VOCAB, (2, 10), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros_like(ids)
    mask[0, -1:] = mask[1, -2:] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    real = mask.bool().reshape(-1)
    plain = load_plain(tiny_checkpoints.per_expert, torch.float32)
    with torch.no_grad():
        calls = routed(plain, lambda: plain(**inputs))
        expected = plain(**inputs).logits.flatten(0, 1)[real]
    wanted = {(layer, int(e)) for layer, index in calls for e in index[real].unique()}
    by_padding = {(layer, int(e)) for layer, index in calls for e in index[~real].unique()}
    assert by_padding - wanted, "the padding of this test is routed to experts of its own"

    read: set[tuple[int, int]] = set()
    plain_read = DiskStore.read

    def note(self: DiskStore, position: int, expert: int, *rest: Any) -> int:
        read.add((position, expert))
        return plain_read(self, position, expert, *rest)

    monkeypatch.setattr(DiskStore, "read", note)
    model = load(tiny_checkpoints.per_expert, "100%", preload=False)
    with torch.no_grad():
        found = model(**inputs).logits.flatten(0, 1)[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert read == wanted
    counters = moe_runtime.report(model).counters
    assert counters.misses == len(wanted)
    assert counters.hits == 0
    assert counters.tokens == int(real.sum())


def test_what_stands_in_the_padding_does_not_matter(tiny_checkpoints: TinyCheckpoints) -> None:
    inputs = prompts()[2]
    real = inputs["attention_mask"].bool()
    model = load(tiny_checkpoints.per_expert)
    found = []
    for filler in (0, 77):
        ids = inputs["input_ids"].where(real, filler)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
        found.append([logits[real]])
    assert same_bits(*found)
