"""Several shapes in one model, more experts than slots, copies of a model, threads on one model.

Does not look at single layers.
"""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_runtime
from outputs import deviation, least, load, outputs, same_bits
from tiny import EXPERTS, TOP_K, VOCAB, TinyCheckpoints, tiny_config, tiny_model

# -- shapes, sizes, copies, threads --------------------------------------------------------------


def test_a_layer_with_more_active_experts_than_slots(tiny_checkpoints: TinyCheckpoints) -> None:
    path = tiny_checkpoints.per_expert
    model = load(path, least(path))
    runtime = moe_runtime.runtime_of(model)
    assert runtime.budget.slots == (TOP_K,)
    ids = torch.randint(1, VOCAB, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits
        expected = load(path, "100%", layout="native")(ids).logits
    assert torch.equal(found, expected)
    active = [len(step.experts) for step in runtime.profiler.accesses]
    assert max(active) == EXPERTS
    counters = moe_runtime.report(model).counters
    assert counters.misses == sum(active)


def two_shapes() -> PreTrainedModel:
    """The tiny model, its last two layers with wider experts."""
    model = tiny_model()
    wide = tiny_config()
    wide.moe_intermediate_size = 40
    generator = torch.Generator().manual_seed(8)
    for layer in model.model.layers[2:]:
        experts = Qwen3MoeExperts(wide)
        experts.config = model.config
        for parameter in experts.parameters():
            parameter.data.normal_(std=0.5, generator=generator)
        layer.mlp.experts = experts
    return model.eval()


@pytest.mark.parametrize("budget", ["100%", "50%", "30%"])
@pytest.mark.parametrize("exact", [False, True])
def test_experts_of_two_shapes_in_one_model(budget: str, exact: bool) -> None:
    plain = two_shapes()
    plain.set_experts_implementation("eager")
    expected = outputs(plain)
    model = moe_runtime.attach(plain, expert_budget=budget, device="cpu", exact=exact)
    runtime = moe_runtime.runtime_of(model)
    assert len(runtime.budget.slots) == 2
    assert runtime.budget.used <= runtime.budget.total
    found = outputs(model)
    assert same_bits(found, expected) if exact else deviation(found, expected) < 1e-4
    runtime.check_integrity()
    if budget == "30%":
        assert moe_runtime.report(model).counters.evictions > 0


@pytest.mark.parametrize("budget", ["100%", "25%"])
def test_a_deep_copy_shares_the_slots_and_works(
    tiny_checkpoints: TinyCheckpoints, budget: str
) -> None:
    model = load(tiny_checkpoints.per_expert, budget)
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert moe_runtime.runtime_of(twin) is moe_runtime.runtime_of(model)
    assert twin.get_input_embeddings().weight is not model.get_input_embeddings().weight
    assert deviation(outputs(twin), expected) < 1e-4
    assert same_bits(outputs(model), expected)
    del model
    gc.collect()
    assert deviation(outputs(twin), expected) < 1e-4  # the original is gone
    assert moe_runtime.report(twin).counters.steps > 0


@pytest.mark.parametrize("which", ["original", "copy"])
def test_detaching_one_of_two_copies_leaves_the_other(
    tiny_checkpoints: TinyCheckpoints, which: str
) -> None:
    model = load(tiny_checkpoints.per_expert)
    expected = outputs(model)
    twin = copy.deepcopy(model)
    gone, stays = (model, twin) if which == "original" else (twin, model)
    moe_runtime.detach(gone)
    assert deviation(outputs(gone), expected) < 1e-4
    steps = moe_runtime.report(stays).counters.steps
    assert deviation(outputs(stays), expected) < 1e-4
    assert moe_runtime.report(stays).counters.steps > steps
    moe_runtime.detach(stays)
    assert deviation(outputs(stays), expected) < 1e-4


def test_two_threads_on_one_model(tiny_checkpoints: TinyCheckpoints) -> None:
    model = load(tiny_checkpoints.per_expert)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCAB, (1, n), generator=generator) for n in (7, 19)]

    def run(prompt: torch.Tensor) -> torch.Tensor:
        found = model.generate(prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        assert isinstance(found, torch.Tensor)
        return found

    expected = [run(prompt) for prompt in ids]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = run(ids[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert [torch.equal(found[n], expected[n]) for n in range(2)] == [True, True]
    moe_runtime.runtime_of(model).check_integrity()
