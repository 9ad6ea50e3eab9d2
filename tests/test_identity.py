"""Outputs never depend on the cache: the same bits whatever fits, whatever leaves, wherever the
weights come from; and how far the default mode is from eager.

Does not look at what the cache holds, only at what the model gives.
"""

from __future__ import annotations

import copy
import functools
import gc
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_runtime
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.eviction import POLICY_NAMES, make_policy
from moe_runtime.store import DiskStore
from tiny import EXPERTS, HIDDEN, LAYERS, TOP_K, VOCAB, TinyCheckpoints, tiny_config, tiny_model

NEW = 4  # tokens added to each prompt


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


def prompts() -> list[dict[str, torch.Tensor]]:
    """A prompt of twenty tokens, a single one, and a batch padded on the left."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(1, VOCAB, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :15] = 0
    return [
        {"input_ids": ids[:1], "attention_mask": mask[:1]},
        {"input_ids": ids[:1, :1], "attention_mask": mask[:1, :1]},
        {"input_ids": ids * mask, "attention_mask": mask},
    ]


Outputs = list[torch.Tensor]


def outputs(model: PreTrainedModel) -> Outputs:
    """Logits of the prompts' real tokens and of each new token, and the tokens."""
    found: Outputs = []
    for inputs in prompts():
        if inputs["input_ids"].shape[1] > 1:
            with torch.no_grad():
                prefill = model(**inputs).logits
            found.append(prefill[inputs["attention_mask"].bool()])
        if inputs["input_ids"].numel() == 20:
            continue
        result = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found += [*result.logits, result.sequences]
    return found


def same_bits(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def deviation(found: Outputs, expected: Outputs) -> float:
    """Largest difference of logits, in standard deviations of what is expected."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True) if a.dim() == 2]
    return max(float((a - b).abs().max() / b.std()) for a, b in pairs)


def least(path: Path, **options: Any) -> int:
    """The smallest budget in bytes that works."""
    with pytest.raises(BudgetError) as caught:
        moe_runtime.from_pretrained(path, expert_budget=0, device="cpu", **options)
    found = re.search(r"least that works is (\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


def load(path: Path, budget: int | str = "25%", **options: Any) -> PreTrainedModel:
    model = moe_runtime.from_pretrained(path, expert_budget=budget, device="cpu", **options)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights `[in, out]`, biases, and widths that are no multiple of any vector."""
    path = tmp_path_factory.mktemp("odd")
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GptOssForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    return path


Checkpoint = tuple[Path, torch.dtype]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "odd-float32", "odd-bfloat16"])
def checkpoint(
    request: pytest.FixtureRequest, tiny_checkpoints: TinyCheckpoints, odd_checkpoint: Path
) -> Checkpoint:
    """A checkpoint and the dtype to run it in."""
    odd = request.param.startswith("odd")
    dtype: torch.dtype = getattr(torch, request.param.removeprefix("odd-"))
    return (odd_checkpoint if odd else tiny_checkpoints.per_expert), dtype


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Outputs:
    """With every expert in its slot."""
    path, dtype = checkpoint
    model = load(path, "100%", dtype=dtype)
    found = outputs(model)
    assert moe_runtime.report(model).counters.misses == 0
    return found


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policies_without_options())
def test_bits_do_not_depend_on_budget_and_policy(
    checkpoint: Checkpoint, reference: Outputs, policy: str
) -> None:
    path, dtype = checkpoint
    for budget in ("25%", least(path, dtype=dtype)):
        model = load(path, budget, dtype=dtype, policy=policy)
        assert same_bits(outputs(model), reference)
        counters = moe_runtime.report(model).counters
        assert min(counters.evictions, counters.rereads, counters.bytes_read) > 0
        moe_runtime.runtime_of(model).check_integrity()


@pytest.mark.parametrize("threads", [1, 4])
def test_bits_do_not_depend_on_reader_threads(
    checkpoint: Checkpoint, reference: Outputs, threads: int
) -> None:
    path, dtype = checkpoint
    model = load(path, "60%", dtype=dtype, reader_threads=threads)
    assert same_bits(outputs(model), reference)
    smallest = load(path, least(path, dtype=dtype), dtype=dtype, reader_threads=threads)
    assert same_bits(outputs(smallest), reference)


@pytest.mark.parametrize("budget", ["100%", "25%", "20%"])
def test_bits_do_not_depend_on_disk_or_host_tier(
    checkpoint: Checkpoint, reference: Outputs, budget: str
) -> None:
    path, dtype = checkpoint
    auto = GptOssForCausalLM if "odd" in str(path) else Qwen3MoeForCausalLM
    plain = auto.from_pretrained(path, dtype=dtype).eval()
    model = moe_runtime.attach(plain, expert_budget=budget, device="cpu")
    assert same_bits(outputs(model), reference)
    assert moe_runtime.report(model).counters.bytes_read == 0


def test_bits_do_not_depend_on_what_ran_before(checkpoint: Checkpoint, reference: Outputs) -> None:
    path, dtype = checkpoint
    model = load(path, "40%", dtype=dtype)
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
    one, other = (load(tiny_checkpoints.fused, budget) for budget in ("100%", "25%"))
    assert same_bits(experts_outputs(one), experts_outputs(other))


# -- beside eager --------------------------------------------------------------------------------


def load_eager(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Plain transformers, its experts in memory of their own: bits depend on alignment."""
    auto = GptOssForCausalLM if "odd" in str(path) else Qwen3MoeForCausalLM
    model: PreTrainedModel = auto.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    return model.eval()


def test_exact_mode_is_eager_bit_for_bit(checkpoint: Checkpoint) -> None:
    path, dtype = checkpoint
    expected = outputs(load_eager(path, dtype))
    for budget in ("100%", "25%", least(path, dtype=dtype, exact=True)):
        assert same_bits(outputs(load(path, budget, dtype=dtype, exact=True)), expected)


# The largest deviation of an experts layer's output from eager's on the same input, in standard
# deviations. float32: sums in another order. bfloat16: eager rounds each of the partial sums.
DEVIATION = {torch.float32: 2e-6, torch.bfloat16: 0.06}


def test_the_default_mode_is_this_close_to_eager(checkpoint: Checkpoint) -> None:
    path, dtype = checkpoint
    plain = load_eager(path, dtype)
    calls: list[tuple[str, tuple[torch.Tensor, ...], torch.Tensor]] = []
    for name, module in plain.named_modules():
        if name.endswith(".experts"):
            module.register_forward_hook(
                lambda _, arguments, output, name=name: calls.append((name, arguments, output))
            )
    expected = outputs(plain)
    model = load(path, "25%", dtype=dtype)
    worst = 0.0
    for name, arguments, output in calls:
        with torch.no_grad():
            found = model.get_submodule(name)(*arguments)
        difference = (found.float() - output.float()).abs().max() / output.float().std()
        worst = max(worst, float(difference))
    assert 0 < worst <= DEVIATION[dtype]
    if dtype == torch.float32:
        assert deviation(outputs(model), expected) < 1e-4


def test_parameters_in_place_give_the_same_tokens(tiny_checkpoints: TinyCheckpoints) -> None:
    plain = load_eager(tiny_checkpoints.per_expert, torch.float32)
    expected = outputs(plain)
    found = outputs(moe_runtime.attach(plain, device="cpu"))
    assert deviation(found, expected) < 1e-4
    assert all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a.dtype == torch.int64
    )


# -- padding -------------------------------------------------------------------------------------


def routed(model: PreTrainedModel, run: Callable[[], Any]) -> list[tuple[int, torch.Tensor]]:
    """(layer, top-k indices `[rows, K]`) of each call of a plain model's experts."""
    found: list[tuple[int, torch.Tensor]] = []

    def note(layer: int, _: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        found.append((layer, arguments[1].clone()))

    hooks = [
        model.get_submodule(f"model.layers.{layer}.mlp.experts").register_forward_pre_hook(
            functools.partial(note, layer)
        )
        for layer in range(LAYERS)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def test_padding_neither_loads_experts_nor_counts(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(1, VOCAB, (2, 10), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros_like(ids)
    mask[0, -1:] = mask[1, -2:] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    real = mask.bool().reshape(-1)
    plain = load_eager(tiny_checkpoints.per_expert, torch.float32)
    with torch.no_grad():
        calls = routed(plain, lambda: plain(**inputs))
        expected = plain(**inputs).logits.flatten(0, 1)[real]
    wanted = {(layer, int(e)) for layer, index in calls for e in index[real].unique()}
    by_padding = {(layer, int(e)) for layer, index in calls for e in index[~real].unique()}
    assert by_padding - wanted, "the padding of this test is routed to experts of its own"

    read: set[tuple[int, int]] = set()
    plain_read = DiskStore.read

    def note(self: DiskStore, position: int, expert: int, *rest: Any) -> int:
        read.add((position, expert))
        return plain_read(self, position, expert, *rest)

    monkeypatch.setattr(DiskStore, "read", note)
    model = load(tiny_checkpoints.per_expert, "100%", preload=False)
    with torch.no_grad():
        found = model(**inputs).logits.flatten(0, 1)[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert read == wanted
    counters = moe_runtime.report(model).counters
    assert counters.misses == len(wanted)
    assert counters.hits == 0
    assert counters.tokens == int(real.sum())


def test_what_stands_in_the_padding_does_not_matter(tiny_checkpoints: TinyCheckpoints) -> None:
    inputs = prompts()[2]
    real = inputs["attention_mask"].bool()
    model = load(tiny_checkpoints.per_expert)
    found = []
    for filler in (0, 77):
        ids = inputs["input_ids"].where(real, filler)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
        found.append([logits[real]])
    assert same_bits(*found)


# -- shapes, sizes, copies, threads --------------------------------------------------------------


def test_a_layer_with_more_active_experts_than_slots(tiny_checkpoints: TinyCheckpoints) -> None:
    path = tiny_checkpoints.per_expert
    model = load(path, least(path))
    runtime = moe_runtime.runtime_of(model)
    assert runtime.budget.slots == (TOP_K,)
    ids = torch.randint(1, VOCAB, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits
        expected = load(path, "100%")(ids).logits
    assert torch.equal(found, expected)
    active = [len(step.experts) for step in runtime.profiler.accesses]
    assert max(active) == EXPERTS
    counters = moe_runtime.report(model).counters
    assert counters.misses == sum(active)


def two_shapes() -> PreTrainedModel:
    """The tiny model, its last two layers with wider experts."""
    model = tiny_model()
    wide = tiny_config()
    wide.moe_intermediate_size = 40
    generator = torch.Generator().manual_seed(8)
    for layer in model.model.layers[2:]:
        experts = Qwen3MoeExperts(wide)
        experts.config = model.config
        for parameter in experts.parameters():
            parameter.data.normal_(std=0.5, generator=generator)
        layer.mlp.experts = experts
    return model.eval()


@pytest.mark.parametrize("budget", ["100%", "50%", "30%"])
@pytest.mark.parametrize("exact", [False, True])
def test_experts_of_two_shapes_in_one_model(budget: str, exact: bool) -> None:
    plain = two_shapes()
    plain.set_experts_implementation("eager")
    expected = outputs(plain)
    model = moe_runtime.attach(plain, expert_budget=budget, device="cpu", exact=exact)
    runtime = moe_runtime.runtime_of(model)
    assert len(runtime.budget.slots) == 2
    assert runtime.budget.used <= runtime.budget.total
    found = outputs(model)
    assert same_bits(found, expected) if exact else deviation(found, expected) < 1e-4
    runtime.check_integrity()
    if budget == "30%":
        assert moe_runtime.report(model).counters.evictions > 0


@pytest.mark.parametrize("budget", ["100%", "25%"])
def test_a_deep_copy_shares_the_slots_and_works(
    tiny_checkpoints: TinyCheckpoints, budget: str
) -> None:
    model = load(tiny_checkpoints.per_expert, budget)
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert moe_runtime.runtime_of(twin) is moe_runtime.runtime_of(model)
    assert twin.get_input_embeddings().weight is not model.get_input_embeddings().weight
    assert deviation(outputs(twin), expected) < 1e-4
    assert same_bits(outputs(model), expected)
    del model
    gc.collect()
    assert deviation(outputs(twin), expected) < 1e-4  # the original is gone
    assert moe_runtime.report(twin).counters.steps > 0


@pytest.mark.parametrize("which", ["original", "copy"])
def test_detaching_one_of_two_copies_leaves_the_other(
    tiny_checkpoints: TinyCheckpoints, which: str
) -> None:
    model = load(tiny_checkpoints.per_expert)
    expected = outputs(model)
    twin = copy.deepcopy(model)
    gone, stays = (model, twin) if which == "original" else (twin, model)
    moe_runtime.detach(gone)
    assert deviation(outputs(gone), expected) < 1e-4
    steps = moe_runtime.report(stays).counters.steps
    assert deviation(outputs(stays), expected) < 1e-4
    assert moe_runtime.report(stays).counters.steps > steps
    moe_runtime.detach(stays)
    assert deviation(outputs(stays), expected) < 1e-4


def test_two_threads_on_one_model(tiny_checkpoints: TinyCheckpoints) -> None:
    model = load(tiny_checkpoints.per_expert)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCAB, (1, n), generator=generator) for n in (7, 19)]

    def run(prompt: torch.Tensor) -> torch.Tensor:
        found = model.generate(prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        assert isinstance(found, torch.Tensor)
        return found

    expected = [run(prompt) for prompt in ids]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = run(ids[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert [torch.equal(found[n], expected[n]) for n in range(2)] == [True, True]
    moe_runtime.runtime_of(model).check_integrity()
