"""Options: what is refused by name, and that a policy's options reach the run and its replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moe_runtime
from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import ConfigError
from tiny import EXPERTS, LAYERS, VOCAB, TinyCheckpoints


def test_options_make_a_configuration() -> None:
    config = RuntimeConfig.from_dict({"expert_budget": "8GiB", "policy": "lfu"})
    assert (config.expert_budget, config.policy, config.layout) == ("8GiB", "lfu", "auto")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"expert_budgets": 1}, "expert_budgets"),
        ({"expert_budget": "much"}, "much"),
        ({"layout": "columns"}, "columns"),
        ({"reader_threads": 0}, "reader_threads"),
        ({"preload": "maybe"}, "maybe"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RuntimeConfig.from_dict(options)


def test_the_replay_takes_the_options_of_the_policy(tiny_checkpoints: TinyCheckpoints) -> None:
    """`static` without its counts would be refused: that it is replayed shows that they arrive."""
    counts = np.arange(LAYERS * EXPERTS, dtype=np.float64)
    model = moe_runtime.from_pretrained(
        tiny_checkpoints.per_expert,
        expert_budget="50%",
        device="cpu",
        policy="static",
        policy_options={"counts": counts},
    )
    with torch.no_grad():
        for start in range(4):
            model(torch.arange(start, start + 9)[None] % VOCAB)
    report = moe_runtime.report(model)
    simulation = report.to_dict()["simulation"]
    assert simulation["static"]["misses"] == report.counters.misses
    assert simulation["belady"]["misses"] <= simulation["static"]["misses"]
