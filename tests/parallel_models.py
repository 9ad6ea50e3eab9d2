"""Tiny models, plans and plain references for tests of expert parallelism.

Knows plain transformers and plans; spawned processes import it too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from moe_runtime.model_spec import read_spec
from moe_runtime.parallel import Link, ParallelRun, generate, run_ranks
from tiny import tiny_config

LENGTHS = (5, 9, 3, 7, 7)


def tiny(top_k: int) -> PreTrainedModel:
    """The tiny Qwen3-MoE of other tests with another number of experts a token."""
    config = tiny_config()
    config.num_experts_per_tok = top_k
    with torch.random.fork_rng():
        torch.manual_seed(31)
        return Qwen3MoeForCausalLM(config).eval()


def some_prompts(lengths: Sequence[int] = LENGTHS, low: int = 3, high: int = 64) -> list[list[int]]:
    """Prompts of unlike lengths: all batches have padding."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]


def random_plan(model: PreTrainedModel, ranks: int, seed: int = 0, replicas: int = 0) -> Plan:
    """Each expert on a random rank, some on two; ranks hold unlike numbers of experts."""
    rng = np.random.default_rng(seed)
    spec = read_spec(model)
    layers = []
    for layer in spec.layers:
        hosts = [[int(rng.integers(ranks))] for _ in range(layer.num_experts)]
        for expert in rng.permutation(layer.num_experts)[:replicas]:
            hosts[expert] = sorted({*hosts[expert], int(rng.integers(ranks))})
        layers.append(LayerPlan(layer=layer.layer, hosts=tuple(map(tuple, hosts))))
    return Plan(topology=Topology.of(ranks), layers=tuple(layers), fingerprint=spec.fingerprint)


def alone(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], steps: int
) -> tuple[tuple[tuple[int, ...], ...], dict[tuple[int, int], torch.Tensor]]:
    """Greedy tokens of each prompt run by itself, and the logits of each step."""
    tokens, logits = [], {}
    for number, prompt in enumerate(prompts):
        fed, past, mine = torch.tensor([list(prompt)]), None, []
        for step in range(steps):
            with torch.no_grad():
                output = model(input_ids=fed, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits[number, step] = output.logits[0, -1]
            mine.append(int(output.logits[0, -1].argmax()))
            fed = torch.tensor([mine[-1:]])
        tokens.append(tuple(mine))
    return tuple(tokens), logits


def on_threads(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], ranks: int, **options: Any
) -> tuple[ParallelRun, dict[tuple[int, int], torch.Tensor]]:
    """A run on threads, the same on all ranks, and the logits of each step."""
    models = [copy.deepcopy(model) for _ in range(ranks)]
    logits: dict[tuple[int, int], torch.Tensor] = {}

    def keep(number: int, step: int, row: torch.Tensor) -> None:
        assert (number, step) not in logits, "a step's token is chosen on one rank"
        logits[number, step] = row

    def work(link: Link) -> ParallelRun:
        return generate(models[link.rank], prompts, link=link, keep=keep, **options)

    runs = run_ranks(work, ranks, timeout=60.0)
    assert all(run == runs[0] for run in runs)
    return runs[0], logits


def largest_difference(
    found: dict[tuple[int, int], torch.Tensor], wanted: dict[tuple[int, int], torch.Tensor]
) -> float:
    """Largest difference of logits at a step, relative to the step's largest."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[at] - wanted[at]).abs().max() / wanted[at].abs().max()) for at in wanted
    )
