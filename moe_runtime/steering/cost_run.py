"""Measuring what steering costs: the same tokens generated with and without it, in turns.

Does not know how experts are reinforced, nor how the outcome is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from moe_runtime.errors import ConfigError
from moe_runtime.run_record import machine
from moe_runtime.runtime import record, runtime_of
from moe_runtime.steering.attach import steer
from moe_runtime.steering.cost import ARMS, ArmName, CostArm, CostRun, SteeredExpert, SteeringCost
from moe_runtime.steering.shift import routing_shift
from moe_runtime.steering.values import Steering
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__

__all__ = ["measure_cost"]

Tokens = list[int]


class _Given(LogitsProcessor):
    """Lets `generate` choose the tokens of a given sequence, whatever the model prefers."""

    def __init__(self, sequence: Tokens) -> None:
        self._sequence = sequence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._sequence[input_ids.shape[1]]] = 0.0
        return forced


def measure_cost(
    model: PreTrainedModel,
    steering: Steering,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    rounds: int = 5,
    pin: bool = True,
    tokenizer: Any = None,
    name: str = "",
    progress: Callable[[str], None] | None = None,
) -> SteeringCost:
    """Hits, misses, bytes and tokens/s with and without steering, and the routing shift.

    The unsteered model continues each prompt greedily. The arms then produce these same tokens at
    batch 1, so that differences are steering's and not the text's; one more arm goes on with what
    the steered model chooses itself. In each round all arms run one after another, their order
    turned from round to round. Before a run its first prompt runs once unmeasured, so that the
    cache is the arm's own.

    Args:
        model: run by the runtime, in the budget of interest.
        steering: one beta for each expert, not one for each row.
        prompts: token ids, each at least one.
        max_new_tokens: of each prompt.
        rounds: of all arms; figures are medians over them.
        pin: also measure the steered experts in slots of their own.
        tokenizer: for steering within thinking markers.
        name: of the steering, for the record.
        progress: told what runs now.

    Raises:
        ConfigError: no prompt, an empty one, betas for rows, or an encoder-decoder model.
        AttachError: the runtime does not run this model.
    """
    runtime = runtime_of(model)
    _check(model, steering, prompts, rounds)
    say = progress or (lambda _: None)
    arms: list[ArmName] = [one for one in ARMS if pin or one != "pinned"]

    @contextmanager
    def inside(arm: ArmName) -> Iterator[None]:
        if arm == "unsteered":
            yield
        else:
            with steer(model, steering, tokenizer=tokenizer, pin=arm == "pinned"):
                yield

    say("continuing the prompts unsteered")
    texts = [_generate(model, prompt, None, max_new_tokens) for prompt in prompts]
    say("recording the routing")
    plain = _recorded(model, texts)
    with inside("steered"):
        moved = _recorded(model, texts)
    runs: dict[ArmName, list[CostRun]] = {arm: [] for arm in arms}
    for number in range(rounds):
        turn = number % len(arms)
        for arm in (*arms[turn:], *arms[:turn]):
            say(f"round {number + 1} of {rounds}: {ARMS[arm]}")
            given = [None] * len(prompts) if arm == "own" else texts
            with inside(arm):
                runs[arm].append(_run(model, prompts, given, max_new_tokens))
    return SteeringCost(
        model_id=runtime.spec.model_id,
        fingerprint=runtime.spec.fingerprint,
        steering=name,
        method=steering.method,
        renormalise=steering.renormalise,
        thinking=steering.thinking or (),
        experts=_uses(steering, plain, moved),
        budget=str(runtime.config.expert_budget),
        slots=sum(runtime.budget.slots),
        all_experts=runtime.spec.grid.size,
        policy=runtime.config.policy,
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        arms=tuple(CostArm(name=arm, rounds=tuple(runs[arm])) for arm in arms),
        shift=routing_shift(plain, moved),
        versions=(
            ("moe_runtime", __version__),
            ("torch", str(torch.__version__)),
            ("transformers", transformers.__version__),
        ),
        machine=_machine(runtime.device.torch_device),
    )


def _check(
    model: PreTrainedModel, steering: Steering, prompts: Sequence[Sequence[int]], rounds: int
) -> None:
    if model.config.is_encoder_decoder:
        raise ConfigError(
            "cost of steering: measured on models that go on with their prompt, and this one has "
            "an encoder"
        )
    if not prompts:
        raise ConfigError("cost of steering: no prompts; give one at least")
    if rounds < 1:
        raise ConfigError(f"cost of steering: rounds has to be 1 or more, found {rounds}")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"cost of steering: prompt {number} has no token; leave it out")
    for (layer, expert), beta in steering.betas.items():
        if isinstance(beta, tuple):
            raise ConfigError(
                f"cost of steering: beta of expert {expert} in layer {layer} is for the rows of a "
                "batch; it is measured at batch 1, so give one number"
            )


@torch.no_grad()
def _generate(
    model: PreTrainedModel, prompt: Sequence[int], given: Tokens | None, new_tokens: int
) -> Tokens:
    """Prompt and continuation: the model's greedy one, or the given one."""
    ids = torch.tensor([list(prompt)], device=model.device)
    processors = LogitsProcessorList([] if given is None else [_Given(given)])
    if given is not None:
        new_tokens = len(given) - len(prompt)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=processors,
    )
    found: Tokens = output[0].tolist()
    assert given is None or found == given
    return found


@torch.no_grad()
def _recorded(model: PreTrainedModel, texts: Sequence[Tokens]) -> RoutingTrace:
    """The routing of whole texts, read in one call each."""
    with record(model) as recorder:
        for text in texts:
            model(input_ids=torch.tensor([text], device=model.device))
    return recorder.trace


def _run(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    given: Sequence[Tokens | None],
    new_tokens: int,
) -> CostRun:
    """All prompts once, after the first has warmed the cache up."""
    runtime = runtime_of(model)
    _generate(model, prompts[0], given[0], new_tokens)
    runtime.reset_counters()
    began = time.perf_counter()
    made = 0
    for prompt, text in zip(prompts, given, strict=True):
        made += len(_generate(model, prompt, text, new_tokens)) - len(prompt)
    seconds = time.perf_counter() - began
    totals, counters = runtime.profiler.totals, runtime.cache.counters
    return CostRun(
        new_tokens=made,
        seconds=round(seconds, 6),
        decode_tokens=int(totals["decode_tokens"]),
        decode_seconds=round(totals["decode_seconds"], 6),
        hits=int(counters.hits.sum()),
        misses=int(counters.misses.sum()),
        bytes_read=int(runtime.profiler.bytes_read.sum()),
        stall_seconds=round(sum(runtime.profiler.stall_seconds), 6),
    )


def _uses(
    steering: Steering, plain: RoutingTrace, moved: RoutingTrace
) -> tuple[SteeredExpert, ...]:
    """How often the steered experts were chosen, before and after."""
    found = []
    for (layer, expert), beta in steering.betas.items():
        assert not isinstance(beta, tuple)
        at = plain.grid.position[layer]
        shares = [
            round(float((trace.topk_ids[:, at] == expert).any(1).mean()), 6)
            for trace in (plain, moved)
        ]
        found.append(
            SteeredExpert(
                layer=layer, expert=expert, beta=beta, uses=shares[0], steered_uses=shares[1]
            )
        )
    return tuple(found)


def _machine(device: torch.device) -> tuple[tuple[str, str], ...]:
    told = machine(device)
    return tuple((name, str(told[name])) for name in ("processor", "cores", "device_name"))
