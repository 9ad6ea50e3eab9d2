"""A budget is kept: what slots and staging take together, whatever is asked for and stored.

Does not measure the process's memory: `bench/memory.py` does.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_runtime
from moe_runtime import store
from moe_runtime.budget import BudgetPlan, resolve_budget
from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.memory import mapped_bytes
from outputs import least, load, odd_model, outputs, same_bits
from profiles import gpu_profile
from tiny import ALL_EXPERT_BYTES, EXPERTS, LAYERS, TinyCheckpoints


def taken(model: PreTrainedModel) -> int:
    """Bytes of all slots of a model, as allocated."""
    runtime = moe_runtime.runtime_of(model)
    tensors = [tensor for pool in runtime.executor._pools for tensor in pool.stacked]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd")
    odd_model().save_pretrained(path)
    return path


@pytest.mark.parametrize("budget", ["100%", "55%", "30%", "least"])
@pytest.mark.parametrize("layout", ["native", "rows", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_slots_and_staging_stay_within_the_budget(
    tiny_checkpoints: TinyCheckpoints,
    odd: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    layout: str,
    budget: str,
) -> None:
    path = odd if name == "odd" else tiny_checkpoints.per_expert
    staging: list[int] = []
    plain = store.Bounce.__init__

    def note(self: store.Bounce, chunk: int) -> None:
        plain(self, chunk)
        staging.append(self.tensor.untyped_storage().nbytes() + self.scratch.numel())

    monkeypatch.setattr(store.Bounce, "__init__", note)
    options: dict[str, Any] = {"dtype": dtype, "layout": layout, "preload": False}
    asked = least(path, **options) if budget == "least" else budget
    model = load(path, asked, **options)
    plan = moe_runtime.runtime_of(model).budget
    prompt = torch.arange(1, 60).unsqueeze(0)
    with torch.no_grad():
        model(prompt)
    assert len(staging) <= plan.threads
    assert taken(model) <= plan.pools
    assert sum(staging) <= plan.staging
    assert plan.used <= plan.total
    runtime = moe_runtime.runtime_of(model)
    if budget == "100%":
        assert sum(plan.slots) == runtime.spec.grid.size
    else:
        assert sum(plan.slots) == len(runtime.cache.residents())
    if budget == "least":
        assert plan.total == asked
        with pytest.raises(BudgetError, match=f"{asked} bytes"):
            load(path, int(asked) - 1, **options)


@settings(max_examples=25)
@given(budget=st.integers(0, 2 * ALL_EXPERT_BYTES), threads=st.integers(1, 16))
def test_any_budget_is_kept_or_refused(
    tiny_checkpoints: TinyCheckpoints, budget: int, threads: int
) -> None:
    path = tiny_checkpoints.fused
    try:
        model = load(path, budget, reader_threads=threads, preload=False)
    except BudgetError:
        assert budget < least(path, reader_threads=threads)
        return
    plan = moe_runtime.runtime_of(model).budget
    assert plan.used <= plan.total == budget
    assert taken(model) <= plan.pools
    assert 1 <= plan.threads <= threads
    assert sum(plan.slots) <= LAYERS * EXPERTS


def test_a_larger_budget_never_holds_fewer_experts(tiny_checkpoints: TinyCheckpoints) -> None:
    held = []
    for percent in range(25, 130, 15):
        model = load(tiny_checkpoints.fused, f"{percent}%", preload=False)
        held.append(sum(moe_runtime.runtime_of(model).budget.slots))
    assert held == sorted(held)
    assert held[-1] == LAYERS * EXPERTS


@pytest.mark.parametrize("free", [200 << 20, 400 << 20, 64 << 30])
def test_auto_leaves_room_and_says_what_it_chose(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr("moe_runtime.budget.free_memory", lambda device: free)
    if free < 256 << 20:
        with pytest.raises(BudgetError, match=r"least that works.*\(auto: 200.00 MiB free"):
            load(tiny_checkpoints.fused, "auto")
        return
    plan = moe_runtime.runtime_of(load(tiny_checkpoints.fused, "auto")).budget
    assert plan.total < free
    assert "auto" in plan.explanation
    assert "every expert fits" in plan.explanation
    assert f"{LAYERS * EXPERTS} slots of {LAYERS * EXPERTS}" in plan.explanation


def test_experts_stored_in_different_types(tmp_path: Path) -> None:
    """Rows of a few experts are wider than a piece: they are converted whole all the same."""
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=2048,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=16,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    plain.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    changed = [name for name in tensors if ".experts.7." in name]
    assert changed
    for name in changed:
        tensors[name] = tensors[name].float()
    save_file(tensors, path, metadata={"format": "pt"})
    found, chunks = [], []
    for folder in ("one", "other"):
        model = load(tmp_path / folder, least(tmp_path / folder), dtype=torch.bfloat16)
        chunks.append(moe_runtime.runtime_of(model).budget.chunk)
        found.append(
            [moe_runtime.runtime_of(model).expert_tensors(layer, 7)[0] for layer in range(2)]
        )
        assert all(output.isfinite().all() for output in outputs(model)[:-1])
    assert same_bits(*found)
    assert chunks[0] < 2048 * 4 <= chunks[1]


def test_auto_leaves_room_for_what_was_asked_for(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer or more sequences, and weights that the checkpoint's pages hold, take from experts."""
    monkeypatch.setattr("moe_runtime.budget.free_memory", lambda device: (256 << 20) + 200_000)

    def plan_of(**options: int) -> BudgetPlan:
        return moe_runtime.runtime_of(load(tiny_checkpoints.fused, "auto", **options)).budget

    totals, texts = [], []
    for batch, length in ((1, 128), (1, 256), (2, 128), (1, 32)):
        monkeypatch.setattr("moe_runtime.assembly.mapped_bytes", lambda suffix: 0)
        plan = plan_of(max_batch=batch, max_length=length)
        totals.append(plan.total)
        texts.append(plan.explanation)
    assert totals[1] == totals[2] < totals[0] < totals[3]
    assert "of 2 times 128 tokens" in texts[2]
    monkeypatch.setattr("moe_runtime.assembly.mapped_bytes", lambda suffix: 1000)
    plan = plan_of(max_length=128)
    assert plan.total == totals[0] - 1000
    assert "1000 B for the other weights" in plan.explanation


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells of mappings")
def test_dense_weights_of_a_loaded_model_are_mapped() -> None:
    """What `auto` leaves room for is there: transformers maps what it loads on a CPU."""
    model = load(Path(moe_runtime.bundled_model()), "50%")
    dense = moe_runtime.runtime_of(model).spec.dense_bytes
    assert mapped_bytes(".safetensors") >= dense
    assert mapped_bytes(".no such ending") == 0


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_length": "long"}, {"hardware": 3}])
def test_room_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RuntimeConfig(**wrong)


def test_a_profile_tells_what_a_miss_costs_on_each_device(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = moe_runtime.inspect_checkpoint(str(tiny_checkpoints.fused))
    config = Qwen3MoeConfig()
    told = {}
    for free in (1, 64 << 30):
        monkeypatch.setattr("moe_runtime.budget.free_memory", lambda device, free=free: free)
        for device in ("cpu", "cuda:0", "cuda:1"):
            total, told[device, free] = resolve_budget(
                "auto", spec, config, torch.device(device), threads=2, profile=gpu_profile()
            )
            assert (total > 0) == (free > 1)
    assert "from disk (measured" in told["cpu", 1]
    assert "ms from disk or" in told["cuda:0", 1]
    assert "from pinned memory" in told["cuda:0", 1]
    assert "knows no cuda:1" in told["cuda:1", 1]
    assert all(text.endswith("every expert fits") for (_, free), text in told.items() if free > 1)
