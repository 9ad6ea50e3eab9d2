"""Outputs never depend on the cache: the same bits whatever fits, whatever leaves, wherever the
weights come from.

Does not look at what the cache holds, only at what the model gives.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError
from moe_runtime.eviction import POLICY_NAMES, make_policy
from outputs import Checkpoint, Outputs, least, load, load_plain, outputs, same_bits
from tiny import EXPERTS, HIDDEN, LAYERS, TOP_K, TinyCheckpoints


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Outputs:
    """With every expert in its slot."""
    path, options = checkpoint
    model = load(path, "100%", **options)
    found = outputs(model)
    assert moe_runtime.report(model).counters.misses == 0
    return found


def policies_without_options() -> list[str]:
    grid = ExpertGrid(layers=(0,), experts=(4,))
    found = []
    for name in POLICY_NAMES:
        try:
            make_policy(name, grid)
        except ConfigError:
            continue
        found.append(name)
    return found


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policies_without_options())
def test_bits_do_not_depend_on_budget_and_policy(
    checkpoint: Checkpoint, reference: Outputs, policy: str
) -> None:
    path, options = checkpoint
    for budget in ("25%", least(path, **options)):
        model = load(path, budget, policy=policy, **options)
        assert same_bits(outputs(model), reference)
        counters = moe_runtime.report(model).counters
        assert min(counters.evictions, counters.rereads, counters.bytes_read) > 0
        moe_runtime.runtime_of(model).check_integrity()


@pytest.mark.parametrize("threads", [1, 4])
def test_bits_do_not_depend_on_reader_threads(
    checkpoint: Checkpoint, reference: Outputs, threads: int
) -> None:
    path, options = checkpoint
    model = load(path, "60%", reader_threads=threads, **options)
    assert same_bits(outputs(model), reference)
    smallest = load(path, least(path, **options), reader_threads=threads, **options)
    assert same_bits(outputs(smallest), reference)


@pytest.mark.parametrize("budget", ["100%", "25%", "20%"])
def test_bits_do_not_depend_on_disk_or_host_tier(
    checkpoint: Checkpoint, reference: Outputs, budget: str
) -> None:
    path, options = checkpoint
    plain = load_plain(path, options["dtype"])
    model = moe_runtime.attach(plain, expert_budget=budget, device="cpu", layout=options["layout"])
    assert same_bits(outputs(model), reference)
    assert moe_runtime.report(model).counters.bytes_read == 0


def test_bits_do_not_depend_on_what_ran_before(checkpoint: Checkpoint, reference: Outputs) -> None:
    path, options = checkpoint
    model = load(path, "40%", **options)
    for _ in range(2):
        assert same_bits(outputs(model), reference)


def experts_outputs(model: PreTrainedModel) -> Outputs:
    """What the experts modules alone give for several tokens and for one."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(25, HIDDEN, generator=generator)
    index = torch.rand(25, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.rand(25, TOP_K, generator=generator)
    found = []
    for layer in range(LAYERS):
        module = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for rows in (slice(25), slice(1)):
            with torch.no_grad():
                found.append(module(hidden[rows], index[rows], weights[rows]))
    return found


@pytest.mark.parametrize("form", ["fused", "per_expert_sharded", "fused_sharded"])
def test_bits_do_not_depend_on_the_stored_form(
    tiny_checkpoints: TinyCheckpoints, form: str
) -> None:
    # Dense weights are mapped at other places in other files, which may change their bits.
    one, other = (load(tiny_checkpoints.form(name)) for name in ("per_expert", form))
    assert same_bits(experts_outputs(one), experts_outputs(other))


@pytest.fixture
def two_compute_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_compute_threads")
def test_bits_with_two_compute_threads(tiny_checkpoints: TinyCheckpoints) -> None:
    one, other = (
        load(tiny_checkpoints.fused, budget, layout="native") for budget in ("100%", "25%")
    )
    assert same_bits(experts_outputs(one), experts_outputs(other))
