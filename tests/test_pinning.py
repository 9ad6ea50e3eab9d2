"""A model that runs a plan: the same bits, the plan's experts always in their slots, what does not
fit refused, and prediction beside observation.

Does not know how good a plan is: `test_residency.py` does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.residency import apply_tiers, count_uses
from moe_runtime.placement.topology import Topology

import moe_runtime
from moe_runtime.budget import least_budget, plan_budget
from moe_runtime.errors import BudgetError, ExpertReadError, PlanError
from moe_runtime.eviction import make_policy
from moe_runtime.model_spec import ExpertParam, MoELayer, MoESpec
from moe_runtime.runtime import Runtime, runtime_of
from moe_runtime.simulate import simulate
from outputs import Checkpoint, Outputs, least, load, load_plain, odd_model, outputs, same_bits
from tiny import EXPERT_BYTES, EXPERTS, LAYERS, TOP_K, TinyCheckpoints


def plan_for(
    path: Path, residents: set[tuple[int, int]], *, devices: int = 1, **changed: Any
) -> Plan:
    """A plan for a checkpoint; `residents` are (layer, expert)."""
    spec, _ = moe_runtime.inspect_checkpoint(path)
    plan = Plan(
        topology=Topology.of(devices),
        layers=tuple(
            LayerPlan(
                layer=layer.layer,
                hosts=((0,),) * layer.num_experts,
                tiers=tuple(
                    "device" if (layer.layer, expert) in residents else "disk"
                    for expert in range(layer.num_experts)
                ),
            )
            for layer in spec.layers
        ),
        model_id="tiny",
        fingerprint=spec.fingerprint,
        top_k=tuple(layer.top_k for layer in spec.layers),
    )
    return replace(plan, **changed)


SEVEN = {(0, 1), (0, 2), (0, 15), (1, 0), (2, 7), (2, 8), (2, 9)}


def held(runtime: Runtime) -> set[tuple[int, int]]:
    """(layer, expert) of what is in slots now."""
    return {tuple(runtime.spec.grid.expert_id(int(at))) for at in runtime.cache.residents()}


# -- the same bits -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Outputs:
    path, options = checkpoint
    return outputs(load(path, "100%", **options))


@pytest.mark.parametrize("policy", ["lru", "echo"])
def test_bits_do_not_depend_on_the_plan(
    checkpoint: Checkpoint, reference: Outputs, policy: str
) -> None:
    path, options = checkpoint
    spec, _ = moe_runtime.inspect_checkpoint(path)
    layers = spec.grid.layers
    residents = {(layers[at % len(layers)], expert) for at, expert in SEVEN}
    plan = plan_for(path, residents)
    smallest = least(path, plan=plan, **options)
    assert smallest > least(path, **options)
    for budget in (smallest, "50%", "100%"):
        model = load(path, budget, policy=policy, plan=plan, **options)
        runtime = runtime_of(model)
        assert same_bits(outputs(model), reference)
        runtime.check_integrity()
        assert residents <= held(runtime)
        assert "experts pinned by the plan" in runtime.budget.explanation


@pytest.mark.parametrize("budget", ["auto", "60%"])
def test_an_attached_model_runs_a_plan(
    checkpoint: Checkpoint, reference: Outputs, budget: str
) -> None:
    path, options = checkpoint
    plan = plan_for(path, {(0, 1), (1, 0)})
    plain = load_plain(path, options["dtype"])
    before = outputs(plain)
    model = moe_runtime.attach(
        plain, expert_budget=budget, device="cpu", layout=options["layout"], plan=plan
    )
    if budget != "auto":
        assert same_bits(outputs(model), reference)
        assert {(0, 1), (1, 0)} <= held(runtime_of(model))
    else:
        outputs(model)
    runtime_of(model).check_integrity()
    section = moe_runtime.report(model).to_dict()["plan"]
    assert section["pinned"] == 2
    assert 0 < section["observed_share"] < 1
    assert same_bits(outputs(moe_runtime.detach(model)), before)


def test_exact_mode_with_the_fewest_free_slots(tiny_checkpoints: TinyCheckpoints) -> None:
    path = tiny_checkpoints.per_expert
    plan = plan_for(path, SEVEN)
    smallest = least(path, plan=plan, exact=True)
    model = load(path, smallest, exact=True, plan=plan)
    assert same_bits(outputs(model), outputs(load_plain(path, torch.float32)))
    runtime = runtime_of(model)
    assert runtime.budget.slots == (len(SEVEN) + TOP_K,)
    runtime.check_integrity()


def test_wholly_pinned_layers_need_no_slots_besides(tiny_checkpoints: TinyCheckpoints) -> None:
    """All experts, and all but two of one layer: then two free slots are enough."""
    path = tiny_checkpoints.per_expert
    everything = {(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)}
    expected = outputs(load(path, "100%"))
    for residents in (everything, everything - {(2, 3), (2, 11)}):
        plan = plan_for(path, residents)
        model = load(path, least(path, plan=plan), plan=plan)
        runtime = runtime_of(model)
        assert runtime.budget.slots == (LAYERS * EXPERTS,)
        assert residents <= held(runtime)
        assert same_bits(outputs(model), expected)
        runtime.check_integrity()


def test_weights_that_lie_transposed_and_biases(tmp_path: Path) -> None:
    odd_model().save_pretrained(tmp_path)
    plan = plan_for(tmp_path, {(0, 0), (1, 5), (2, 15)})
    model = load(tmp_path, least(tmp_path, plan=plan), plan=plan)
    assert same_bits(outputs(model), outputs(load(tmp_path, "100%", layout="native")))
    assert {(0, 0), (1, 5), (2, 15)} <= held(runtime_of(model))


def test_each_shape_of_experts_has_slots_for_its_own() -> None:
    """Slots of a shape: what is pinned of its layers, and one token's others of any of them."""

    def layer(number: int, width: int) -> MoELayer:
        param = ExpertParam(name="w", shape=(width, 64), dtype=torch.float32)
        return MoELayer(
            layer=number,
            path=f"model.layers.{number}.experts",
            class_name="Experts",
            num_experts=8,
            top_k=3,
            params=(param,),
        )

    layers = (layer(0, 4), layer(1, 8), layer(2, 4))
    spec = MoESpec(model_class="M", model_id="m", layers=layers, dense_bytes=0)
    for pinned, slots in {(0, 0, 0): (3, 3), (2, 6, 1): (6, 8), (8, 8, 7): (16, 8)}.items():
        options: dict[str, Any] = {"threads": 1, "floor": 0, "disk": False, "pinned": pinned}
        enough = least_budget(spec, **options)
        assert plan_budget(spec, enough, "asked", **options).slots == slots
        with pytest.raises(BudgetError, match=f"least that works is {enough} bytes"):
            plan_budget(spec, enough - 1, "asked", **options)
        assert plan_budget(spec, 10**9, "asked", **options).slots == (16, 8)


def test_pinned_experts_survive_a_failed_read(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoints.per_expert
    plan = plan_for(path, SEVEN)
    model = load(path, least(path, plan=plan), plan=plan)
    expected = outputs(load(path, "100%", layout="native"))
    store = runtime_of(model).executor.fetcher._store

    def fail(*_: object) -> int:
        raise ExpertReadError("layer 3 expert 1: no more disk")

    with monkeypatch.context() as patched:
        patched.setattr(store, "read", fail)
        with pytest.raises(ExpertReadError, match="no more disk"), torch.no_grad():
            model(torch.arange(1, 30)[None])
    runtime_of(model).check_integrity()
    assert held(runtime_of(model)) >= SEVEN
    assert same_bits(outputs(model), expected)


# -- what is refused -----------------------------------------------------------------------------


def test_a_budget_that_is_too_small_says_what_is_missing(
    tiny_checkpoints: TinyCheckpoints,
) -> None:
    path = tiny_checkpoints.per_expert
    plan = plan_for(path, SEVEN)
    smallest = least(path, plan=plan)
    with pytest.raises(BudgetError, match=r"the 7 experts that the plan pins.*: 5 bytes are miss"):
        load(path, smallest - 5, plan=plan)
    assert smallest - least(path) >= len(SEVEN) * EXPERT_BYTES
    assert len(held(runtime_of(load(path, smallest, plan=plan)))) == len(SEVEN)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fingerprint": "0" * 16}, "tiny: the plan is for tiny with fingerprint 0000"),
        ({"topology": Topology.of(2)}, "for 2 devices, the runtime runs one.*--devices 1 --memory"),
        (
            {"metrics": {"residency": {"predicted_share": 1.5}}},
            "a predicted share must be 0 to 1, found 1.5",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_weights_are_loaded(
    tiny_checkpoints: TinyCheckpoints,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    message: str,
) -> None:
    path = tiny_checkpoints.per_expert
    plan = plan_for(path, SEVEN, **changed)

    def never(*_: object) -> None:
        raise AssertionError("weights are being loaded")

    monkeypatch.setattr("moe_runtime.lifecycle.load_without_experts", never)
    with pytest.raises(PlanError, match=message):
        load(path, "50%", plan=plan)


def test_a_plan_of_other_layers_is_refused(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    plan = plan_for(tiny_checkpoints.fused, SEVEN, fingerprint="")
    other = replace(plan, layers=plan.layers[:3], top_k=plan.top_k[:3])
    saved = other.save(tmp_path / "other.plan.json")
    with pytest.raises(PlanError, match=r"other\.plan\.json: the plan lacks layer 3"):
        load(tiny_checkpoints.fused, "50%", plan=saved)
    model = load_plain(tiny_checkpoints.fused, torch.float32)
    with pytest.raises(PlanError, match="lacks layer 3"):
        moe_runtime.attach(model, plan=saved, device="cpu")
    assert same_bits(outputs(model), outputs(load_plain(tiny_checkpoints.fused, torch.float32)))


def test_what_is_no_plan_is_refused(tmp_path: Path, tiny_checkpoints: TinyCheckpoints) -> None:
    path = tiny_checkpoints.fused
    with pytest.raises(PlanError, match=r"absent\.plan\.json: cannot be read"):
        load(path, "50%", plan=tmp_path / "absent.plan.json")
    with pytest.raises(PlanError, match="found int"):
        load(path, "50%", plan=3)


# -- prediction and observation ------------------------------------------------------------------


def test_the_report_compares_prediction_and_observation(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    """A plan from the run's own trace predicts that very run."""
    path = tiny_checkpoints.per_expert
    first = load(path, "50%")
    with moe_runtime.record(first) as recorder:
        outputs(first)
    counts = count_uses(recorder.trace)
    bare = plan_for(path, set(), fingerprint=recorder.trace.fingerprint)
    plan = apply_tiers(
        bare, counts, (EXPERT_BYTES,) * LAYERS, memory=(20 * EXPERT_BYTES,), reserve=0
    )
    saved = plan.save(tmp_path / "x.plan.json")
    model = load(path, "60%", plan=saved, policy="echo")
    outputs(model)
    report = moe_runtime.report(model)
    section = report.to_dict()["plan"]
    assert section["name"] == str(saved) == report.to_dict()["config"]["plan"]
    assert (section["pinned"], section["pinned_bytes"]) == (20, 20 * EXPERT_BYTES)
    assert section["predicted_share"] == plan.metrics["residency"]["predicted_share"]
    assert section["observed_share"] == pytest.approx(section["predicted_share"], abs=1e-5)
    for layer, uses in zip(section["layers"], counts, strict=True):
        mine = [e for at, e in plan.residents() if at == layer["layer"]]
        assert layer["pinned"] == len(mine)
        assert layer["observed_share"] == pytest.approx(uses[mine].sum() / uses.sum(), abs=1e-5)
    runtime_of(model).reset_counters()
    assert moe_runtime.report(model).to_dict()["plan"]["observed_share"] is None


def test_the_replay_keeps_what_the_plan_keeps(tiny_checkpoints: TinyCheckpoints) -> None:
    path = tiny_checkpoints.per_expert
    model = load(path, "50%", plan=plan_for(path, SEVEN), policy="lfu")
    outputs(model)
    report = moe_runtime.report(model)
    simulation = report.to_dict()["simulation"]
    assert simulation["lfu"]["misses"] == report.counters.misses
    assert simulation["belady"]["misses"] <= simulation["lfu"]["misses"]
    runtime = runtime_of(model)
    alone = simulate(
        make_policy("lfu", runtime.spec.grid),
        runtime.spec.grid,
        runtime.profiler.accesses,
        runtime.budget.slots[0],
    )
    assert simulation["lfu without the plan"] == {"hits": alone.hits, "misses": alone.misses}


def test_no_plan_leaves_no_section(tiny_checkpoints: TinyCheckpoints) -> None:
    model = load(tiny_checkpoints.fused, "50%")
    outputs(model)
    record = moe_runtime.report(model).to_dict()
    assert record["plan"] is None
    assert record["config"]["plan"] is None
    assert not any("plan" in name for name in record["simulation"])
