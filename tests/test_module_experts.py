"""Experts that are modules of their own run inside a budget, bit for bit as without one."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime.placement.bake_source import open_source
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import moe_runtime
from module_experts import BUILDERS, EXPERTS, Block, batch, build, load_plain, outputs
from moe_runtime.errors import (
    AttachError,
    CheckpointError,
    ExpertReadError,
    UnsupportedModelError,
)
from moe_runtime.eviction import POLICY_NAMES
from moe_runtime.inspection import inspect_checkpoint
from moe_runtime.model_spec import read_spec
from running import FailAt

SHARD_SIZE = "60KB"
STACKS = ("switch", "nllb")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model's folder; `<name>-sharded` for the encoder-decoder models too."""
    root = tmp_path_factory.mktemp("modules")
    for name in BUILDERS:
        build(name).save_pretrained(root / name)
    for name in STACKS:
        build(name).save_pretrained(root / f"{name}-sharded", max_shard_size=SHARD_SIZE)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, list[torch.Tensor]]:
    """What plain transformers gives."""
    return {name: outputs(load_plain(name, checkpoints[name])) for name in BUILDERS}


def load(path: Path, budget: int | str = "25%", **options: Any) -> PreTrainedModel:
    model = moe_runtime.from_pretrained(path, expert_budget=budget, device="cpu", **options)
    assert isinstance(model, PreTrainedModel)
    return model


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def assert_whole(model: PreTrainedModel, wanted: list[torch.Tensor]) -> None:
    moe_runtime.runtime_of(model).check_integrity()
    assert_same(outputs(model), wanted)
    moe_runtime.runtime_of(model).check_integrity()


# -- structure -----------------------------------------------------------------------------------


def test_layers_are_found_by_structure() -> None:
    spec = read_spec(build("switch"))
    assert spec.grid.layers == (1, 3, 1001, 1003)
    assert [layer.path for layer in spec.layers] == [
        "encoder.block.1.layer.1.mlp.experts",
        "encoder.block.3.layer.1.mlp.experts",
        "decoder.block.1.layer.2.mlp.experts",
        "decoder.block.3.layer.2.mlp.experts",
    ]
    assert {layer.num_experts for layer in spec.layers} == {EXPERTS}
    assert spec.layers[0].modules[3] == "expert_3"
    assert [param.name for param in spec.layers[0].params] == ["wi.weight", "wo.weight"]
    assert len(spec.groups) == 1
    total = sum(p.numel() * p.element_size() for p in build("switch").parameters())
    assert spec.dense_bytes + spec.total_expert_bytes == total


def test_a_dropout_among_the_experts_is_none_of_them() -> None:
    model = build("nllb")
    names = {name for name, _ in model.model.encoder.layers[1].ffn.experts.named_children()}
    assert "token_dropout" in names
    spec = read_spec(model)
    assert all(layer.num_experts == EXPERTS for layer in spec.layers)
    assert [param.name for param in spec.layers[0].params] == [
        f"{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")
    ]


def test_a_plain_list_is_found_and_its_block_calls_it() -> None:
    spec = read_spec(build("up"))
    assert spec.grid.layers == (1, 2)
    assert {layer.top_k for layer in spec.layers} == {2}
    assert [layer.scope for layer in spec.layers] == ["layers.1.mlp", "layers.2.mlp"]
    assert [layer.router for layer in spec.layers] == ["layers.1.mlp.gate", "layers.2.mlp.gate"]


def test_experts_are_numbered_as_their_names_say() -> None:
    model = build("switch")
    for layer in read_spec(model).layers:
        experts = model.get_submodule(layer.path)
        shuffled = [experts[name] for name in layer.modules]
        order = [3, 7, 0, 1, 6, 2, 5, 4]
        experts.clear()
        for number in order:
            experts[f"expert_{number}"] = shuffled[number]
    assert read_spec(model) == read_spec(build("switch"))


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.experts.append(torch.nn.Linear(3, 3)),
        lambda block: setattr(block.experts[1], "rise", torch.nn.Linear(32, 7)),
        lambda block: setattr(block, "num_experts", EXPERTS + 1),
    ],
    ids=["of two classes", "of two shapes", "of another number than said"],
)
def test_other_lists_are_no_experts(change: Callable[[Block], None]) -> None:
    model = build("up")
    for layer in (1, 2):
        change(model.layers[layer]["mlp"])
    with pytest.raises(UnsupportedModelError, match="RemoteModel"):
        read_spec(model)


def test_bytes_in_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    for form in ("switch", "switch-sharded"):
        spec, experts = inspect_checkpoint(checkpoints[form])
        plain = build("switch").state_dict()
        for layer, by_expert in zip(spec.layers, experts.segments, strict=True):
            for name, segments in zip(layer.modules, by_expert, strict=True):
                for segment in segments:
                    with open(experts.paths[segment.file], "rb") as file:
                        file.seek(segment.offset)
                        read = bytearray(file.read(segment.nbytes))
                        found = torch.frombuffer(read, dtype=torch.float32)
                    key = f"{layer.path}.{name}.{layer.params[segment.param].name}"
                    assert torch.equal(found.view(segment.shape), plain[key])


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("budget", ["25%", "60%", "100%"])
def test_the_same_bits_at_every_budget(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]], name: str, budget: str
) -> None:
    model = load(checkpoints[name], budget)
    assert_whole(model, expected[name])
    counters = moe_runtime.report(model).counters
    if budget == "100%":
        assert counters.misses == counters.evictions == 0
    else:
        assert counters.misses
        assert (
            counters.bytes_read >= counters.misses * read_spec(build(name)).layers[0].expert_bytes
        )


@pytest.mark.parametrize("policy", sorted(set(POLICY_NAMES) - {"static", "belady"}))
def test_the_same_bits_with_every_policy(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]], policy: str
) -> None:
    assert_whole(load(checkpoints["switch"], "20%", policy=policy), expected["switch"])


@pytest.mark.parametrize("name", STACKS)
def test_the_same_bits_from_shards_in_bfloat16_and_with_beams(
    checkpoints: dict[str, Path], name: str
) -> None:
    plain = load_plain(name, checkpoints[f"{name}-sharded"], torch.bfloat16)
    wanted = outputs(plain, num_beams=3)
    model = load(checkpoints[f"{name}-sharded"], "25%", dtype=torch.bfloat16)
    assert_same(outputs(model, num_beams=3), wanted)


@pytest.mark.parametrize("options", [{"exact": True}, {"layout": "rows"}, {"reader_threads": 1}])
def test_options_of_other_models_change_nothing(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]], options: dict[str, Any]
) -> None:
    assert_whole(load(checkpoints["switch"], **options), expected["switch"])


def test_experts_without_tokens_are_not_read(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]]
) -> None:
    models = [load(checkpoints[name], "100%", preload=False) for name in ("up", "all")]
    for model, name in zip(models, ("up", "all"), strict=True):
        assert_same(outputs(model), expected[name])
    few, all_called = (moe_runtime.report(model).counters for model in models)
    assert (few.hits, few.misses) == (all_called.hits, all_called.misses)


def test_order_of_calls_is_learnt(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]]
) -> None:
    """Experts that come in descending order are asked for once each, from the second call on."""
    model = load(checkpoints["down"], "100%", preload=False)
    assert_same(outputs(model), expected["down"])
    runtime = moe_runtime.runtime_of(model)
    runtime.reset_counters()
    assert_same(outputs(model), expected["down"])
    used = [set() for _ in runtime.spec.layers]
    for access in runtime.profiler.accesses:
        assert len(access.experts) == 1
        used[access.position].add(int(access.experts[0]))
    assert all(len(one) > 2 for one in used)


def test_an_expert_called_by_itself_and_twice(checkpoints: dict[str, Path]) -> None:
    plain = load_plain("switch", checkpoints["switch"])
    model = load(checkpoints["switch"], "15%")
    path = "decoder.block.1.layer.2.mlp.experts.expert_5"
    hidden = torch.randn(7, 32)
    with torch.no_grad():
        wanted = plain.get_submodule(path)(hidden)
        for _ in range(2):
            assert torch.equal(model.get_submodule(path)(hidden), wanted)
    moe_runtime.runtime_of(model).check_integrity()


# -- attach, detach, save, copy --------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("budget", ["auto", "20%"])
def test_attach_and_detach(name: str, budget: str) -> None:
    model = build(name)
    wanted = outputs(model)
    before = {key: (id(one), one.data_ptr()) for key, one in model.named_parameters()}
    hooks = {path: len(module._forward_hooks) for path, module in model.named_modules()}
    moe_runtime.attach(model, expert_budget=budget, device="cpu")
    assert_whole(model, wanted)
    moe_runtime.detach(model)
    assert {k: (id(one), one.data_ptr()) for k, one in model.named_parameters()} == before
    assert {path: len(module._forward_hooks) for path, module in model.named_modules()} == hooks
    assert_same(outputs(model), wanted)
    with pytest.raises(AttachError):
        moe_runtime.report(model)


@pytest.mark.parametrize("name", BUILDERS)
def test_detach_loads_the_experts(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]], name: str
) -> None:
    model = load(checkpoints[name])
    plain = build(name)
    assert model.num_parameters() == plain.num_parameters()
    moe_runtime.detach(model)
    assert_same(outputs(model), expected[name])
    found = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        assert torch.equal(found[key], parameter), key


@pytest.mark.parametrize("form", ["switch", "switch-sharded", "nllb", "up"])
def test_saved_as_it_was(checkpoints: dict[str, Path], form: str, tmp_path: Path) -> None:
    load(checkpoints[form]).save_pretrained(tmp_path)
    wanted = {
        k: v for p in checkpoints[form].glob("*.safetensors") for k, v in load_file(p).items()
    }
    found = {k: v for p in tmp_path.glob("*.safetensors") for k, v in load_file(p).items()}
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((checkpoints[form] / "config.json").read_text())


def test_state_dict_of_a_part_has_its_experts(checkpoints: dict[str, Path]) -> None:
    path = "encoder.block.1.layer.1.mlp"
    wanted = build("switch").get_submodule(path).state_dict()
    found = load(checkpoints["switch"]).get_submodule(path).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_a_deep_copy_runs_and_detaches_alone(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]]
) -> None:
    model = load(checkpoints["switch"])
    other = copy.deepcopy(model)
    assert_same(outputs(other), expected["switch"])
    moe_runtime.detach(other)
    assert_same(outputs(other), expected["switch"])
    assert_whole(model, expected["switch"])
    with pytest.raises(AttachError, match="pickled"):
        pickle.dumps(model)


def test_two_models_at_once_and_two_threads(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]]
) -> None:
    models = {name: load(checkpoints[name], "20%") for name in STACKS}
    for name, model in models.items():
        assert_same(outputs(model), expected[name])
    failures: list[BaseException] = []

    def work() -> None:
        try:
            assert_same(outputs(models["switch"]), expected["switch"])
        except BaseException as error:  # noqa: BLE001  raised again below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    moe_runtime.runtime_of(models["switch"]).check_integrity()


def test_a_plan_pins_them(
    checkpoints: dict[str, Path], expected: dict[str, list[torch.Tensor]]
) -> None:
    path = checkpoints["switch"]
    pinned = {(3, 0), (3, 7), (1001, 2)}
    spec, _ = inspect_checkpoint(path)
    plan = Plan(
        topology=Topology.of(1),
        layers=tuple(
            LayerPlan(
                layer=layer.layer,
                hosts=((0,),) * EXPERTS,
                tiers=tuple(
                    "device" if (layer.layer, expert) in pinned else "disk"
                    for expert in range(EXPERTS)
                ),
            )
            for layer in spec.layers
        ),
        model_id="switch",
        fingerprint=spec.fingerprint,
        top_k=(1,) * 4,
    )
    model = load(path, "30%", plan=plan)
    assert_whole(model, expected["switch"])
    cache = moe_runtime.runtime_of(model).cache
    assert [set(cache.permanent(at)) for at in range(4)] == [set(), {0, 7}, {2}, set()]


# -- recording -----------------------------------------------------------------------------------


def test_the_routing_recorded_is_the_routers(checkpoints: dict[str, Path]) -> None:
    plain = load_plain("switch", checkpoints["switch"])
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for layer in read_spec(plain).layers:
        plain.get_submodule(layer.path).register_forward_hook(
            lambda _module, args, _output, path=layer.path: seen.append((path, args[1], args[2]))
        )
    outputs(plain)
    model = load(checkpoints["switch"], "20%")
    with moe_runtime.record(model) as recorder:
        outputs(model)
    trace = recorder.trace
    assert trace.layer_ids == (1, 3, 1001, 1003)
    assert trace.topk_ids.shape[2] == 1
    real = batch()["attention_mask"].bool().reshape(-1)
    for position, layer in enumerate(read_spec(plain).layers):
        masks = [(m, w) for path, m, w in seen if path == layer.path]
        steps = [trace.topk_ids[trace.step_ids == s] for s in range(int(trace.step_ids[-1]) + 1)]
        weights = [trace.topk_weights[trace.step_ids == s] for s in range(len(steps))]
        used = [(i, w) for i, w in zip(steps, weights, strict=True) if _of(position, i)]
        assert len(used) == len(masks)
        for (ids, weight), (mask, given) in zip(used, masks, strict=True):
            chosen = torch.where(mask.any(-1), mask.int().argmax(-1), 65535).reshape(-1)
            keep = real if len(real) == len(chosen) else torch.ones_like(chosen, dtype=torch.bool)
            assert ids[:, position, 0].tolist() == chosen[keep].tolist()
            scores = torch.where(mask.any(-1).reshape(-1), given.reshape(-1), 0.0)
            assert weight[:, position, 0].tolist() == scores[keep].half().tolist()


def _of(position: int, ids: Any) -> bool:
    """Whether a step's rows are of the layer's stack: the encoder runs positions 0 and 1."""
    return bool((ids[:, :2] != 65535).any()) == (position < 2)


def test_encoder_and_decoder_are_calls_of_their_own(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["switch"])
    inputs = batch()
    with moe_runtime.record(model) as recorder:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    trace = recorder.trace
    real = inputs["attention_mask"].bool()
    source = trace.select(sequences=range(3))
    assert source.token_ids.tolist() == inputs["input_ids"][real].tolist()
    assert len(trace) == int(real.sum()) + 3 * 4
    assert set(trace.select(sequences=range(3, 6)).positions.tolist()) == {0, 1, 2, 3}
    assert len(trace.decode()) == 3 * 3
    report = moe_runtime.report(model)
    assert report.counters.steps == 5
    assert report.counters.tokens == len(trace)


def test_indices_are_read_off_a_routers_scores(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["up"])
    inputs = batch()["input_ids"]
    with moe_runtime.record(model) as recorder, torch.no_grad():
        model(inputs)
    trace = recorder.trace
    block = build("up").layers[1]["mlp"]
    plain = build("up")
    with torch.no_grad():
        hidden = plain.embed(inputs)
        hidden = hidden + plain.layers[0]["mlp"](hidden)
        chosen = block.gate(hidden).topk(2, dim=-1).indices.reshape(-1, 2)
    assert trace.topk_ids[:, 0].tolist() == chosen.sort(dim=1).values.tolist()
    assert (trace.topk_weights[:, 0] == 1).all()  # raw scores are no weights


def test_what_cannot_be_told_is_not_recorded(
    checkpoints: dict[str, Path],
    expected: dict[str, list[torch.Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load(checkpoints["secret"])
    caplog.set_level(logging.WARNING, logger="moe_runtime")
    with moe_runtime.record(model) as recorder:
        assert_same(outputs(model), expected["secret"])
    assert caplog.text.count("its routing") + caplog.text.count("routing of such layers") == 1
    with pytest.raises(moe_runtime.errors.TraceError, match="nothing was recorded"):
        _ = recorder.trace


# -- what goes wrong -----------------------------------------------------------------------------


def test_an_expert_is_missing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["switch"] / "model.safetensors")
    name = "decoder.block.1.layer.2.mlp.experts.expert_6.wo.weight"
    tensors.pop(name)
    _rewrite(checkpoints["switch"], tmp_path, tensors)
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def test_an_expert_has_another_shape(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["switch"] / "model.safetensors")
    name = "decoder.block.1.layer.2.mlp.experts.expert_6.wo.weight"
    tensors[name] = tensors[name][:5].clone()
    _rewrite(checkpoints["switch"], tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"expert_6.wo.weight.*stored shape \(5, 48\)"):
        load(tmp_path)


def _rewrite(source: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())


@pytest.mark.parametrize("number", [1, 3, 10])
def test_a_read_fails(
    checkpoints: dict[str, Path],
    expected: dict[str, list[torch.Tensor]],
    fail_at: FailAt,
    number: int,
) -> None:
    def fail() -> int:
        raise OSError(5, "the disk is gone")

    model = load(checkpoints["switch"], "15%", preload=False)
    fail_at(number, fail)
    with pytest.raises(ExpertReadError, match="the disk is gone"):
        outputs(model)
    assert_whole(model, expected["switch"])
    moe_runtime.detach(model)
    assert_same(outputs(model), expected["switch"])


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["switch", "up"])
def test_an_expert_fails_in_the_middle(
    checkpoints: dict[str, Path],
    expected: dict[str, list[torch.Tensor]],
    name: str,
    error: type[BaseException],
) -> None:
    """In its own code: no hook of ours hears of an interrupt there."""
    model = load(checkpoints[name], "25%")
    path = read_spec(build(name)).layers[1].path
    experts = list(model.get_submodule(path).children())

    def fail(*_: Any) -> None:
        raise error

    handles = [next(e.children()).register_forward_hook(fail) for e in experts]
    with pytest.raises(error):
        outputs(model)
    for handle in handles:
        handle.remove()
    assert_whole(model, expected[name])
    moe_runtime.detach(model)
    assert_same(outputs(model), expected[name])


def test_gradients_are_refused_with_the_reason(checkpoints: dict[str, Path]) -> None:
    for name in ("switch", "up"):
        model = load(checkpoints[name])
        inputs = {"input_ids": batch()["input_ids"]}
        if name == "switch":
            inputs["decoder_input_ids"] = batch()["input_ids"]
        with pytest.raises(AttachError, match="no gradients"):
            model(**inputs).logits.sum().backward()
        model.train()
        with pytest.raises(AttachError, match="training mode"):
            model(**inputs)
        model.eval()
        moe_runtime.runtime_of(model).check_integrity()


def test_baking_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="modules of their own"):
        open_source(checkpoints["switch"])
