"""The Triton kernels against the specification: through Triton's interpreter on a CPU (on a GPU
where there is one), and compiled for GPUs without one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.kernels import (
    ExpertForm,
    Gate,
    combine,
    combined,
    contributions,
    dispatch,
    expert_mlp,
    grouped_experts,
    slot_experts,
    slot_mlp,
)

import later_device
import moe_runtime
from moe_runtime import slot_layers
from slot_pools import SlotCase, slot_case
from tiny import tiny_model

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GPT_OSS = Gate(interleaved=True, clamp="before", limit=0.8, alpha=1.702, shift=1.0)

gates = st.one_of(
    st.builds(
        Gate,
        function=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
        interleaved=st.booleans(),
        clamp=st.sampled_from(["none", "before", "after"]),
        limit=st.just(0.7),
        alpha=st.sampled_from([1.0, 1.702]),
        shift=st.sampled_from([0.0, 1.0]),
    ),
    st.builds(Gate, function=st.sampled_from(["relu2", "identity", "silu"]), gated=st.just(False)),
)
sizes = st.sampled_from([8, 24, 40])
dtypes = st.sampled_from(list(TOLERANCES))


def computed(case: SlotCase, kernel: str = "triton") -> torch.Tensor:
    on = case.to(DEVICE)
    return slot_experts(on.hidden, on.slots, on.weights, on.pool, on.form, kernel=kernel).cpu()


def specified(case: SlotCase) -> torch.Tensor:
    """In float32, from the same rounded weights and tokens."""
    pool = tuple(stack.float() for stack in case.pool)
    rows = slot_mlp(case.hidden.float(), case.slots, pool, case.form)
    return combine(rows, case.weights, torch.float32)


def assert_same(case: SlotCase, found: torch.Tensor | None = None) -> None:
    found = computed(case) if found is None else found
    tolerance = TOLERANCES[case.hidden.dtype]
    assert found.dtype == case.hidden.dtype
    torch.testing.assert_close(
        found.float(), specified(case), rtol=tolerance, atol=tolerance * 2, check_dtype=False
    )


@given(
    gate=gates, dtype=dtypes, hidden=sizes, width=sizes, transposed=st.booleans(),
    bias=st.booleans(), choices=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12)
def test_one_token(choices: int, **named: Any) -> None:
    assert_same(slot_case(tokens=1, choices=choices, **named))


@given(
    gate=gates, dtype=dtypes, hidden=sizes, width=sizes, transposed=st.booleans(),
    bias=st.booleans(), tokens=st.integers(2, 5), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=8)
def test_few_tokens(tokens: int, **named: Any) -> None:
    assert_same(slot_case(tokens=tokens, choices=2, slots=4, **named))


@given(
    gate=gates, dtype=dtypes, hidden=sizes, width=sizes, transposed=st.booleans(),
    bias=st.booleans(), tokens=st.integers(33, 40), slots=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=8)
def test_many_tokens(**named: Any) -> None:
    assert_same(slot_case(choices=1, **named))


@pytest.mark.parametrize("tokens", [1, 4, 34])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_form_of_gpt_oss(tokens: int, dtype: torch.dtype) -> None:
    assert_same(
        slot_case(tokens=tokens, dtype=dtype, gate=GPT_OSS, transposed=True, bias=True, choices=1)
    )


@pytest.mark.parametrize("tokens", [1, 3, 34])
def test_a_slot_twice_in_one_token_and_slots_of_a_larger_pool(tokens: int) -> None:
    case = slot_case(tokens=tokens, choices=2, slots=4, absent=0.0)
    case.slots[0] = case.slots[0, 0]
    wide = tuple(
        torch.full((4, *stack.shape[1:-1], 2 * stack.shape[-1]), torch.nan)[..., : stack.shape[-1]]
        for stack in case.pool
    )
    for view, stack in zip(wide, case.pool, strict=True):
        view.copy_(stack)  # rows that are not contiguous, with NaN in the gaps
    strided = SlotCase(**{**case.__dict__, "pool": wide})
    assert_same(case, computed(strided))


ODD: dict[str, Callable[[SlotCase], dict[str, torch.Tensor]]] = {
    "no token": lambda c: {"hidden": c.hidden[:0], "slots": c.slots[:0], "weights": c.weights[:0]},
    "no choice": lambda c: {"slots": c.slots[:, :0], "weights": c.weights[:, :0]},
    "one choice": lambda c: {"slots": c.slots[:, 1:], "weights": c.weights[:, 1:]},
    "one slot for all": lambda c: {"slots": torch.full_like(c.slots, 2)},
    "nothing here": lambda c: {"slots": torch.full_like(c.slots, -1)},
    "any negative number": lambda c: {"slots": torch.where(c.slots < 2, -7, c.slots)},
    "int32": lambda c: {"slots": c.slots.int()},
    "uint8": lambda c: {"slots": c.slots.clamp_min(0).to(torch.uint8)},
    "rows of a wider tensor": lambda c: {"hidden": c.hidden.repeat(1, 2)[:, : c.hidden.shape[1]]},
    "every other column": lambda c: {"hidden": c.hidden.repeat_interleave(2, 1)[:, ::2]},
    "columns first": lambda c: {
        name: getattr(c, name).t().contiguous().t() for name in ("hidden", "slots", "weights")
    },
    "weights of float64": lambda c: {"weights": c.weights.double()},
    "weights of bfloat16": lambda c: {"weights": c.weights.bfloat16()},
    "weights that are no numbers": lambda c: {"weights": c.weights.masked_fill(c.slots < 0, nan)},
    "a row of NaN": lambda c: {"hidden": c.hidden.index_fill(0, torch.tensor(0), nan)},
    "a row of infinity": lambda c: {"hidden": c.hidden.index_fill(0, torch.tensor(0), math.inf)},
}


@pytest.mark.parametrize("tokens", [1, 3, 34])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_odd_input_is_computed_alike(odd: str, tokens: int) -> None:
    case = slot_case(tokens=tokens, choices=2, slots=4)
    given = {"hidden": case.hidden, "slots": case.slots, "weights": case.weights} | ODD[odd](case)
    plain, found = (
        slot_experts(
            **{name: tensor.to(DEVICE) for name, tensor in given.items()},
            pool=case.to(DEVICE).pool,
            form=case.form,
            kernel=kernel,
        )
        for kernel in ("plain", "triton")
    )
    torch.testing.assert_close(found, plain, rtol=2e-5, atol=4e-5, equal_nan=True)
    assert not dispatch._failures
    # Rows are each other's strangers, whatever stands in them.
    if odd.startswith("a row of") and tokens > 1:
        assert found[1:].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3, 34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_when_an_expert_arrives(tokens: int, dtype: torch.dtype) -> None:
    case = slot_case(tokens=tokens, choices=3, slots=6, dtype=dtype, width=40).to(DEVICE)
    whole = slot_experts(
        case.hidden, case.slots, case.weights, case.pool, case.form, kernel="triton"
    )
    parts = None
    for here in ([4, 0], [5], [1, 2, 3]):
        held = sum((case.slots == slot for slot in here), torch.zeros_like(case.slots)) > 0
        now = torch.where(held, case.slots, -1)
        parts = contributions(
            case.hidden, now, case.pool, case.form, parts, distinct=6, kernel="triton"
        )
    assert parts is not None
    again = combined(parts, case.slots, case.weights, case.form, dtype, kernel="triton")
    assert torch.equal(whole, again)
    assert torch.equal(whole, computed(case).to(DEVICE)), "and every call gives the same"


def test_a_norm_after_each_expert() -> None:
    case = slot_case(tokens=3, choices=2)
    norm = torch.nn.LayerNorm(40, bias=True)
    torch.nn.init.normal_(norm.bias)
    form = ExpertForm(**{**case.form.__dict__, "finish": norm.to(DEVICE)})
    on = case.to(DEVICE)
    with torch.no_grad():
        found = [
            slot_experts(on.hidden, on.slots, on.weights, on.pool, form, kernel=kernel)
            for kernel in ("triton", "plain")
        ]
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_the_specification_and_the_grouped_kernel_agree() -> None:
    case = slot_case(tokens=6, choices=2, absent=0.0, hidden=32, width=16, gate=GPT_OSS)
    rows = case.hidden.repeat_interleave(2, dim=0)
    grouped = grouped_experts(rows, case.slots.view(-1), case.pool, case.form)
    torch.testing.assert_close(
        grouped.view(6, 2, -1),
        slot_mlp(case.hidden, case.slots, case.pool, case.form),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_host_computes_the_same_within_rounding(dtype: torch.dtype, tokens: int) -> None:
    """Where an expert is computed changes its contribution by no more than `TOLERANCES`."""
    case = slot_case(
        tokens=tokens, choices=1, slots=1, absent=0.0, hidden=64, width=48, dtype=dtype
    )
    on = case.to(DEVICE)
    found = contributions(on.hidden, on.slots, on.pool, on.form, distinct=1, kernel="triton")
    held = tuple(stack[0] for stack in case.pool)
    hosted = expert_mlp(case.hidden, held, case.form).float()
    limit = TOLERANCES[dtype] * max(1.0, float(hosted.abs().max()))
    assert float((found.sum(0).float().cpu() - hosted).abs().max()) <= limit


# -- in the runtime -------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="the later device is CPU memory")
def test_the_executor_computes_the_same_at_every_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    device = later_device.install(monkeypatch)
    asked: list[str] = []

    def counted(name: str) -> None:
        kernel = getattr(slot_layers, name)

        def count(*arguments: Any, **named: Any) -> Any:
            asked.append(name)
            return kernel(*arguments, **named)

        monkeypatch.setattr(slot_layers, name, count)

    counted("slot_experts")
    counted("contributions")
    monkeypatch.setattr(dispatch, "DECODE_TOKENS", 2)  # three tokens are many: this is slow
    ids = torch.randint(1, 128, (1, 3), generator=torch.Generator().manual_seed(3))
    prompts = (ids[:, :1], ids)
    plain = tiny_model()
    with torch.no_grad():
        wanted = [plain(input_ids=prompt).logits for prompt in prompts]
        found = {}
        for budget in ("100%", "30%"):
            model = moe_runtime.attach(tiny_model(), expert_budget=budget, device="cuda")
            moe_runtime.runtime_of(model).executor.slots.kernel = "triton"
            asked.clear()
            found[budget] = [model(input_ids=prompt).logits for prompt in prompts]
            # Where all is resident one call makes a layer.
            assert set(asked) == {"slot_experts" if budget == "100%" else "contributions"}
            moe_runtime.runtime_of(model).check_integrity()
    for one, other, eager in zip(found["100%"], found["30%"], wanted, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, eager, rtol=1e-4, atol=1e-3)
    assert not device.faults


# -- for GPUs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "extent"),
    [pytest.param("90", "few", id="sm90"), pytest.param("80", "all", marks=pytest.mark.slow)],
)
def test_kernels_compile_for_gpus(capability: str, extent: str, tmp_path: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    outcome = subprocess.run(
        [sys.executable, program, capability, extent],
        env={**plain, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "built" in outcome.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 256])
def test_every_configuration_gives_the_same_bits(tokens: int) -> None:
    from moe_runtime.kernels import triton_decode, triton_prefill

    case = slot_case(
        tokens=tokens, choices=4, slots=16, hidden=1024, width=512, dtype=torch.bfloat16
    ).to("cuda")

    def run() -> torch.Tensor:
        return slot_experts(
            case.hidden, case.slots, case.weights, case.pool, case.form, kernel="triton"
        )

    wanted = run()
    kernels = (
        [triton_prefill._kernel("up"), triton_prefill._kernel("down")]
        if tokens > triton_decode.DECODE_TOKENS
        else [triton_decode._kernel(name, tokens == 1, False) for name in ("up", "down")]
    )
    for kernel in kernels:
        for config in kernel.configs:
            for key in kernel.cache:
                kernel.cache[key] = config
            assert torch.equal(run(), wanted), str(config)


@pytest.mark.gpu
def test_a_layer_is_computed_without_waiting_for_the_device() -> None:
    case = slot_case(tokens=64, choices=4, slots=16, hidden=256, width=128, absent=0.0).to("cuda")

    def run() -> torch.Tensor:
        return slot_experts(case.hidden, case.slots, case.weights, case.pool, case.form)

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails where anything waits
        again = run()
    graph.replay()
    assert torch.equal(again, wanted)
