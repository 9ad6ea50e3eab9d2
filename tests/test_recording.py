"""`record(model)` writes down the routing that hooks on a plain model's experts see.

Does not test the trace's file form beyond a round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.errors import TraceError
from moe_runtime.eviction import make_policy
from moe_runtime.simulate import simulate
from moe_runtime.trace import DECODE, PREFILL, RoutingTrace
from tiny import EXPERTS, LAYERS, TOP_K, VOCAB, TinyCheckpoints, tiny_model

NEW = 5


@dataclass
class Observed:
    """The calls of a plain model: arguments of its forward, and its experts' routing."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    routing: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def columns(self) -> dict[str, np.ndarray[Any, Any]]:
        """The rows that a trace should have, worked out from these calls alone."""
        rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        first, sequences = 0, 0
        for step, (call, layers) in enumerate(zip(self.calls, self.routing, strict=True)):
            ids, mask, past = call["ids"], call["mask"], call["past"]
            batch, length = ids.shape
            if past == 0:
                first, sequences = sequences, sequences + batch
            for sequence in range(batch):
                for column in range(length):
                    if not mask[sequence, past + column]:
                        continue
                    row = sequence * length + column
                    rows["topk_ids"].append([index[row].tolist() for index, _ in layers])
                    rows["topk_weights"].append([weight[row].tolist() for _, weight in layers])
                    rows["token_ids"].append(int(ids[sequence, column]))
                    rows["sequence_ids"].append(first + sequence)
                    rows["positions"].append(int(mask[sequence, : past + column].sum()))
                    rows["phase"].append(DECODE if past and length == 1 else PREFILL)
                    rows["step_ids"].append(step)
        return {name: np.array(values) for name, values in rows.items()}


COLUMNS = (
    "topk_ids",
    "topk_weights",
    "token_ids",
    "sequence_ids",
    "positions",
    "phase",
    "step_ids",
)


def observe(model: PreTrainedModel) -> Observed:
    """Watch a plain model from now on."""
    seen = Observed()

    def before(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = options["input_ids"] if "input_ids" in options else arguments[0]
        cache = options.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = options.get("attention_mask")
        if mask is None:
            mask = torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.int64)
        seen.calls.append({"ids": ids.clone(), "mask": mask.clone().bool(), "past": past})
        seen.routing.append([])

    def routed(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.routing[-1].append((arguments[1].clone(), arguments[2].clone()))

    model.register_forward_pre_hook(before, with_kwargs=True)
    for layer in range(LAYERS):
        model.get_submodule(f"model.layers.{layer}.mlp.experts").register_forward_pre_hook(routed)
    return seen


def batch() -> dict[str, torch.Tensor]:
    """Three sequences; the second and third are padded on the left."""
    ids = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :8] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def single() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, inputs: dict[str, torch.Tensor], **how: Any) -> None:
    model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **how})


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model(**inputs)


RUNS: dict[str, Callable[[Any], None]] = {
    "a prompt": lambda model: forward(model, single()),
    "a prompt without a mask": lambda model: forward(model, {"input_ids": single()["input_ids"]}),
    "prefill and decode": lambda model: generate(model, single()),
    "a padded batch": lambda model: forward(model, batch()),
    "a padded batch and decode": lambda model: generate(model, batch()),
    "several calls": lambda model: [generate(model, batch()), generate(model, single())],
    "chunks": lambda model: generate(model, single(), prefill_chunk_size=5),
    "no cache": lambda model: generate(model, single(), use_cache=False),
}


def load(checkpoints: TinyCheckpoints, budget: str = "30%", **options: Any) -> PreTrainedModel:
    model = moe_runtime.from_pretrained(
        checkpoints.per_expert, expert_budget=budget, device="cpu", **options
    )
    assert isinstance(model, PreTrainedModel)
    return model


def assert_equal(trace: RoutingTrace, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    for name in COLUMNS:
        if name == "topk_weights":  # kept in float16
            np.testing.assert_allclose(trace.topk_weights, expected[name], atol=1e-3)
        else:
            np.testing.assert_array_equal(getattr(trace, name), expected[name], err_msg=name)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("options", [{}, {"budget": "100%"}, {"exact": True}], ids=str)
def test_the_trace_is_what_hooks_see(
    tiny_checkpoints: TinyCheckpoints, run: Callable[[Any], None], options: dict[str, Any]
) -> None:
    plain = tiny_model()
    seen = observe(plain)
    run(plain)
    model = load(tiny_checkpoints, **options)
    with moe_runtime.record(model) as recorder:
        run(model)
    trace = recorder.trace
    assert_equal(trace, seen.columns())
    assert trace.layer_ids == tuple(range(LAYERS))
    assert trace.experts == (EXPERTS,) * LAYERS
    assert trace.top_k == (TOP_K,) * LAYERS
    assert trace.fingerprint == moe_runtime.runtime_of(model).spec.fingerprint
    assert trace.model_id == str(tiny_checkpoints.per_expert)


@pytest.mark.parametrize("budget", ["auto", "30%"])
def test_an_attached_model_is_recorded_alike(budget: str) -> None:
    plain = tiny_model()
    seen = observe(plain)
    generate(plain, batch())
    model = moe_runtime.attach(tiny_model(), expert_budget=budget, device="cpu")
    with moe_runtime.record(model, tokenizer_id="words") as recorder:
        generate(model, batch())
    assert_equal(recorder.trace, seen.columns())
    assert recorder.trace.tokenizer_id == "words"


def test_recording_does_not_change_the_outputs(tiny_checkpoints: TinyCheckpoints) -> None:
    model = load(tiny_checkpoints)
    with torch.no_grad():
        expected = model(**batch()).logits
        with moe_runtime.record(model):
            found = model(**batch()).logits
    real = batch()["attention_mask"].bool()
    assert torch.equal(found[real], expected[real])


def test_only_what_runs_inside_is_recorded(tiny_checkpoints: TinyCheckpoints) -> None:
    model = load(tiny_checkpoints)
    forward(model, single())
    with moe_runtime.record(model) as outer:
        forward(model, single())
        with moe_runtime.record(model) as inner:
            forward(model, batch())
        forward(model, single())
    forward(model, single())
    real = int(batch()["attention_mask"].sum())
    assert inner.trace.tokens == real
    assert outer.trace.tokens == 12 + real + 12
    assert outer.trace.sequence_ids.max() == 4
    np.testing.assert_array_equal(outer.trace[12 : 12 + real].topk_ids, inner.trace.topk_ids)
    with moe_runtime.record(model) as idle:
        pass
    with pytest.raises(TraceError, match="nothing was recorded"):
        _ = idle.trace


def test_a_call_that_fails_leaves_no_rows(tiny_checkpoints: TinyCheckpoints) -> None:
    model = load(tiny_checkpoints)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with moe_runtime.record(model) as recorder:
        forward(model, single())
        hook = model.get_submodule("model.layers.2").register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            forward(model, batch())
        hook.remove()
        forward(model, single())
    trace = recorder.trace
    assert trace.tokens == 24
    assert trace.step_ids.tolist() == [0] * 12 + [1] * 12
    np.testing.assert_array_equal(trace.topk_ids[:12], trace.topk_ids[12:])
    assert not (trace.topk_ids == 65535).any()


def test_it_survives_a_file(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    model = load(tiny_checkpoints)
    with moe_runtime.record(model) as recorder:
        generate(model, batch())
    trace = recorder.trace
    again = moe_runtime.RoutingTrace.load(trace.save(tmp_path / "run.trace.safetensors"))
    assert again.description() == trace.description()
    for name, column in trace.columns().items():
        np.testing.assert_array_equal(again.columns()[name], column)


def test_its_accesses_are_what_the_cache_saw(tiny_checkpoints: TinyCheckpoints) -> None:
    model = load(tiny_checkpoints, preload=False)
    with moe_runtime.record(model) as recorder:
        generate(model, batch())
        generate(model, single())
    runtime = moe_runtime.runtime_of(model)
    recorded, ran = recorder.trace.accesses(), runtime.profiler.accesses
    assert len(recorded) == len(ran)
    for one, other in zip(recorded, ran, strict=True):
        assert one.position == other.position
        np.testing.assert_array_equal(one.experts, other.experts)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    # So simulating the trace gives the counters of the run.
    (slots,) = runtime.budget.slots
    grid = runtime.spec.grid
    expected = simulate(make_policy("lru", grid), grid, recorded, slots)
    counters = moe_runtime.report(model).counters
    assert counters.hits == expected.hits
    assert counters.misses == expected.misses
    assert counters.evictions == expected.evictions
