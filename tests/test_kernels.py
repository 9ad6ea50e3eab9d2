"""The specification of the kernels against transformers' own experts; choosing a kernel."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.kernels import (
    ExpertForm,
    Gate,
    combine,
    dispatch,
    recognise,
    slot_experts,
    slot_mlp,
)
from moe_runtime.kernels.tiles import cut
from torch import nn
from transformers.activations import ACT2FN

from moe_runtime.executor import expert_form
from slot_pools import SlotCase, slot_case

EXPERTS, HIDDEN, WIDTH = 5, 12, 10

# A class of the release for each layout that the decorator can declare.
CLASSES = {
    "qwen3_moe.Qwen3MoeExperts": "gated, concatenated",
    "nemotron_h.NemotronHExperts": "no gate",
    "aria.AriaExperts": "transposed",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "transposed, bias, clamped",
    "gpt_oss.GptOssExperts": "transposed, bias, interleaved, clamped",
    "muse_spark.MuseSparkExperts": "norm after each expert",
    "deepseek_v4.DeepseekV4Experts": "clamped before silu",
}


def experts_module(name: str) -> Any:
    """A random experts module of the installed transformers."""
    folder, class_name = name.split(".")
    try:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        experts_class = getattr(module, class_name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")
    config = SimpleNamespace(
        _experts_implementation="eager", hidden_size=HIDDEN, moe_hidden_size=HIDDEN,
        intermediate_size=WIDTH, moe_intermediate_size=WIDTH, hidden_act="silu",
        mlp_hidden_act="relu2", num_experts=EXPERTS, num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS, moe_num_experts=EXPERTS, moe_latent_size=None,
        swiglu_alpha=1.702, swiglu_limit=1.5, post_norm_eps=1e-6,
    )  # fmt: skip
    built = experts_class(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return built


def form_of(module: Any) -> tuple[ExpertForm, tuple[torch.Tensor, ...]]:
    names = [name for name, p in module.named_parameters(recurse=False) if p.dim() >= 2]
    layer: Any = SimpleNamespace(
        params=[SimpleNamespace(name=name) for name in names], path="experts", class_name="Experts"
    )
    return expert_form(module, layer, on_gpu=True), tuple(getattr(module, name) for name in names)


@pytest.mark.parametrize("name", CLASSES)
def test_the_specification_is_what_eager_computes(name: str) -> None:
    module = experts_module(name)
    if not hasattr(module, "has_gate"):
        pytest.skip("not behind the experts interface in this version of transformers")
    form, pool = form_of(module)
    assert form.gate is not None, "the gate is recognised by what it computes"
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(7, HIDDEN, generator=generator)
    slots = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(7)])
    weights = torch.rand(7, 3, generator=generator)
    with torch.no_grad():
        wanted = module(hidden, slots, weights)
        found = combine(slot_mlp(hidden, slots, pool, form), weights, hidden.dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            slot_experts(hidden, slots, weights, pool, form), wanted, rtol=1e-5, atol=1e-5
        )
        rows = 3 * torch.randn(4, form.gate.gated * WIDTH + WIDTH, generator=generator)
        torch.testing.assert_close(form.gate(rows), form.activation(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu"]
)
@pytest.mark.parametrize("gated", [False, True])
def test_known_activations_are_recognised(name: str, gated: bool) -> None:
    function = ACT2FN[name]

    def both(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return function(gate) * up  # type: ignore[no-any-return]

    gate = recognise(both if gated else function, gated=gated, constants=[3.5, 7.0])
    assert gate is not None
    assert gate.gated == gated
    assert gate.clamp == "none"


def test_an_unknown_activation_is_left_to_the_model_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def odd(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return gate.tanh() * up

    with caplog.at_level(logging.INFO):
        assert recognise(odd, gated=True, constants=[]) is None
        assert recognise(odd, gated=True, constants=[]) is None
    assert len([r for r in caplog.records if "odd" in r.getMessage()]) == 1


@pytest.mark.parametrize("hidden_limit", [50.0, 1000.0, 9000.0])
def test_a_clamp_that_is_no_constant_of_the_module_is_not_overlooked(hidden_limit: float) -> None:
    def clamped(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=hidden_limit)) * up

    assert recognise(clamped, gated=True, constants=[]) is None


def test_gates_that_make_no_sense_are_refused() -> None:
    for wrong in ({"function": "swish"}, {"clamp": "both"}, {"gated": False, "shift": 1.0}):
        with pytest.raises(ValueError):
            Gate(**wrong)  # type: ignore[arg-type]


@given(
    slots=st.lists(st.integers(-1, 6), min_size=1, max_size=40), rows=st.sampled_from([1, 4, 16])
)
@settings(max_examples=60)
def test_tiles_hold_each_pair_once_and_one_slot_each(slots: list[int], rows: int) -> None:
    tiles = cut(torch.tensor(slots), rows, distinct=7)
    seen: list[int] = []
    for start in tiles.starts.tolist():
        if start == len(slots):
            continue
        slot = int(tiles.ranked[start])
        places = [p for p in range(start, min(start + rows, len(slots))) if tiles.ranked[p] == slot]
        pairs = tiles.order[places].tolist()
        assert all(slots[pair] == slot for pair in pairs)
        seen += pairs
    assert sorted(seen) == [pair for pair, slot in enumerate(slots) if slot >= 0]


def test_a_slot_of_minus_one_contributes_nothing() -> None:
    case = slot_case(tokens=4, choices=3, absent=0.0)
    case.slots[1] = -1
    for kernel in ("auto", "plain"):
        found = slot_experts(
            case.hidden, case.slots, case.weights, case.pool, case.form, kernel=kernel
        )
        assert not found[1].any()
        assert found[0].any()


@pytest.mark.parametrize("kernel", ["auto", "plain", "triton"])
@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda c: {"hidden": c.hidden.unsqueeze(1)}, r"hidden \(3, 1, 40\) must be \[T, D\]"),
        (lambda c: {"hidden": c.hidden[0]}, "hidden's T = 40"),
        (lambda c: {"hidden": c.hidden.repeat(1, 2)}, "the experts' D = 40"),
        (lambda c: {"hidden": c.hidden[:, :8]}, "the experts' D = 40"),
        (lambda c: {"slots": c.slots.float()}, "slots are torch.float32"),
        (lambda c: {"slots": c.slots > 0}, "slots are torch.bool"),
        (lambda c: {"slots": torch.full_like(c.slots, 5)}, "slot 5 is none of the pool's 0 to 4"),
        (lambda c: {"slots": torch.full_like(c.slots, 2**40)}, "slot 1099511627776 is none"),
        (lambda c: {"hidden": c.hidden.bfloat16()}, "hidden is torch.bfloat16"),
    ],
)
def test_input_that_a_kernel_would_misread_is_refused(
    kernel: str, wrong: Callable[[SlotCase], dict[str, torch.Tensor]], hint: str
) -> None:
    case = slot_case()
    given = {"hidden": case.hidden, "slots": case.slots, "weights": case.weights} | wrong(case)
    with pytest.raises(ValueError, match=hint):
        slot_experts(**given, pool=case.pool, form=case.form, kernel=kernel)
    assert not dispatch._failures  # a caller's mistake does not cost the others Triton


def test_shapes_and_kernels_that_do_not_fit_are_refused() -> None:
    case = slot_case()
    with pytest.raises(ValueError, match=r"slots \(2, 2\)"):
        slot_experts(case.hidden, case.slots[:2], case.weights, case.pool, case.form)
    with pytest.raises(ValueError, match="known are auto, triton, plain"):
        slot_experts(case.hidden, case.slots, case.weights, case.pool, case.form, kernel="cuda")
    unknown = ExpertForm(**{**case.form.__dict__, "gate": None})
    with pytest.raises(ValueError, match="known gate"):
        slot_experts(case.hidden, case.slots, case.weights, case.pool, unknown, kernel="triton")


def test_a_kernel_that_cannot_be_built_is_replaced_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **named: Any) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    failures: list[str] = []
    monkeypatch.setattr(dispatch, "_failures", failures)
    monkeypatch.setattr(dispatch, "is_installed", lambda: True)
    monkeypatch.setattr(dispatch, "decode_parts", broken)
    monkeypatch.setattr(dispatch, "combine_parts", broken)
    case = slot_case()
    named = {"distinct": 5, "kernel": "triton"}
    parts = dispatch.contributions(case.hidden, case.slots, case.pool, case.form, **named)
    found = dispatch.combined(
        parts, case.slots, case.weights, case.form, case.hidden.dtype, kernel="triton"
    )
    wanted = slot_experts(
        case.hidden, case.slots, case.weights, case.pool, case.form, kernel="plain"
    )
    assert torch.equal(found, wanted)
    assert not dispatch.triton_takes(case.hidden, case.pool, case.form)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "Failed to find C compiler" in caplog.text


def test_running_out_of_memory_is_no_reason_to_give_triton_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: Any, **named: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    failures: list[str] = []
    monkeypatch.setattr(dispatch, "_failures", failures)
    monkeypatch.setattr(dispatch, "decode_parts", full)
    case = slot_case()
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.contributions(
            case.hidden, case.slots, case.pool, case.form, distinct=5, kernel="triton"
        )
    assert not failures
