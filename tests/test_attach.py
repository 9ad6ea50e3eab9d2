"""Attaching to a model in memory and detaching again: exactly back, and nothing else touched.

Does not repeat what `test_faults_calls` says about calls under way.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

import moe_runtime
from moe_runtime.errors import AttachError, BudgetError, TraceError
from tiny import ALL_EXPERT_BYTES, EXPERTS, FORMS, LAYERS, TinyCheckpoints, tiny_model


def logits(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(prompt).logits
    assert isinstance(found, torch.Tensor)
    return found


def tokens(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    found = model.generate(prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert isinstance(found, torch.Tensor)
    return found


def identities(model: PreTrainedModel) -> dict[str, tuple[int, int, bool]]:
    """Each Parameter's own identity, its memory, and whether it wants gradients."""
    return {
        name: (id(parameter), parameter.data_ptr(), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("budget", ["auto", "100%", "30%"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_detach_gives_the_parameters_back_untouched(
    prompt: torch.Tensor, budget: str, implementation: str
) -> None:
    model = tiny_model()
    model.set_experts_implementation(implementation)
    before = identities(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {path: set(module.__dict__) for path, module in model.named_modules()}
    expected = logits(model, prompt)

    assert moe_runtime.attach(model, expert_budget=budget, device="cpu") is model
    assert model.get_experts_implementation() != {"": implementation}
    torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-4, atol=1e-4)
    assert identities(model) == before
    counters = moe_runtime.report(model).counters
    assert counters.bytes_read == 0
    assert (counters.misses > 0) == (budget == "30%")

    assert moe_runtime.detach(model) is model
    assert identities(model) == before
    assert model.get_experts_implementation() == {"": implementation}
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == attributes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, prompt), expected)


def test_attach_in_place_takes_no_memory_and_says_so() -> None:
    model = tiny_model()
    runtime = moe_runtime.runtime_of(moe_runtime.attach(model, device="cpu"))
    assert runtime.budget.used == 0
    assert "no memory is freed" in runtime.budget.explanation
    experts = model.get_submodule("model.layers.1.mlp.experts")
    with runtime.executor.exclusive():
        held = runtime.executor._pools[1].tensors(5)
    assert held[0].data_ptr() == experts.get_parameter("gate_up_proj")[5].data_ptr()


def test_attaching_and_detaching_many_times(prompt: torch.Tensor) -> None:
    model = tiny_model()
    before, expected = identities(model), logits(model, prompt)
    for policy, budget in [("lru", "25%"), ("lfu", "auto"), ("lru", "100%")]:
        moe_runtime.attach(model, expert_budget=budget, policy=policy, device="cpu")
        torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(AttachError, match="attached already"):
            moe_runtime.attach(model, device="cpu")
        moe_runtime.detach(model)
        with pytest.raises(AttachError, match="no runtime"):
            moe_runtime.report(model)
    assert identities(model) == before
    assert torch.equal(logits(model, prompt), expected)


def test_a_failed_attach_leaves_the_model_as_it_was(prompt: torch.Tensor) -> None:
    model = tiny_model()
    implementation = model.get_experts_implementation()
    expected = logits(model, prompt)
    for options in ({"expert_budget": 10}, {"policy": "fifo"}, {"expert_budget": "much"}):
        with pytest.raises(ValueError, match=r"10|fifo|much"):
            moe_runtime.attach(model, device="cpu", **options)
    assert model.get_experts_implementation() == implementation
    assert torch.equal(logits(model, prompt), expected)
    moe_runtime.attach(model, expert_budget="50%", device="cpu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["native", "rows"])
def test_detach_of_a_paged_model_loads_everything(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    form: str,
    dtype: torch.dtype,
    layout: str,
) -> None:
    path = tiny_checkpoints.form(form)
    plain = Qwen3MoeForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model = moe_runtime.from_pretrained(
        path, expert_budget="30%", device="cpu", dtype=dtype, layout=layout
    )
    logits(model, prompt)  # some experts come from slots, the others from disk
    moe_runtime.detach(model)
    assert type(model) is type(plain)
    assert model.get_experts_implementation() == plain.get_experts_implementation()
    found = dict(model.named_parameters())
    assert list(found) == [name for name, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        assert type(found[name]) is torch.nn.Parameter
        assert found[name].dtype == parameter.dtype
        assert torch.equal(found[name], parameter), name
    plain.set_experts_implementation("eager")
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model, prompt), logits(plain, prompt))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_detached_model_can_be_trained_and_attached_again(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor
) -> None:
    model = moe_runtime.from_pretrained(tiny_checkpoints.fused, expert_budget="30%", device="cpu")
    expected = logits(model, prompt)
    moe_runtime.detach(model)
    model.train()
    model(prompt, labels=prompt).loss.backward()
    gradient = model.get_submodule("model.layers.0.mlp.experts").get_parameter("down_proj").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    model.eval()
    moe_runtime.attach(model, expert_budget="30%", device="cpu")
    torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("free", [0, ALL_EXPERT_BYTES - 1])
def test_detach_without_room_refuses_and_names_the_bytes(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
) -> None:
    model = moe_runtime.from_pretrained(
        tiny_checkpoints.per_expert, expert_budget="30%", device="cpu"
    )
    expected = logits(model, prompt)
    with monkeypatch.context() as patch:
        patch.setattr("moe_runtime.lifecycle.free_memory", lambda device: free)
        with pytest.raises(BudgetError, match=str(ALL_EXPERT_BYTES)):
            moe_runtime.detach(model)
    assert torch.equal(logits(model, prompt), expected)
    moe_runtime.runtime_of(model).check_integrity()
    moe_runtime.detach(model)


# -- one configuration, several models -----------------------------------------------------------


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model with the tiny model's weights and this one's configuration object."""
    twin = Qwen3MoeForCausalLM(model.config)
    twin.load_state_dict(tiny_model().state_dict())
    return twin.eval()


def calls_of(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Modules that run transformers' own experts function of this name from now on."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls: list[Any] = []
    plain = ALL_EXPERTS_FUNCTIONS[name]

    def note(module: Any, *arguments: Any) -> Any:
        calls.append(module)
        return plain(module, *arguments)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, note)
    return calls


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_what_is_not_owned_runs_its_previous_implementation(
    prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    owned = tiny_model()
    owned.set_experts_implementation(name)
    other = twin_of(owned)
    expected = logits(other, prompt)
    calls = calls_of(other, monkeypatch, name)
    moe_runtime.attach(owned, expert_budget="30%", device="cpu")
    assert torch.equal(logits(other, prompt), expected)
    assert calls == [m for path, m in other.named_modules() if path.endswith(".experts")]
    calls.clear()
    logits(owned, prompt)
    assert calls == []


@pytest.mark.parametrize("leaves", ["first", "second"])
@pytest.mark.parametrize("paged", [False, True])
def test_of_two_attached_models_either_may_leave_first(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor, leaves: str, paged: bool
) -> None:
    if paged:
        first = moe_runtime.from_pretrained(
            tiny_checkpoints.per_expert, expert_budget="30%", device="cpu"
        )
    else:
        first = moe_runtime.attach(tiny_model(), expert_budget="30%", device="cpu")
    second = moe_runtime.attach(twin_of(first), expert_budget="50%", device="cpu")
    assert first.config is second.config
    expected = tokens(tiny_model(), prompt)
    gone, stays = (first, second) if leaves == "first" else (second, first)
    moe_runtime.detach(gone)
    assert torch.equal(tokens(gone, prompt), expected)
    steps = moe_runtime.report(stays).counters.steps
    assert torch.equal(tokens(stays, prompt), expected)
    # It is still the runtime that runs it, and counts.
    assert moe_runtime.report(stays).counters.steps > steps
    hits = moe_runtime.report(stays).counters.hits
    assert torch.equal(tokens(stays, prompt), expected)
    assert moe_runtime.report(stays).counters.hits > hits
    moe_runtime.detach(stays)
    assert torch.equal(tokens(stays, prompt), expected)
    assert stays.config._experts_implementation != "moe_runtime"


def test_a_model_that_is_dropped_leaves_its_configuration_usable(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor
) -> None:
    model = moe_runtime.from_pretrained(
        tiny_checkpoints.per_expert, expert_budget="30%", device="cpu"
    )
    twin = twin_of(model)
    expected = tokens(model, prompt)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert torch.equal(tokens(twin, prompt), expected)


# -- what else is done to models -----------------------------------------------------------------


def attached(checkpoints: TinyCheckpoints) -> PreTrainedModel:
    return moe_runtime.attach(tiny_model(), expert_budget="30%", device="cpu")


def paged(checkpoints: TinyCheckpoints) -> PreTrainedModel:
    model = moe_runtime.from_pretrained(checkpoints.fused, expert_budget="30%", device="cpu")
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("make", [attached, paged])
def test_report_and_record(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    make: Callable[[TinyCheckpoints], PreTrainedModel],
) -> None:
    model = make(tiny_checkpoints)
    with moe_runtime.record(model) as recorder:
        with pytest.raises(TraceError, match="nothing was recorded"):
            _ = recorder.trace
        tokens(model, prompt)
    tokens(model, prompt)  # not recorded
    assert recorder.trace.tokens == prompt.shape[1] + 7
    assert recorder.trace.experts == (EXPERTS,) * LAYERS
    counters = moe_runtime.report(model).counters
    assert counters.steps == 2 * 8
    assert counters.tokens == 2 * recorder.trace.tokens
    assert (counters.bytes_read > 0) == (make is paged)
    moe_runtime.runtime_of(model).reset_counters()
    assert moe_runtime.report(model).counters.steps == 0
    moe_runtime.runtime_of(model).check_integrity()


@pytest.mark.parametrize("make", [attached, paged])
def test_moving_to_where_it_is_changes_nothing(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    make: Callable[[TinyCheckpoints], PreTrainedModel],
) -> None:
    model = make(tiny_checkpoints)
    expected = logits(model, prompt)
    for move in (
        lambda: model.to("cpu"),
        model.cpu,
        lambda: model.to(torch.device("cpu"), torch.float32),
        model.float,
        lambda: model.eval().train().eval(),
        lambda: model.requires_grad_(False),
    ):
        assert move() is model
        assert torch.equal(logits(model, prompt), expected)


def test_growing_the_vocabulary_works(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor
) -> None:
    model, plain = paged(tiny_checkpoints), tiny_model()
    size = model.get_input_embeddings().weight.shape[0]
    for each in (model, plain):
        each.resize_token_embeddings(size + 8, mean_resizing=False)
    found, expected = logits(model, prompt), logits(plain, prompt)
    assert found.shape[-1] == size + 8
    torch.testing.assert_close(found[..., :size], expected[..., :size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", ["add", "index", "numpy"])
def test_paged_parameters_say_what_to_do(tiny_checkpoints: TinyCheckpoints, use: str) -> None:
    model = paged(tiny_checkpoints)
    weight: Any = model.get_submodule("model.layers.1.mlp.experts").get_parameter("down_proj")
    assert weight.shape == (EXPERTS, 32, 24)
    with pytest.raises((AttachError, RuntimeError), match=r"detach|paged|numpy"):
        _ = {
            "add": lambda: weight + 1,
            "index": lambda: weight[3],
            "numpy": weight.numpy,
        }[use]()
