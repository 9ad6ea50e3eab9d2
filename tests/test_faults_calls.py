"""Calls at the wrong moment: interrupts, threads, attach and detach, training, shared configs."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import threading
import time
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)

import moe_runtime
from moe_runtime.errors import (
    AttachError,
    MoERuntimeError,
)
from running import FailAt, assert_usable, generate, load
from tiny import (
    VOCAB,
    TinyCheckpoints,
    tiny_model,
)


@pytest.fixture
def model(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    return load(tiny_checkpoints.per_expert)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("number", [1, 2, 17, 90, 200])
def test_ctrl_c_in_the_middle_leaves_the_model_usable(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
    exact: bool,
    number: int,
) -> None:
    model = load(tiny_checkpoints.per_expert, exact=exact)
    # To the main thread, as a terminal does; the read itself goes on.
    fail_at(number, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt)
    assert_usable(model, prompt, eager_tokens)


@pytest.mark.parametrize("exact", [False, True])
def test_ctrl_c_at_any_moment_leaves_the_model_usable(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    exact: bool,
) -> None:
    # Python loses an interrupt that arrives in a finalizer: none of an earlier test's may run.
    gc.collect()
    model = load(tiny_checkpoints.per_expert, exact=exact)
    began = time.perf_counter()
    generate(model, prompt)
    seconds = time.perf_counter() - began
    moments = random.Random(3)
    interrupted = 0
    for _ in range(10):
        timer = threading.Timer(
            moments.random() * seconds, lambda: os.kill(os.getpid(), signal.SIGINT)
        )
        try:  # which begins before the clock: on a busy machine the signal may come at once
            timer.start()
            generate(model, prompt)
            timer.join()
            time.sleep(0.05)  # the signal is handled here if the call was the faster
        except KeyboardInterrupt:
            interrupted += 1
        assert_usable(model, prompt, eager_tokens)
    assert interrupted == 10


@pytest.mark.parametrize("attached", [False, True])
def test_a_call_that_ctrl_c_ended_in_the_models_own_code_is_over(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    attached: bool,
) -> None:
    """PyTorch runs no hook then: nobody tells the runtime that the call has ended."""
    if attached:
        model = moe_runtime.attach(tiny_model(), expert_budget="50%", device="cpu")
    else:
        model = load(tiny_checkpoints.per_expert)

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    with moe_runtime.record(model) as recorder:
        generate(model, prompt)
        rows = recorder.trace.tokens
        hook = model.model.layers[2].self_attn.register_forward_pre_hook(press)
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompt)
        hook.remove()
        assert recorder.trace.tokens == rows  # layers 0 and 1 alone make no rows
        generate(model, prompt)
        assert recorder.trace.tokens == 2 * rows
        hook = model.model.layers[2].self_attn.register_forward_pre_hook(press)
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompt)
        hook.remove()
    assert recorder.trace.tokens == 2 * rows
    moe_runtime.detach(model)
    assert torch.equal(generate(model, prompt), eager_tokens)


def test_an_interrupt_raised_inside_the_reader_reaches_the_caller(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    fail_at(40, interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt)
    assert_usable(model, prompt, eager_tokens)


@pytest.mark.parametrize("exact", [False, True])
def test_two_threads_on_one_model_get_right_results_or_a_refusal(
    tiny_checkpoints: TinyCheckpoints, exact: bool
) -> None:
    model = load(tiny_checkpoints.per_expert, exact=exact)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB, (1, 9 + 3 * i), generator=generator) for i in range(4)]
    wanted = [generate(model, prompt) for prompt in prompts]
    outcomes: list[torch.Tensor | BaseException | None] = [None] * len(prompts)
    barrier = threading.Barrier(len(prompts))

    def work(number: int) -> None:
        barrier.wait()
        try:
            outcomes[number] = generate(model, prompts[number])
        except BaseException as error:  # noqa: BLE001 - looked at below
            outcomes[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    served = 0
    for outcome, tokens in zip(outcomes, wanted, strict=True):
        if isinstance(outcome, torch.Tensor):
            assert torch.equal(outcome, tokens)
            served += 1
        else:
            assert isinstance(outcome, MoERuntimeError), repr(outcome)
    assert served >= 1
    assert_usable(model, prompts[0], wanted[0])


def test_attaching_twice_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(AttachError, match="attached already"):
        moe_runtime.attach(model)
    plain = moe_runtime.attach(tiny_model(), expert_budget="50%", device="cpu")
    with pytest.raises(AttachError, match="attached already"):
        moe_runtime.attach(plain, expert_budget="25%", device="cpu")
    moe_runtime.detach(plain)
    moe_runtime.attach(plain, expert_budget="25%", device="cpu")


def test_detaching_what_is_not_attached_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(AttachError, match="no runtime"):
        moe_runtime.detach(tiny_model())
    moe_runtime.detach(model)
    with pytest.raises(AttachError, match="no runtime"):
        moe_runtime.detach(model)


@pytest.mark.parametrize("attached", [False, True])
def test_detach_inside_a_call_is_refused_and_the_call_goes_on(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    attached: bool,
) -> None:
    if attached:
        model = moe_runtime.attach(tiny_model(), expert_budget="50%", device="cpu")
    else:
        model = load(tiny_checkpoints.per_expert)
    refusals: list[MoERuntimeError] = []

    def detach_now(*_: Any) -> None:
        with pytest.raises(AttachError, match="under way") as caught:
            moe_runtime.detach(model)
        refusals.append(caught.value)

    hook = model.model.layers[2].register_forward_pre_hook(detach_now)
    assert torch.equal(generate(model, prompt), eager_tokens)
    hook.remove()
    assert refusals
    assert_usable(model, prompt, eager_tokens)
    moe_runtime.detach(model)
    assert torch.equal(generate(model, prompt), eager_tokens)


def test_detach_from_another_thread_waits_or_is_refused(
    model: PreTrainedModel, prompt: torch.Tensor, eager_tokens: torch.Tensor
) -> None:
    outcomes: list[BaseException | None] = []
    threads: list[threading.Thread] = []

    def detach_now() -> None:
        try:
            moe_runtime.detach(model)
            outcomes.append(None)
        except BaseException as error:  # noqa: BLE001 - looked at below
            outcomes.append(error)

    def start(*_: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=detach_now))
            threads[0].start()

    hook = model.model.layers[2].register_forward_pre_hook(start)
    assert torch.equal(generate(model, prompt), eager_tokens)
    hook.remove()
    threads[0].join(timeout=120)
    assert not threads[0].is_alive(), "detach hangs"
    assert outcomes[0] is None or isinstance(outcomes[0], AttachError), repr(outcomes[0])
    assert torch.equal(generate(model, prompt), eager_tokens)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_gradients_are_right_or_refused(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor, training: bool, attached: bool
) -> None:
    def embedding_gradient(model: PreTrainedModel) -> torch.Tensor:
        model.train(training)
        model(prompt, labels=prompt).loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        assert isinstance(gradient, torch.Tensor)
        return gradient

    reference = embedding_gradient(tiny_model())
    if attached:
        model = moe_runtime.attach(tiny_model(), expert_budget="50%", device="cpu")
    else:
        model = load(tiny_checkpoints.per_expert)
    try:
        gradient = embedding_gradient(model)
    except MoERuntimeError as error:
        assert re.search("gradient|train", str(error))  # noqa: PT017 - either outcome is right
    else:
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_training_mode_without_gradients_generates_as_ever(
    model: PreTrainedModel, prompt: torch.Tensor, eager_tokens: torch.Tensor
) -> None:
    model.train()  # no dropout in this model; generate runs without gradients
    assert_usable(model, prompt, eager_tokens)


def test_a_forward_call_with_gradients_enabled_gives_the_logits(
    model: PreTrainedModel, prompt: torch.Tensor
) -> None:
    logits = model(prompt).logits
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, logits)


def test_a_plain_model_that_shares_the_config_is_left_alone(
    model: PreTrainedModel, prompt: torch.Tensor, eager_tokens: torch.Tensor
) -> None:
    plain = tiny_model()
    twin = Qwen3MoeForCausalLM(model.config)
    twin.load_state_dict(plain.state_dict())
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(twin(prompt).logits, plain(prompt).logits)
    assert_usable(model, prompt, eager_tokens)
    assert torch.equal(generate(twin, prompt), eager_tokens)


def test_two_attached_models_that_share_a_config_do_not_mix(
    prompt: torch.Tensor, eager_tokens: torch.Tensor
) -> None:
    first = tiny_model()
    second = Qwen3MoeForCausalLM(first.config)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second.init_weights()
    second.eval()
    before = first.config._experts_implementation
    other = generate(second, prompt)
    assert not torch.equal(other, eager_tokens)
    moe_runtime.attach(first, expert_budget="50%", device="cpu")
    assert torch.equal(generate(second, prompt), other)
    moe_runtime.attach(second, expert_budget="50%", device="cpu")
    assert_usable(first, prompt, eager_tokens)
    assert_usable(second, prompt, other)
    moe_runtime.detach(first)
    assert torch.equal(generate(first, prompt), eager_tokens)
    assert_usable(second, prompt, other)
    moe_runtime.detach(second)
    assert torch.equal(generate(second, prompt), other)
    assert torch.equal(generate(first, prompt), eager_tokens)
    assert first.config._experts_implementation == before


def test_attach_and_detach_leave_no_trace(prompt: torch.Tensor) -> None:
    model = tiny_model()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    names = set(model.__dict__)
    with torch.no_grad():
        logits = model(prompt).logits
    moe_runtime.attach(model, expert_budget="50%", device="cpu")
    generate(model, prompt)
    moe_runtime.detach(model)
    assert set(model.__dict__) == names
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in parameters.items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, logits)
