"""The cost model beside the engine: bytes and collectives of the same tokens are equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from moe_runtime.placement.baselines import random_placement
from moe_runtime.placement.decode_steps import first_choices, recorded_steps, starts_of
from moe_runtime.placement.messages import MODES, MessageSizes
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.prefill_traffic import recorded_prefill, replay_prefill
from moe_runtime.placement.step_traffic import replay
from moe_runtime.placement.topology import Topology
from transformers import AutoConfig, AutoModelForCausalLM

import moe_runtime
from moe_runtime.parallel import ParallelRun, generate, run_ranks

PROMPTS = [[5, 9, 200, 31], [7], [44, 45, 46, 47, 48, 90, 91], [300, 2], [8, 8, 8], [1000, 17]]
NEW_TOKENS = 6


def models(top_k: int, ranks: int) -> list[Any]:
    """The bundled model once for each rank, in float32: threads share no modules."""
    path = moe_runtime.bundled_model()
    config = AutoConfig.from_pretrained(path)
    config.num_experts_per_tok = top_k
    return [
        AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()
        for _ in range(ranks)
    ]


def plan_of(config: Any, ranks: int, *, replicas: bool) -> Plan:
    rng = np.random.default_rng(2)
    layers = config.num_hidden_layers
    placement = random_placement((config.num_experts,) * layers, ranks, 1)
    if replicas:
        placement = [held | (rng.random(held.shape) < 0.1) for held in placement]
    return Plan(
        topology=Topology.of(ranks),
        layers=tuple(
            LayerPlan(layer=at, hosts=tuple(tuple(np.flatnonzero(row).tolist()) for row in held))
            for at, held in enumerate(placement)
        ),
    )


@pytest.mark.parametrize(
    ("top_k", "ranks", "replicas"), [(1, 2, False), (4, 3, False), (4, 2, True)]
)
def test_the_engine_sends_what_the_model_says(top_k: int, ranks: int, replicas: bool) -> None:
    each = models(top_k, ranks)
    config = each[0].config
    plan = plan_of(config, ranks, replicas=replicas)
    sizes = MessageSizes.of(
        hidden=config.hidden_size,
        keys_values=2 * config.num_key_value_heads * config.head_dim,
        layers=config.num_hidden_layers,
        top_k=top_k,
        itemsize=4,
        experts=config.num_experts,
        rows=len(PROMPTS),
    )
    for mode in MODES:

        def work(link: Any, mode: str = mode) -> ParallelRun:
            return generate(
                each[link.rank],
                PROMPTS,
                plan=plan,
                mode=mode,
                link=link,
                start="ended",
                max_new_tokens=NEW_TOKENS,
                stop_tokens=(),
                check="off",
            )

        run = run_ranks(work, ranks)[0]
        assert run.mode == mode
        assert run.routing is not None
        trace = run.routing.decode()
        if top_k == 1:
            trace = first_choices(trace)
        steps = recorded_steps(trace)
        assert steps.count == run.steps == NEW_TOKENS - 1
        placement = plan.matrices()
        starts = starts_of(placement, plan.topology, trace, steps, by_token=False)
        told = replay(placement, plan.topology, trace, steps, sizes, mode, starts)
        _compare(run, told, ranks, mode)


@pytest.mark.parametrize(
    ("top_k", "ranks", "replicas", "batch_size", "new_tokens"),
    [(1, 2, False, None, 2), (4, 3, True, 4, 2), (4, 2, False, None, 1)],
)
def test_the_engines_prefill_sends_what_the_model_says(
    top_k: int, ranks: int, replicas: bool, batch_size: int | None, new_tokens: int
) -> None:
    each = models(top_k, ranks)
    config = each[0].config
    plan = plan_of(config, ranks, replicas=replicas)
    sizes = MessageSizes.of(
        hidden=config.hidden_size,
        keys_values=2 * config.num_key_value_heads * config.head_dim,
        layers=config.num_hidden_layers,
        top_k=top_k,
        itemsize=4,
        experts=config.num_experts,
        rows=len(PROMPTS),
    )
    for mode in MODES:

        def work(link: Any, mode: str = mode) -> ParallelRun:
            return generate(
                each[link.rank],
                PROMPTS,
                plan=plan,
                mode=mode,
                link=link,
                batch_size=batch_size,
                max_new_tokens=new_tokens,
                stop_tokens=(),
                check="off",
            )

        run = run_ranks(work, ranks)[0]
        assert run.routing is not None
        trace = run.routing.prefill()
        calls = recorded_prefill(trace)
        assert calls.count == -(-len(PROMPTS) // (batch_size or len(PROMPTS)))
        told = replay_prefill(
            plan.matrices(),
            plan.topology,
            trace,
            calls,
            sizes,
            mode,
            steps_follow=new_tokens > 1,
        )
        expected = told.totals()
        frames, sent = 0, {}
        for entry in run.traffic:
            if entry.kind.startswith("prefill."):
                sent.setdefault(entry.kind.removeprefix("prefill."), {})[entry.layer or 0] = entry
                frames += entry.frame_bytes
        assert frames == sum(expected.pop("frames")) + expected.pop("end_frames")[0]
        assert sum(e.calls for kind in sent.values() for e in kind.values()) == told.present.sum()
        assert set(sent) == set(expected)
        for kind, layers in expected.items():
            assert [sent[kind][at].bytes for at in range(len(layers))] == layers, kind
        assert sum(expected["dispatch"]) > 0
        # The run itself says the same, beside what it has counted.
        foretold = run.predicted["prefill"]
        assert foretold["bytes"] == {
            f"prefill.{kind}": sum(layers) for kind, layers in expected.items()
        }
        assert foretold["frame_bytes"] == frames
        assert foretold["cross_bytes"] == sum(
            e.cross_bytes for kind in sent.values() for e in kind.values()
        )
        assert foretold["calls"] == told.present.sum()


def _compare(run: ParallelRun, told: Any, ranks: int, mode: str) -> None:
    counted: dict[str, dict[int, int]] = {}
    frames, calls = 0, 0
    for entry in run.traffic:
        if entry.kind.startswith(("prefill.", "record", "agree")):
            continue
        counted.setdefault(entry.kind, {})[entry.layer or 0] = entry.bytes
        frames += entry.frame_bytes
        calls += entry.calls
    expected = told.totals()
    everyone = ranks * (ranks - 1)
    if mode == "coherent":
        # After the last step nobody needs its keys and values, nor how many they would be.
        expected["keys_values"][0] -= int(told.kinds["keys_values"][-1].sum())
        expected["end_frames"][0] -= everyone * 8
    assert frames == sum(expected.pop("frames")) + expected.pop("end_frames")[0]
    assert calls == told.present.sum()
    assert set(counted) <= set(expected)
    for kind, layers in expected.items():
        mine = [counted.get(kind, {}).get(layer, 0) for layer in range(len(layers))]
        assert mine == layers, kind
    assert sum(map(sum, expected.values())) > 0
