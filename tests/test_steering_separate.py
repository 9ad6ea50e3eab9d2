"""Steering experts that are modules of their own (Switch, NLLB-MoE, remote code): their outputs are
scaled, where they are resident and where they are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from module_experts import BUILDERS, EXPERTS, RemoteModel, batch, build, load_plain, outputs
from moe_runtime.errors import ConfigError, UnsupportedModelError
from moe_runtime.model_spec import read_spec
from test_steering_hook import hooks

NAMES = list(BUILDERS)


def first_layer(model: PreTrainedModel) -> tuple[int, str]:
    layer = read_spec(model).layers[0]
    return layer.layer, layer.path


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    """Logits of one call."""
    given = batch()
    if not isinstance(model, RemoteModel):
        given["decoder_input_ids"] = torch.ones(3, 2, dtype=torch.int64)
    found: torch.Tensor = model(**given).logits
    return found


@torch.no_grad()
def layer_output(model: PreTrainedModel, path: str) -> torch.Tensor:
    """What the module around the first layer's experts gives for fixed hidden states."""
    module = model.get_submodule(path.rpartition(".")[0])
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    found = module(hidden)
    output: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return output


@pytest.mark.parametrize("name", NAMES)
def test_a_share_is_scaled_and_nothing_else(name: str) -> None:
    model = build(name)
    layer, path = first_layer(model)
    plain = layer_output(model, path)  # routers note things in themselves at their first call
    before = hooks(model)
    moved = 0.0
    for expert in range(EXPERTS):
        found = {}
        for beta in (0.0, 1.0, 3.0):
            with moe_runtime.steer(model, {(layer, expert): beta}):
                found[beta] = layer_output(model, path)
        assert torch.equal(found[1.0], plain)
        share = found[1.0] - found[0.0]
        moved += float(share.abs().max())
        error = float((found[3.0] - found[0.0] - 3 * share).abs().max())
        assert error <= 1e-5 * float(plain.abs().max())
    assert moved > 0
    assert hooks(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_inside_a_budget_as_outside(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    plain = load_plain(name, tmp_path)
    small = moe_runtime.from_pretrained(tmp_path, expert_budget="25%", device="cpu")
    layer, _ = first_layer(plain)
    betas = {(layer, expert): 2.5 for expert in range(0, EXPERTS, 2)}
    with moe_runtime.steer(plain, betas) as one:
        expected = outputs(plain)
    with moe_runtime.steer(small, betas) as other:
        found = outputs(small)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert one.uses == other.uses
    assert sum(one.uses.values()) > 0
    assert not torch.equal(expected[0], outputs(plain)[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "secret"])
def test_rows_have_their_own_betas(name: str) -> None:
    model = build(name)
    layer, _ = first_layer(model)
    every = range(EXPERTS)
    with moe_runtime.steer(model, {(layer, e): (1.0, 2.0, 0.0) for e in every}):
        together = run(model)
    for row, beta in enumerate((1.0, 2.0, 0.0)):
        with moe_runtime.steer(model, {(layer, expert): beta for expert in every}):
            same = run(model)
        error = float((together[row] - same[row]).abs().max())
        assert error <= 1e-5 * float(same.abs().max()), row
    assert not torch.equal(together[1], run(model)[1])


def test_rows_that_cannot_be_told_are_refused() -> None:
    model = build("secret")
    layer, _ = first_layer(model)
    every = {(layer, expert): (1.0, 2.0, 0.0) for expert in range(EXPERTS)}
    with (
        moe_runtime.steer(model, every),
        pytest.raises(UnsupportedModelError, match="one beta for all rows"),
    ):
        run(model)
    with moe_runtime.steer(model, {(layer, expert): 2.0 for expert in range(EXPERTS)}):
        run(model)
    with (
        moe_runtime.steer(model, {(layer, 0): (1.0, 2.0)}),
        pytest.raises(ConfigError, match="batch of 2 rows, the forward call has 3"),
    ):
        run(model)


@pytest.mark.parametrize("name", ["switch", "nllb", "up"])
def test_a_logit_bias_is_the_router_s_own_bias(name: str) -> None:
    model = build(name)
    layer = read_spec(model).layers[0]
    plain = layer_output(model, layer.path)
    with moe_runtime.steer(model, {(layer.layer, 3): 20.0}, method="logit_bias") as handle:
        found = layer_output(model, layer.path)
    router = model.get_submodule(layer.router)
    linear = router if isinstance(router, torch.nn.Linear) else router.get_submodule("classifier")
    bias = torch.zeros(EXPERTS)
    bias[3] = torch.tensor(20.0).log()
    linear.bias = torch.nn.Parameter(bias)
    assert torch.allclose(found, layer_output(model, layer.path), atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert handle.uses.keys() == {(layer.layer, 3)}


@pytest.mark.parametrize("options", [{"method": "force"}, {"renormalise": True}])
def test_what_such_experts_cannot_do_is_refused(options: dict[str, Any]) -> None:
    model = build("switch")
    with (
        pytest.raises(UnsupportedModelError, match="modules of their own"),
        moe_runtime.steer(model, {(1, 0): 2.0}, **options),
    ):
        pass
