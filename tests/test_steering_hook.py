"""A steered model computes what its weights changed by hand give; without steering, its own bits.

Does not know thinking spans (`test_steering_thinking`), experts that are modules of their own
(`test_steering_separate`) and slots (`test_steering_slots`).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moe_runtime
from architectures import ArchitectureCase, build
from architectures import inputs as architecture_inputs
from moe_runtime.errors import AttachError, ConfigError, MoERuntimeError, UnsupportedModelError
from moe_runtime.steering import Steering, write_steering
from moe_runtime.steering.factors import UseCounter
from moe_runtime.steering.forced import forced
from tiny import EXPERTS, LAYERS, TOP_K, VOCAB, TinyCheckpoints, tiny_model

Betas = dict[tuple[int, int], Any]
BETAS: Betas = {(0, 3): 4.0, (1, 7): 0.5, (1, 2): 2.0, (3, 11): 0.0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A plain tiny model; whoever hooks into it takes the hooks out."""
    return tiny_model()


def batch(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def case(name: str) -> ArchitectureCase:
    """One architecture, without a look at all of them."""
    return ArchitectureCase(
        name=f"{name}ForCausalLM",
        auto_class="AutoModelForCausalLM",
        config_class=f"{name}Config",
    )


@torch.no_grad()
def logits(model: Any, *ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(*ids, **options).logits
    return found


def hooks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that is hooked into each module, and whatever else stands in it."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


class ByHand:
    """Runs a model's experts expert by expert, with weights that are changed by a rule.

    An implementation of its own: the module's forward is not called.
    """

    def __init__(self, betas: Betas, rows: int = 1) -> None:
        self.betas, self.rows = betas, rows

    def beta(self, layer: int, expert: int, row: int) -> float:
        beta = self.betas.get((layer, expert), 1.0)
        return float(beta[row] if isinstance(beta, tuple) else beta)

    def install(self, model: PreTrainedModel) -> Any:
        undo = ExitStack()
        for layer in range(LAYERS):
            module = model.get_submodule(f"model.layers.{layer}.mlp.experts")
            hook = self._hook(layer)
            undo.callback(module.register_forward_hook(hook).remove)
        return undo

    def _hook(self, layer: int) -> Any:
        def run(module: Any, arguments: tuple[torch.Tensor, ...], _: torch.Tensor) -> torch.Tensor:
            hidden, index, weights = arguments
            length = len(hidden) // self.rows
            output = torch.zeros_like(hidden)
            for token in range(len(hidden)):
                for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                    gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    found = module.down_proj[expert] @ (nn.functional.silu(gate) * up)
                    output[token] += weight * self.beta(layer, expert, token // length) * found
            return output

        return run


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max() / expected.std()) < 5e-5


# -- what is computed


@pytest.mark.parametrize("betas", [BETAS, {(2, 1): (1.0, 3.0, 0.0), (0, 3): (2.0, 2.0, 1.0)}])
def test_logits_are_those_of_weights_changed_by_hand(model: PreTrainedModel, betas: Betas) -> None:
    ids = batch()
    with ByHand({}, rows=3).install(model):
        assert close(logits(model, ids), logits(model, ids))
        plain = logits(model, ids)
    assert close(plain, logits(model, ids))
    with ByHand(betas, rows=3).install(model):
        expected = logits(model, ids)
    assert not close(expected, plain)
    with moe_runtime.steer(model, betas):
        assert close(logits(model, ids), expected)
    assert close(logits(model, ids), plain)


def test_generation_is_steered_step_by_step_as_in_one_call(model: PreTrainedModel) -> None:
    ids = batch(2)
    with moe_runtime.steer(model, BETAS) as handle:
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        decoded = dict(handle.uses)
        whole = logits(model, result.sequences[:, :-1])[:, ids.shape[1] - 1 :]
        assert {name: 2 * count for name, count in decoded.items()} == handle.uses
    assert close(torch.stack(result.logits, 1), whole)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_transformers_is_steered(implementation: str) -> None:
    model = tiny_model()
    model.set_experts_implementation(implementation)
    ids = batch()
    with ByHand(BETAS).install(model):
        expected = logits(model, ids)
    with moe_runtime.steer(model, BETAS):
        assert close(logits(model, ids), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_steered_inside_a_budget_as_outside(tiny_checkpoints: TinyCheckpoints, exact: bool) -> None:
    found = []
    for budget in ("25%", "100%"):
        loaded = moe_runtime.from_pretrained(
            tiny_checkpoints.fused,
            expert_budget=budget,
            device="cpu",
            exact=exact,
            layout="native",
        )
        with moe_runtime.steer(loaded, BETAS):
            found.append(logits(loaded, batch()))
    assert torch.equal(found[0], found[1])
    plain = type(tiny_model()).from_pretrained(
        tiny_checkpoints.fused, experts_implementation="eager"
    )
    for module in plain.modules():
        if hasattr(module, "gate_up_proj"):  # a mapped file's alignment changes bits
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()
    with moe_runtime.steer(plain, BETAS):
        expected = logits(plain, batch())
    assert torch.equal(found[0], expected) if exact else close(found[0], expected)


def test_a_beta_of_one_is_no_steering(model: PreTrainedModel) -> None:
    ids, before = batch(), hooks(model)
    plain = logits(model, ids)
    with moe_runtime.steer(model, {(0, 1): 1.0, (2, 3): (1.0, 1.0)}) as handle:
        assert hooks(model) == before
        assert torch.equal(logits(model, ids), plain)
        assert handle.uses == {}


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    betas=st.dictionaries(
        st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)),
        st.floats(0, 8, width=16),
        max_size=6,
    )
)
def test_nothing_is_left_behind(model: PreTrainedModel, betas: Betas) -> None:
    ids, before = batch(1, 3), hooks(model)
    plain = logits(model, ids)
    with moe_runtime.steer(model, betas):
        logits(model, ids)
    assert hooks(model) == before
    assert torch.equal(logits(model, ids), plain)


def test_blocks_multiply_and_may_end_in_any_order(model: PreTrainedModel) -> None:
    ids, before = batch(), hooks(model)
    with moe_runtime.steer(model, {(0, 3): 6.0, (1, 7): 2.0}):
        product = logits(model, ids)
    with moe_runtime.steer(model, {(0, 3): 3.0}):
        single = logits(model, ids)
    outer = moe_runtime.steer(model, {(0, 3): 2.0, (1, 7): 2.0})
    inner = moe_runtime.steer(model, {(0, 3): 3.0})
    outer.__enter__()
    inner.__enter__()
    assert torch.equal(logits(model, ids), product)
    outer.__exit__(None, None, None)
    assert torch.equal(logits(model, ids), single)
    inner.__exit__(None, None, None)
    assert hooks(model) == before


@pytest.mark.parametrize("method", ["multiply", "logit_bias", "force"])
def test_an_exception_leaves_nothing_behind(model: PreTrainedModel, method: Any) -> None:
    ids, before = batch(), hooks(model)
    plain = logits(model, ids)
    with pytest.raises(KeyError), moe_runtime.steer(model, BETAS, method=method):
        raise KeyError
    layer = model.get_submodule("model.layers.1.mlp")
    for part in ("gate", "experts"):
        with moe_runtime.steer(model, BETAS, method=method):
            fail = layer.get_submodule(part).register_forward_pre_hook(_fail)
            with pytest.raises(InterruptedError):
                logits(model, ids)
            fail.remove()
            again = logits(model, ids)
        with moe_runtime.steer(model, BETAS, method=method):
            assert torch.equal(logits(model, ids), again)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert hooks(model) == before
    assert torch.equal(logits(model, ids), plain)


def _fail(*_: Any) -> None:
    raise InterruptedError


# -- rows ----------------------------------------------------------


def test_rows_have_their_own_betas(model: PreTrainedModel) -> None:
    ids = batch(3)
    with moe_runtime.steer(model, {(0, 3): (4.0, 1.0, 0.0), (2, 5): (1.0, 2.0, 3.0)}):
        together = logits(model, ids)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    for row, (one, other) in enumerate([(4.0, 1.0), (1.0, 2.0), (0.0, 3.0)]):
        with moe_runtime.steer(model, {(0, 3): one, (2, 5): other}):
            assert close(together[row], logits(model, ids[row : row + 1])[0])
            alone = model.generate(ids[row : row + 1], max_new_tokens=4, do_sample=False)
            assert torch.equal(generated[row], alone[0])


def test_a_batch_of_another_size_is_refused_with_both_numbers(model: PreTrainedModel) -> None:
    with moe_runtime.steer(model, {(0, 3): (4.0, 1.0)}):
        with pytest.raises(ConfigError, match="batch of 2 rows, the forward call has 3"):
            logits(model, batch(3))
        layer = model.get_submodule("model.layers.0.mlp")
        with pytest.raises(AttachError, match="run the model itself"):
            layer(torch.zeros(1, 5, 32))
    with (
        pytest.raises(ConfigError, match="as many for every expert"),
        moe_runtime.steer(model, {(0, 3): (4.0, 1.0), (0, 1): [1.0]}),
    ):
        pass


def test_padding_is_left_alone(model: PreTrainedModel) -> None:
    ids = batch(2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen: list[torch.Tensor] = []
    experts = model.get_submodule("model.layers.0.mlp.experts")
    note = experts.register_forward_hook(lambda _, given, out: seen.append(given[2]))
    every = {(0, expert): 2.0 for expert in range(EXPERTS)}
    logits(model, ids, attention_mask=mask)
    with moe_runtime.steer(model, every) as handle:
        logits(model, ids, attention_mask=mask)
    note.remove()
    plain, steered = seen
    real = mask.bool().reshape(-1)
    assert torch.equal(steered[~real], plain[~real])
    assert torch.equal(steered[real], 2 * plain[real])
    assert sum(handle.uses.values()) == TOP_K * int(real.sum())


# -- other methods


def test_renormalised_weights_keep_their_sum(model: PreTrainedModel) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    experts = model.get_submodule("model.layers.0.mlp.experts")
    note = experts.register_forward_hook(lambda _, given, out: seen.append(given[1:]))
    logits(model, batch())
    with moe_runtime.steer(model, {(0, 3): 8.0}, renormalise=True):
        logits(model, batch())
    note.remove()
    (index, plain), (_, steered) = seen
    chosen = (index == 3).any(1)
    assert chosen.any()
    assert torch.equal(steered[~chosen], plain[~chosen])
    assert torch.allclose(steered.sum(1), plain.sum(1))
    share = torch.where(index == 3, plain * 8, plain)
    expected = share / share.sum(1, keepdim=True) * plain.sum(1, keepdim=True)
    assert torch.allclose(steered, expected)


def test_everything_suppressed_and_renormalised_is_nothing(model: PreTrainedModel) -> None:
    every = {(0, expert): 0.0 for expert in range(EXPERTS)}
    with moe_runtime.steer(model, every, renormalise=True):
        assert logits(model, batch()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logit_bias_is_the_router_s_own_bias(dtype: torch.dtype) -> None:
    model = build(case("GptOss"), torch.float32).to(dtype)
    given = architecture_inputs(padded=False)
    with moe_runtime.steer(model, {(1, 3): 8.0}, method="logit_bias"):
        found = logits(model, **given)
    plain = logits(model, **given)
    router = model.get_submodule("model.layers.1.mlp.router")
    if dtype == torch.float32:
        with torch.no_grad():
            router.bias[3] += np.log(8.0)
    else:  # the bias is added to what the router has rounded

        def add(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            scores = output[0].clone()
            scores[:, 3] = (scores[:, 3].float() + np.log(np.float32(8.0))).to(dtype)
            value, index = scores.topk(router.top_k, dim=-1)
            return scores, value.softmax(1, dtype=value.dtype), index

        router.register_forward_hook(add)
    expected = logits(model, **given)
    assert float((found - plain).abs().max()) > 1e-3
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_rows_have_their_own_logit_bias(model: PreTrainedModel) -> None:
    ids = batch(2)
    with moe_runtime.steer(model, {(0, 3): (30.0, 1.0)}, method="logit_bias") as handle:
        found = logits(model, ids)
    assert close(found[1], logits(model, ids)[1])
    with moe_runtime.steer(model, {(0, 3): 30.0}, method="logit_bias") as alone:
        assert close(found[0], logits(model, ids[:1])[0])
    assert handle.uses[0, 3] >= alone.uses[0, 3] > 0


def test_a_router_that_is_not_called_is_told(model: PreTrainedModel) -> None:
    experts = model.get_submodule("model.layers.0.mlp.experts")
    with moe_runtime.steer(model, {(0, 3): 3.0}, method="logit_bias"):
        logits(model, batch())
        with pytest.raises(UnsupportedModelError, match="was not called"):
            experts(torch.zeros(1, 32), torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4))


@hypothesis.given(
    data=st.data(), tokens=st.integers(1, 5), choices=st.integers(1, 4), masked=st.booleans()
)
def test_forced_experts_displace_the_least(
    data: st.DataObject, tokens: int, choices: int, masked: bool
) -> None:
    rows = [data.draw(st.permutations(range(6))) for _ in range(tokens)]
    index = torch.tensor([row[:choices] for row in rows])
    weights = torch.rand(tokens, choices, generator=torch.Generator().manual_seed(tokens))
    experts = data.draw(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=choices))
    flags = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    active = torch.tensor(flags) if masked else None
    found = forced(index, weights, experts, active)
    for token in range(tokens):
        before, after = set(index[token].tolist()), set(found[token].tolist())
        if masked and not flags[token]:
            assert torch.equal(found[token], index[token])
            continue
        assert set(experts) <= after
        assert len(after) == choices
        places = (found[token] != index[token]).nonzero()[:, 0].tolist()
        assert len(places) == len(set(experts) - before)
        free = [at for at in range(choices) if int(index[token, at]) not in experts]
        lost = sorted(free, key=lambda at: float(weights[token, at]))[: len(places)]
        assert sorted(places) == sorted(lost)


# -- what is counted and recorded ----------------------------------------------------------


def test_uses_are_counted_in_between_and_at_the_end() -> None:
    counter = UseCounter(4)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(5, dtype=torch.int64)
    for _ in range(700):
        index = torch.randint(0, 5, (3, 2), generator=generator)  # 4: none
        counter.add(index)
        total += index.reshape(-1).bincount(minlength=5)
    counter.add_count(1, 10)
    assert [counter.of(expert) for expert in range(4)] == [
        int(total[0]),
        int(total[1]) + 10,
        int(total[2]),
        int(total[3]),
    ]


def test_a_trace_holds_the_steered_weights(tiny_checkpoints: TinyCheckpoints) -> None:
    loaded = moe_runtime.from_pretrained(tiny_checkpoints.fused, expert_budget="50%", device="cpu")
    traces = []
    for beta in (1.0, 4.0):
        with moe_runtime.steer(loaded, {(3, 2): beta}), moe_runtime.record(loaded) as recorder:
            logits(loaded, batch())
        traces.append(recorder.trace)
    plain, steered = traces
    assert np.array_equal(plain.topk_ids, steered.topk_ids)
    expected = np.where(plain.topk_ids[:, 3] == 2, 4, 1) * plain.topk_weights[:, 3]
    assert (plain.topk_ids[:, 3] == 2).any()
    assert np.allclose(steered.topk_weights[:, 3], expected, rtol=2e-3)
    assert np.array_equal(steered.topk_weights[:, :3], plain.topk_weights[:, :3])


def test_a_steering_file_and_a_value_do_the_same(model: PreTrainedModel, tmp_path: Path) -> None:
    spec = moe_runtime.model_spec.read_spec(model)
    value = Steering(betas={(0, 3): 4.0}, renormalise=True)
    path = write_steering(tmp_path / "a.steer.json", value, model=spec)
    found = []
    for given in (value, path, str(path)):
        with moe_runtime.steer(model, given) as handle:
            found.append(logits(model, batch()))
            assert handle.steering == value
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with moe_runtime.steer(model, value, renormalise=False) as handle:
        assert not handle.steering.renormalise
        assert not torch.equal(logits(model, batch()), found[0])


# -- bad input ----------------------------------------------------------

REFUSED: list[tuple[Any, dict[str, Any], type[MoERuntimeError], str]] = [
    ({(9, 0): 2.0}, {}, ConfigError, "layer 9 of .* no routed experts; .* are 0-3"),
    ({(1, 16): 2.0}, {}, ConfigError, "layer 1 of .* has 16 experts, numbered from 0; .* 16"),
    ({(1, -1): 2.0}, {}, ConfigError, "found expert -1"),
    ({(1, 1): -2.0}, {}, ConfigError, "at least 0, found -2.0"),
    ({(1, 1): float("nan")}, {}, ConfigError, "finite"),
    ({(1, 1): (1.0, float("inf"))}, {}, ConfigError, "finite"),
    ({(1, 1): "much"}, {}, ConfigError, "has to be a number"),
    ({(1, 1): ()}, {}, ConfigError, "at least one"),
    ({3: 2.0}, {}, ConfigError, "names no expert"),
    ([1, 2], {}, ConfigError, "found list"),
    ("missing.steer.json", {}, ConfigError, "no such steering file"),
    ({(1, 1): 2.0}, {"method": "shout"}, ConfigError, "unknown method 'shout'"),
    ({(1, 1): 2.0}, {"thinking": ("<a>", "</a>")}, ConfigError, "needs tokenizer="),
    ({(1, 1): 2.0}, {"thinking": ("<a>", "<a>")}, ConfigError, "two different texts"),
    ({(1, 1): 2.0}, {"thinking": "<think>"}, ConfigError, "two different texts"),
    ({(1, 1): 2.0}, {"pin": True}, AttachError, "has no runtime"),
    (
        {(1, 1): 2.0},
        {"method": "logit_bias", "renormalise": True},
        ConfigError,
        "leave one of them out",
    ),
    ({(1, e): 2.0 for e in range(5)}, {"method": "force"}, ConfigError, "a token has 4"),
]


@pytest.mark.parametrize(("given", "options", "error", "says"), REFUSED)
def test_bad_input_is_refused_and_changes_nothing(
    model: PreTrainedModel, given: Any, options: Any, error: type[Exception], says: str
) -> None:
    before = hooks(model)
    with pytest.raises(error, match=says), moe_runtime.steer(model, given, **options):
        pass
    assert hooks(model) == before


def test_a_file_of_another_model_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    other = moe_runtime.model_spec.read_spec(build(case("Mixtral"), torch.float32))
    path = write_steering(tmp_path / "other.steer.json", Steering(betas={(0, 1): 2.0}), model=other)
    with pytest.raises(ConfigError, match="fingerprint"), moe_runtime.steer(model, path):
        pass


def test_a_model_without_experts_is_refused() -> None:
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    with pytest.raises(UnsupportedModelError, match="no MoE layer"):
        moe_runtime.steer(dense, {(0, 0): 2.0}).__enter__()


def test_a_dense_layer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"layer 0 of .* no routed experts; .* are 1-3"):
        moe_runtime.steer(build(case("DeepseekV3"), torch.float32), {(0, 0): 2.0}).__enter__()
