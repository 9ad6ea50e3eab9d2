"""Steering changes exactly the share asked for, in every architecture behind the experts interface.

Does not know any architecture by name: `architectures` finds them in the installed transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from architectures import ArchitectureCase, build, cases, inputs
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.model_spec import MoELayer, read_spec
from test_architectures import QUICK

RUNNABLE = [
    pytest.param(case, marks=[] if case.name in QUICK else [pytest.mark.slow], id=case.name)
    for case in cases()
    if not case.excluded
]
# Their routers score more than the experts (shared ones, a "none"), or hold several matrices with
# a row for each.
NO_LOGIT_BIAS = {
    "InklingForCausalLM",
    "InklingForConditionalGeneration",
    "ZayaForCausalLM",
}


class Calls:
    """Arguments and output of each layer's experts in the last call of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.spec = read_spec(model)
        self.found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for layer in self.spec.layers:
            model.get_submodule(layer.path).register_forward_hook(self._hook(layer))

    def _hook(self, layer: MoELayer) -> Any:
        def note(module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.found[layer.layer] = (arguments[1], arguments[2], output)

        return note


@torch.no_grad()
def run(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs(padded=False)).logits
    return logits


def prepared(case: ArchitectureCase) -> tuple[PreTrainedModel, Calls]:
    """A tiny model that sums expert by expert, and what its experts are called with."""
    model = build(case, torch.float32)
    model.set_experts_implementation("eager")
    return model, Calls(model)


@pytest.mark.parametrize("case", RUNNABLE)
def test_a_share_is_scaled_and_nothing_else(case: ArchitectureCase) -> None:
    model, calls = prepared(case)
    plain = run(model)
    assert plain.isfinite().all()
    layer = next(one for one in calls.spec.layers if one.layer in calls.found)
    index, weights, whole = calls.found[layer.layer]
    expert = int(index[-1, 0])
    outputs = {}
    for beta in (0.0, 1.0, 3.0):
        with moe_runtime.steer(model, {(layer.layer, expert): beta}) as handle:
            run(model)
        found, changed, outputs[beta] = calls.found[layer.layer]
        assert torch.equal(found, index)
        assert torch.equal(changed, torch.where(index == expert, weights * beta, weights))
        if beta != 1:
            assert handle.uses == {(layer.layer, expert): int((index == expert).sum())}
    assert torch.equal(outputs[1.0], whole)
    share = outputs[1.0] - outputs[0.0]
    assert float(share.abs().max()) > 0
    error = (outputs[3.0] - outputs[0.0] - 3 * share).abs().max()
    assert float(error) <= 1e-5 * float(whole.abs().max())
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("case", RUNNABLE)
def test_a_bias_reaches_the_choice(case: ArchitectureCase) -> None:
    model, calls = prepared(case)
    plain = run(model)
    layer = next(one for one in calls.spec.layers if one.layer in calls.found)
    index, weights, _ = calls.found[layer.layer]
    expert = int(index[-1, 0])
    never = {(layer.layer, expert): 1e-30}
    if case.name in NO_LOGIT_BIAS:
        with pytest.raises(UnsupportedModelError, match="one router"):
            moe_runtime.steer(model, never, method="logit_bias").__enter__()
        assert torch.equal(run(model), plain)
        return
    with moe_runtime.steer(model, never, method="logit_bias"):
        run(model)
    found, changed, _ = calls.found[layer.layer]
    # The expert is chosen no more, or (a choice fixed by the token's id) has no weight.
    assert float(changed[found == expert].abs().sum()) <= 1e-6
    assert float(weights[index == expert].abs().sum()) > 0
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("case", RUNNABLE)
def test_a_forced_expert_takes_the_place_of_least_weight(case: ArchitectureCase) -> None:
    model, calls = prepared(case)
    plain = run(model)
    layer = next(one for one in calls.spec.layers if one.layer in calls.found)
    index, weights, _ = calls.found[layer.layer]
    expert = 5
    expected, scaled = index.clone(), weights.clone()
    for row in range(len(index)):
        place = (index[row] == expert).nonzero()
        at = int(place[0]) if len(place) else int(weights[row].argmin())
        expected[row, at] = expert
        for choice in range(index.shape[1]):
            if expected[row, choice] == expert:
                scaled[row, choice] = weights[row, choice] * 2
    with moe_runtime.steer(model, {(layer.layer, expert): 2.0}, method="force") as handle:
        run(model)
    found, changed, _ = calls.found[layer.layer]
    assert torch.equal(found, expected)
    assert torch.equal(changed, scaled)
    assert handle.uses == {(layer.layer, expert): int((expected == expert).sum())}
    assert torch.equal(run(model), plain)
