"""Every architecture behind the experts interface, baked: the same logits, and not by accident.

Does not know any architecture's router by name; what is special about a few stands in tables below.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_runtime.placement.bake import bake
from moe_runtime.placement.bake_source import open_source
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from architectures import ArchitectureCase, build, cases, inputs
from baking import plan_of, random_orders
from moe_runtime.errors import CheckpointError, PlanError, UnsupportedModelError
from moe_runtime.model_spec import MoESpec, read_spec

# Largest difference of a float32 logit, over the largest logit: sums run in another order.
TOLERANCE = 1e-5

# Architectures of the sweep that are refused, with what the message says. None is.
REFUSED: dict[str, str] = {}

# A quick run covers one of each kind: correction biases, tables of experts' numbers, routers that
# stand outside the block, are transposed or stored together, scales, biases, a shared expert's row
# and that of a skipped one, layers with different numbers of experts.
QUICK = {
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
    "Dots3NoteForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "InklingForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Qwen3MoeForCausalLM",
    "ZayaForCausalLM",
}
RUNNABLE = {case.name: case for case in cases() if not case.excluded}
BY_FORM = [
    pytest.param(
        case,
        form,
        marks=[] if case.name in QUICK else [pytest.mark.slow],
        id=f"{case.name}-{form}",
    )
    for case in RUNNABLE.values()
    for form in ("published", "fused")
]


def save(model: PreTrainedModel, folder: Path, form: str = "published") -> None:
    """Save it with nothing left at a value that would hide what does not move: no zero, no one."""
    generator = torch.Generator().manual_seed(1)
    stored = model.state_dict()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder, save_original_format=form == "published")


def load(case: ArchitectureCase, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = case.auto_type.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(**inputs(padded=False)).logits
    return found


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert list(before) == list(after)
    return [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


@pytest.mark.parametrize(("case", "form"), BY_FORM)
def test_the_baked_model_computes_the_same(
    case: ArchitectureCase, form: str, tmp_path: Path
) -> None:
    save(build(case, torch.float32), tmp_path / "source", form)
    source = open_source(tmp_path / "source", auto_class=case.auto_class)
    orders = random_orders(source.spec, 3)
    uneven = len({len(order) for order in orders}) > 1
    plan = plan_of(source.spec, orders, devices=4 if uneven else 0)
    if case.name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[case.name]):
            bake(source, plan, tmp_path / "out")
        return
    bake(source, plan, tmp_path / "out")
    before, after = load(case, tmp_path / "source"), load(case, tmp_path / "out")
    expected = logits(before)
    assert difference(logits(after), expected) <= TOLERANCE

    old, new = before.state_dict(), after.state_dict()
    orders = [plan.permutation(position).tolist() for position in range(len(orders))]
    experts = set(_assert_experts_moved(source.spec, orders, old, new))
    routers = [name for name in changed(old, new) if name not in experts]
    for name in routers:
        _assert_rearranged(old[name], new[name])
    assert routers
    # Nothing moved for nothing: undoing one shows. In one layer at least, for here and there no
    # token's choice hangs on a bias; and not in towers, which do not run here.
    effects: dict[str, float] = {}
    for name in routers:
        moved = new[name].clone()
        new[name].copy_(old[name])
        kind = re.sub(r"\d+", "*", name)
        effects[kind] = max(effects.get(kind, 0.0), difference(logits(after), expected))
        new[name].copy_(moved)
    idle = {kind for kind, effect in effects.items() if effect < 10 * TOLERANCE}
    assert not {kind for kind in idle if "vision" not in kind}
    assert difference(logits(after), expected) <= TOLERANCE


def _assert_experts_moved(
    spec: MoESpec,
    orders: list[list[int]],
    old: dict[str, torch.Tensor],
    new: dict[str, torch.Tensor],
) -> list[str]:
    """Every layer's experts, towers that do not run here included; returns their names."""
    names = []
    for layer, order in zip(spec.layers, orders, strict=True):
        for param in layer.params:
            name = f"{layer.path}.{param.name}"
            names.append(name)
            assert torch.equal(new[name], old[name][order]), name
    return names


def _assert_rearranged(old: torch.Tensor, new: torch.Tensor) -> None:
    if old.is_floating_point():  # the same numbers at other places
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    else:  # other numbers at the same places: the same experts
        pairs = {(int(a), int(b)) for a, b in zip(old.flatten(), new.flatten(), strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_every_architecture_of_the_sweep_is_here() -> None:
    assert set(REFUSED) <= set(RUNNABLE)
    assert len(QUICK & set(RUNNABLE)) >= 10  # an older transformers lacks one
    assert len(RUNNABLE) >= 45


# -- groups ----------------------------------------------------------------------------------------


def grouped(case: ArchitectureCase, folder: Path, **options: Any) -> None:
    """A model whose routers choose 2 of 4 groups of 4 experts."""
    config = case.config()
    config.update({"n_group": 4, "topk_group": 2, **options})
    torch.manual_seed(0)
    model = case.model_type(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight") or "experts" in name:
                parameter.normal_(std=0.5)
    save(model, folder)


def in_whole_groups(seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    groups = [4 * group + generator.permutation(4) for group in generator.permutation(4)]
    return np.concatenate(groups).tolist()


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "NemotronHForCausalLM"])
def test_groups_that_a_router_chooses_among_stay_whole(name: str, tmp_path: Path) -> None:
    case = RUNNABLE[name]
    grouped(case, tmp_path / "source")
    source = open_source(tmp_path / "source", auto_class=case.auto_class)
    count = len(source.spec.layers)
    orders = [in_whole_groups(seed) for seed in range(count)]
    bake(source, plan_of(source.spec, orders), tmp_path / "out")
    found, expected = (logits(load(case, tmp_path / folder)) for folder in ("out", "source"))
    assert difference(found, expected) <= TOLERANCE

    broken = orders[-1].copy()
    broken[0], broken[-1] = broken[-1], broken[0]
    plan = plan_of(source.spec, [*orders[:-1], broken])
    layer = source.spec.layers[-1].layer
    with pytest.raises(PlanError, match=f"layer {layer}: its router chooses 2 of 4 groups of 4"):
        bake(source, plan, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DeepseekV3ForCausalLM", {"n_group": 4, "topk_group": 4}),
        ("DeepseekV2ForCausalLM", {"topk_method": "greedy"}),
    ],
)
def test_groups_that_limit_nothing_are_no_hindrance(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    case = RUNNABLE[name]
    grouped(case, tmp_path / "source", **options)
    source = open_source(tmp_path / "source", auto_class=case.auto_class)
    bake(source, plan_of(source.spec, random_orders(source.spec, 1)), tmp_path / "out")
    found, expected = (logits(load(case, tmp_path / folder)) for folder in ("out", "source"))
    assert difference(found, expected) <= TOLERANCE


def test_groups_of_deepseek_v2_are_seen(tmp_path: Path) -> None:
    case = RUNNABLE["DeepseekV2ForCausalLM"]
    grouped(case, tmp_path / "source", topk_method="group_limited_greedy")
    source = open_source(tmp_path / "source", auto_class=case.auto_class)
    with pytest.raises(PlanError, match="chooses 2 of 4 groups"):
        bake(source, plan_of(source.spec, random_orders(source.spec, 1)), tmp_path / "out")


# -- tables of experts' numbers --------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(16, "16"), (-1, "-1")])
def test_a_table_that_names_no_expert_is_refused(tmp_path: Path, value: int, shown: str) -> None:
    case = RUNNABLE["DeepseekV4ForCausalLM"]
    save(build(case, torch.float32), tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("tid2eid"))
    tensors[name][5, 1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_source(tmp_path / "source")
    plan = plan_of(source.spec, random_orders(source.spec, 1))
    with pytest.raises(CheckpointError, match=rf"tid2eid.* and holds {shown}"):
        bake(source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integers_that_are_not_understood_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = RUNNABLE["DeepseekV4ForCausalLM"]
    save(build(case, torch.float32), tmp_path / "source")
    source = open_source(tmp_path / "source")
    block = source.model.get_submodule(source.spec.layers[0].path.rpartition(".")[0])
    block.register_buffer("order", torch.zeros(16, dtype=torch.int64))
    assert read_spec(source.model) is not None
    with pytest.raises(UnsupportedModelError, match=r"order .* whole numbers"):
        bake(source, plan_of(source.spec, random_orders(source.spec, 1)), tmp_path / "out")
