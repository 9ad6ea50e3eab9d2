"""Every architecture behind the experts interface, inside a quarter of its experts' bytes.

Does not know any architecture by name: `architectures` finds them in the installed transformers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from architectures import (
    EXPERTS,
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

# Largest deviation of the default mode's logits from eager's, in units of the logits' standard
# deviation. float32: sums in another order. bfloat16: an ulp at an early layer can turn a routing
# decision at a later one, so the bound holds for the mean and not for each logit.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.05}

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
    return model.eval()


def load_in_a_quarter(path: Path, dtype: torch.dtype, *, exact: bool) -> PreTrainedModel:
    """A quarter of the experts' bytes, or the next twentieth that is enough to work at all."""
    for percent in range(25, 100, 5):
        try:
            return moe_runtime.from_pretrained(
                path, expert_budget=f"{percent}%", device="cpu", dtype=dtype, exact=exact
            ).eval()
        except BudgetError:
            continue
    pytest.fail("no budget below that of all experts works")


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of an unpadded and a padded batch, then of the tokens that a decode adds to it.

    Rows of padding are left out: what a model computes there is nobody's business.
    """
    found = [model(**inputs(padded=False)).logits]
    padded = inputs(padded=True)
    output = model(**padded, use_cache=True)
    found.append(output.logits[padded["attention_mask"].bool()])
    mask = padded["attention_mask"]
    for token in (11, 23, 42):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        output = model(
            input_ids=torch.full((2, 1), token),
            attention_mask=mask,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        found.append(output.logits)
    return found


def deviation(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Mean absolute difference over the standard deviation of what is expected."""
    difference = torch.cat(
        [(a - b).float().flatten() for a, b in zip(found, expected, strict=True)]
    )
    spread = torch.cat([b.float().flatten() for b in expected]).std()
    return float(difference.abs().mean() / spread)


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
    calls: list[str] = []
    for path, module in experts_modules(plain).items():
        module.register_forward_hook(_check_call(case, path, calls))
    expected = logits_of(plain)
    assert all(bool(part.isfinite().all()) for part in expected)
    assert len(set(calls)) >= 2

    exact = load_in_a_quarter(tmp_path, dtype, exact=True)
    assert type(exact) is case.model_type
    for index, (part, reference) in enumerate(zip(logits_of(exact), expected, strict=True)):
        assert torch.equal(part, reference), f"exact mode differs from eager in part {index}"
    _check_counters(counters(exact))

    fast = load_in_a_quarter(tmp_path, dtype, exact=False)
    assert deviation(logits_of(fast), expected) <= TOLERANCE[dtype]
    _check_counters(counters(fast))


def _check_call(case: ArchitectureCase, path: str, calls: list[str]) -> Any:
    def check(module: Any, arguments: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        calls.append(path)
        assert module.num_experts >= EXPERTS
        assert arguments[1].shape[1] == FIXED_TOP_K.get(case.name, TOP_K)

    return check


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

    model = load_in_a_quarter(source, dtype, exact=False)
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
