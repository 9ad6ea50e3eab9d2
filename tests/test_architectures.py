"""Every architecture behind the experts interface, inside a quarter of its experts' bytes.

Does not know any architecture by name: `architectures` finds them in the installed transformers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import moe_runtime
from architectures import (
    EXPERTS,
    LAST_TEXT_ID,
    TOP_K,
    UNREACHED,
    ArchitectureCase,
    build,
    cases,
    experts_classes_of_release,
    experts_modules,
    inputs,
)
from moe_runtime.errors import BudgetError

# Largest deviation of the default mode's experts from eager's on the same input, in units of the
# output's standard deviation. float32 sums in another order; eager rounds every partial sum to
# bfloat16, the default mode only the whole.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.05}
# The same of float32 logits. In bfloat16 no such number exists: an ulp turns a routing decision in
# a later layer, as it does between transformers' own implementations.
LOGITS_TOLERANCE = 5e-5

FORCED = (11, 23, 42)

# What the architecture itself fixes, against the top-4 of 16 experts that the others run.
FIXED_TOP_K = {"ZayaForCausalLM": 1, "PhimoeForCausalLM": 2}

# A quick run covers one architecture of each kind: merged lists, fused, renamed, transposed with
# biases, interleaved, ungated, post-norm, a gate of its own, two sizes of experts, a composite.
QUICK = {
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "Inkling2ForCausalLM",
    "MixtralForCausalLM",
    "MuseSparkForConditionalGeneration",
    "NemotronHForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "ZayaForCausalLM",
}

RUNNABLE = [case for case in cases() if not case.excluded]


def _parameter(case: ArchitectureCase, *values: Any, name: str) -> Any:
    marks = [] if case.name in QUICK else [pytest.mark.slow]
    return pytest.param(case, *values, marks=marks, id=f"{case.name}-{name}")


BY_DTYPE = [
    _parameter(case, dtype, name=str(dtype).removeprefix("torch."))
    for case in RUNNABLE
    for dtype in case.dtypes
]
BY_FORM = [
    _parameter(case, form, name=form) for case in RUNNABLE for form in ("published", "fused")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters:
    """What the runtime counted so far."""

    hits: int
    misses: int
    evictions: int
    rereads: int
    bytes_read: int


def counters(model: PreTrainedModel) -> Counters:
    """The one place that knows the names in a report."""
    found = moe_runtime.report(model).counters
    return Counters(
        **{field.name: int(getattr(found, field.name)) for field in dataclasses.fields(Counters)}
    )


def load_plain(case: ArchitectureCase, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Plain transformers, eager experts, the experts in freshly allocated memory.

    A fused checkpoint is mapped into memory at whatever byte its tensors start, and the bits of a
    matrix product depend on the alignment of its operands.
    """
    model: PreTrainedModel = case.auto_type.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    )
    assert type(model) is case.model_type
    for module in experts_modules(model).values():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()
    return model


def load_in_a_quarter(
    case: ArchitectureCase, path: Path, dtype: torch.dtype, *, exact: bool
) -> PreTrainedModel:
    """A quarter of the experts' bytes, or the next twentieth that is enough to work at all."""
    for percent in range(25, 100, 5):
        try:
            model: PreTrainedModel = moe_runtime.from_pretrained(
                str(path),
                expert_budget=f"{percent}%",
                device="cpu",
                dtype=dtype,
                exact=exact,
                auto_class=case.auto_class,
            )
        except BudgetError:
            continue
        assert type(model) is case.model_type
        return model
    pytest.fail("no budget below that of all experts works")


class _Forced(LogitsProcessor):
    """Makes `generate` append these tokens, whatever the model says."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = FORCED[input_ids.shape[1] % len(FORCED)]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


@torch.no_grad()
def unpadded_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits `[B, T, V]` of two rows of equal length."""
    found: torch.Tensor = model(**inputs(padded=False)).logits
    return found


@torch.no_grad()
def padded_logits(model: Any, *, pad: int = 0) -> torch.Tensor:
    """Logits `[tokens, V]` of a left-padded batch and of what `generate` adds to it.

    Rows of padding are left out: what a model computes there is nobody's business.
    """
    batch = inputs(padded=True)
    real = batch["attention_mask"].bool()
    batch["input_ids"] = batch["input_ids"].where(real, pad)
    prefill = model(**batch).logits[real]
    decoded = model.generate(
        **batch,
        max_new_tokens=len(FORCED),
        do_sample=False,
        logits_processor=LogitsProcessorList([_Forced()]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat([prefill, *decoded.logits])


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the standard deviation of what is expected."""
    return float((found.float() - expected.float()).abs().max() / expected.float().std())


def test_every_experts_class_is_reached_or_has_a_reason() -> None:
    classes = set(experts_classes_of_release())
    reached = {
        type(module).__name__
        for case in RUNNABLE
        for module in experts_modules(_skeleton(case)).values()
    }
    assert len(reached) >= 45
    assert classes - reached == classes & set(UNREACHED)


def _skeleton(case: ArchitectureCase) -> PreTrainedModel:
    with torch.device("meta"):
        return case.model_type(case.config())


@pytest.mark.parametrize(("case", "dtype"), BY_DTYPE)
def test_logits_in_a_quarter_of_the_experts(
    case: ArchitectureCase, dtype: torch.dtype, tmp_path: Path
) -> None:
    build(case, dtype).save_pretrained(tmp_path)
    plain = load_plain(case, tmp_path, dtype)
    calls = _record(case, plain)
    expected = unpadded_logits(plain)
    expected_padded = padded_logits(plain)
    assert expected.isfinite().all()
    assert expected_padded.isfinite().all()
    assert len({call.path for call in calls}) >= 2

    exact = load_in_a_quarter(case, tmp_path, dtype, exact=True)
    assert torch.equal(unpadded_logits(exact), expected)
    assert torch.equal(padded_logits(exact), expected_padded)
    _check_counters(counters(exact))

    fast = load_in_a_quarter(case, tmp_path, dtype, exact=False)
    found, found_padded = unpadded_logits(fast), padded_logits(fast)
    _check_counters(counters(fast))
    for call in calls:
        with torch.no_grad():
            output = fast.get_submodule(call.path)(*call.arguments)
        assert deviation(output, call.output) <= TOLERANCE[dtype]
    if dtype == torch.float32:
        assert deviation(found, expected) <= LOGITS_TOLERANCE
        if _ignores_padding(plain, expected_padded):
            assert deviation(found_padded, expected_padded) <= LOGITS_TOLERANCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of an experts module: hidden states, top-k indices and weights, and the output."""

    path: str
    arguments: tuple[torch.Tensor, ...]
    output: torch.Tensor


def _record(case: ArchitectureCase, model: PreTrainedModel) -> list[_Call]:
    """A list that every later call of the model's experts is added to."""
    calls: list[_Call] = []

    def hook(path: str) -> Any:
        def record(module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            assert module.num_experts >= EXPERTS
            assert arguments[1].shape[1] == FIXED_TOP_K.get(case.name, TOP_K)
            calls.append(_Call(path=path, arguments=arguments, output=output))

        return record

    for path, module in experts_modules(model).items():
        module.register_forward_hook(hook(path))
    return calls


def _ignores_padding(plain: PreTrainedModel, expected: torch.Tensor) -> bool:
    """Whether real tokens' logits do not depend on what stands in the padding.

    In a few of transformers' own models they do. The default mode computes no experts for
    padding, and cannot agree with such a model.
    """
    other = padded_logits(plain, pad=LAST_TEXT_ID - 1)
    return deviation(other, expected) < LOGITS_TOLERANCE


def _check_counters(found: Counters) -> None:
    assert found.misses > 0
    assert found.bytes_read > 0
    assert found.evictions > 0
    assert found.rereads > 0


@pytest.mark.parametrize(("case", "form"), BY_FORM)
def test_checkpoint_is_read_and_saved_bit_for_bit(
    case: ArchitectureCase, form: str, tmp_path: Path
) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    dtype = torch.bfloat16
    build(case, dtype).save_pretrained(source, save_original_format=form == "published")
    plain = load_plain(case, source, dtype)

    model = load_in_a_quarter(case, source, dtype, exact=False)
    assert model.num_parameters() == plain.num_parameters()
    model.save_pretrained(copy)
    again = load_plain(case, copy, dtype)
    assert set(again.state_dict()) == set(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name

    moe_runtime.detach(model)
    for path, module in experts_modules(plain).items():
        for name, parameter in module.named_parameters(recurse=False):
            found = model.get_parameter(f"{path}.{name}")
            assert torch.equal(found, parameter), f"{path}.{name}"
