"""Expert parallelism: tokens and logits of one process, whatever the mode, plan and ranks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import architectures
from gloo_runs import check_gloo_run
from moe_runtime import bundled_model, generate_batches
from moe_runtime.errors import ConfigError, ParallelError, PlanError, UnsupportedModelError
from moe_runtime.model_spec import read_spec
from moe_runtime.parallel import Link, ParallelOptions, generate, run_ranks
from parallel_models import (
    alone,
    largest_difference,
    on_threads,
    random_plan,
    some_prompts,
    tiny,
)

STEPS = 6
ARCHITECTURES = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",  # shared experts
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "DeepseekV3ForCausalLM",  # latent attention, a dense layer, shared experts
    "GptOssForCausalLM",  # sliding windows, sinks, biases
)


def close_to_one_process(
    model: PreTrainedModel, prompts: list[list[int]], ranks: int, **options: Any
) -> Any:
    want, logits = alone(model, prompts, STEPS)
    run, found = on_threads(
        model, prompts, ranks, max_new_tokens=STEPS, stop_tokens=(), check="stop", **options
    )
    assert run.outputs == want
    assert largest_difference(found, logits) < 1e-5
    assert run.mode == options["mode"]
    return run


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_and_logits_are_those_of_one_process(name: str) -> None:
    case = next(one for one in architectures.cases() if one.name == name)
    model = architectures.build(case, torch.float32)
    for mode in ("vanilla", "coherent"):
        run = close_to_one_process(
            model, some_prompts(), 2, mode=mode, plan=random_plan(model, 2, seed=4)
        )
        layers = [layer.layer for layer in random_plan(model, 2).layers]
        assert mode == "vanilla" or list(run.lean) == layers


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 0), (3, 0), (3, 6)])
def test_any_number_of_ranks_and_replicas_gives_the_same_tokens(
    top_k: int, ranks: int, replicas: int
) -> None:
    model = tiny(top_k)
    plan = random_plan(model, ranks, seed=ranks, replicas=replicas)
    for mode in ("vanilla", "coherent"):
        run = close_to_one_process(model, some_prompts(), ranks, mode=mode, plan=plan)
        if top_k == 1 and mode == "coherent":
            layers = len(plan.layers)
            assert run.calls_of("partial_sums") == 0
            assert run.calls_of("move") == layers * (STEPS - 1)  # one all-to-all a layer
            assert sum(one.calls for one in run.decode_traffic) == (layers + 1) * (STEPS - 1)
        if top_k == 1 and mode == "vanilla":
            assert sum(one.calls for one in run.decode_traffic if one.kind != "tokens") == 2 * len(
                plan.layers
            ) * (STEPS - 1)


def test_more_ranks_than_prompts_and_one_new_token() -> None:
    model = tiny(2)
    prompts = some_prompts((4, 6))
    want, _ = alone(model, prompts, STEPS)
    for mode in ("vanilla", "coherent"):
        run, _ = on_threads(model, prompts, 3, mode=mode, max_new_tokens=STEPS, stop_tokens=())
        assert run.outputs == want
        short, _ = on_threads(model, prompts, 3, mode=mode, max_new_tokens=1, stop_tokens=())
        assert short.outputs == tuple(tokens[:1] for tokens in want)
        assert short.keys_values_bytes == 0


def test_sequences_end_one_by_one_and_batches_follow_each_other() -> None:
    model = tiny(4)
    prompts = some_prompts((5, 9, 3, 7, 7, 2, 4))
    want, _ = alone(model, prompts, 9)
    stop = {want[0][2], want[3][4], want[5][0]}
    ends = [next((at for at, t in enumerate(row) if t in stop), 8) + 1 for row in want]
    assert len(set(ends)) > 2
    for mode in ("vanilla", "coherent"):
        for batch_size in (None, 3):
            run, _ = on_threads(
                model,
                prompts,
                2,
                mode=mode,
                max_new_tokens=9,
                stop_tokens=stop,
                batch_size=batch_size,
            )
            assert run.outputs == tuple(row[:end] for row, end in zip(want, ends, strict=True))


def test_drawn_tokens_are_those_of_generate_batches_on_any_number_of_ranks() -> None:
    model = tiny(4)
    prompts = some_prompts()
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.5, "seed": 7}
    want = generate_batches(
        model, prompts, batch_size=5, schedule="order", stop_tokens=(), **options
    )
    greedy, _ = alone(model, prompts, 5)
    assert want.outputs != greedy
    for mode, ranks in (("vanilla", 2), ("coherent", 1), ("coherent", 3)):
        run, _ = on_threads(model, prompts, ranks, mode=mode, stop_tokens=(), **options)
        assert run.outputs == want.outputs, (mode, ranks)


def test_layers_without_a_norm_to_be_found_carry_both_and_agree() -> None:
    class Doubled(nn.Module):
        """A norm in two halves: no child module's output is what the experts get."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.norm(hidden)

    model = tiny(4)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: (args[0] * 1.25,))
        layer.post_attention_layernorm = Doubled(layer.post_attention_layernorm)
    run = close_to_one_process(
        model, some_prompts(), 2, mode="coherent", plan=random_plan(model, 2, seed=4)
    )
    assert run.lean == ()


def test_a_model_that_does_more_with_its_experts_is_refused_or_runs_vanilla() -> None:
    model = tiny(4)
    for layer in model.model.layers:  # what experts give is scaled: zeros do not show it
        layer.mlp.register_forward_hook(lambda _, __, output: output * 1.5)
    prompts = some_prompts()
    want, _ = alone(model, prompts, 3)
    plan = random_plan(model, 2, seed=4)
    options: dict[str, Any] = {"plan": plan, "max_new_tokens": 3, "stop_tokens": ()}
    run, _ = on_threads(model, prompts, 2, **options)
    assert (run.asked, run.mode) == ("coherent", "vanilla")
    assert run.check is not None
    assert not run.check.passed
    assert "logits differ" in run.check.reason
    assert run.outputs == want
    with pytest.raises(UnsupportedModelError, match=r"does not fit Qwen3Moe.*logits differ"):
        on_threads(model, prompts, 2, check="stop", **options)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny(2)
    prompts = some_prompts()
    before = model(torch.tensor(prompts[:1])).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def work(link: Link) -> None:
        generate(model, prompts, link=link, max_new_tokens=3)

    run_ranks(work, 1)
    assert torch.equal(model(torch.tensor(prompts[:1])).logits, before)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = tiny(2)
    prompts = some_prompts()
    plan = random_plan(model, 2)
    with pytest.raises(PlanError, match="2 devices, but 3 ranks"):
        on_threads(model, prompts, 3, plan=plan)
    with pytest.raises(PlanError, match="layer"):
        on_threads(model, prompts, 2, plan=replace(plan, layers=plan.layers[1:], top_k=()))
    with pytest.raises(ConfigError, match="prompt 1 has the token id 4000"):
        on_threads(model, [[1], [4000]], 2, plan=plan)
    with pytest.raises(ConfigError, match="no prompts"):
        on_threads(model, [], 2, plan=plan)
    models = [copy.deepcopy(model) for _ in range(2)]
    with pytest.raises(ParallelError, match="the ranks differ in prompts"):
        run_ranks(lambda link: generate(models[link.rank], [[1 + link.rank]], link=link), 2)
    for wrong in (
        {"mode": "coherrent"},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"seed": -1},
        {"batch_size": 0},
        {"check": "maybe"},
        {"start": "somewhere"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ParallelOptions(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bundled_model_gives_the_tokens_of_one_process(ranks: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()
    prompts = some_prompts((5, 9, 3, 7, 12, 4, 8, 6), high=4000)
    for mode in ("vanilla", "coherent"):
        close_to_one_process(
            model, prompts, ranks, mode=mode, plan=random_plan(model, ranks, seed=4)
        )


def test_a_path_is_loaded_and_experts_may_be_given_apart() -> None:
    prompts = some_prompts((5, 3), high=4000)
    apart = AutoModelForCausalLM.from_pretrained(bundled_model()).eval()
    want, _ = alone(apart, prompts, 3)
    spec = read_spec(apart)
    tensors = {
        layer.layer: {
            param.name: apart.get_parameter(f"{layer.path}.{param.name}").detach().clone()
            for param in layer.params
        }
        for layer in spec.layers
    }
    for layer in spec.layers:  # whatever the model itself holds is not looked at
        for param in layer.params:
            apart.get_parameter(f"{layer.path}.{param.name}").data.fill_(float("nan"))

    def work(link: Link) -> None:
        options: dict[str, Any] = {"link": link, "max_new_tokens": 3, "stop_tokens": ()}
        assert generate(bundled_model(), prompts, **options).outputs == want
        assert generate(apart, prompts, experts=tensors, **options).outputs == want

    run_ranks(work, 1)


@pytest.mark.slow
def test_two_gloo_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(check_gloo_run, args=(str(tmp_path),), nprocs=2)
