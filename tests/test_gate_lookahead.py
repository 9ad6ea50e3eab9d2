"""Gate lookahead on live models: routers found by structure, maps fitted and saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from moe_runtime.predictors import StepRows, load_predictor, save_predictor
from moe_runtime.predictors.gate_lookahead import GateLookaheadPredictor
from moe_runtime.predictors.hidden_states import record_hidden, routers_of
from moe_runtime.predictors.replay import as_decode, replay

from architectures import FIRST_TEXT_ID, LAST_TEXT_ID, ArchitectureCase, build
from moe_runtime.errors import PredictorError
from moe_runtime.model_spec import read_spec
from tiny import VOCAB, tiny_model

WITH_A_LINEAR_ROUTER = ("GptOssForCausalLM", "GraniteMoeForCausalLM", "MixtralForCausalLM")


def texts(count: int, length: int = 24, seed: int = 0, last: int = VOCAB) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(FIRST_TEXT_ID, last, (length,), generator=generator) for _ in range(count)
    ]


def built(name: str) -> torch.nn.Module:
    config = name.replace("ForCausalLM", "Config")
    case = ArchitectureCase(name=name, auto_class="AutoModelForCausalLM", config_class=config)
    return build(case, torch.float32)


@pytest.fixture(scope="module")
def fitted() -> GateLookaheadPredictor:
    return GateLookaheadPredictor.fit_model(tiny_model().eval(), texts(30), steps=60)


def recall(predictor: GateLookaheadPredictor, distance: int) -> float:
    """Over layers that far from the one observed, on texts that nothing was fitted to."""
    model = tiny_model().eval()
    held = record_hidden(model, read_spec(model), texts(5, seed=9), 1000)
    hits = []
    for one in replay(predictor, as_decode(held.trace), 3, held.hidden):
        if one.distance == distance and one.position >= distance:
            k = one.topk_ids.shape[1]
            top = np.argsort(-one.probabilities, axis=1, kind="stable")[:, :k]
            hits.append((top[:, :, None] == one.topk_ids[:, None, :]).any(axis=2).mean())
    return float(np.mean(hits))


@pytest.mark.parametrize("name", WITH_A_LINEAR_ROUTER)
def test_the_router_is_found_by_structure(name: str) -> None:
    """What it says about the experts' own input is what the model chose."""
    model = built(name)
    spec = read_spec(model)  # type: ignore[arg-type]
    run = record_hidden(model, spec, texts(2, last=LAST_TEXT_ID), 100)
    for position, router in enumerate(routers_of(model, spec, run.hidden[0].shape[1])):
        k = run.trace.top_k[position]
        said = (run.hidden[position] @ router.weight.T + router.bias).topk(k).indices.numpy()
        chosen = run.trace.topk_ids[:, position].astype(np.int64)
        np.testing.assert_array_equal(np.sort(said, axis=1), np.sort(chosen, axis=1))


def test_no_such_router() -> None:
    """Its experts work on a smaller state than its router."""
    model = built("NemotronHForCausalLM")
    with pytest.raises(PredictorError, match=r"layer 1: no matrix of 16 x .*use another predictor"):
        GateLookaheadPredictor.fit_model(model, texts(2, last=LAST_TEXT_ID))


def test_it_beats_chance_and_the_bare_router(fitted: GateLookaheadPredictor) -> None:
    bare = GateLookaheadPredictor.fit_model(tiny_model().eval(), texts(30), steps=0)
    chance = 4 / 16
    assert recall(bare, 1) > chance + 0.05
    assert recall(fitted, 1) >= recall(bare, 1)
    assert recall(fitted, 2) > chance


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().eval()
    ids = texts(3)
    before = model(ids[0][None]).logits
    GateLookaheadPredictor.fit_model(model, ids, steps=2)
    assert torch.equal(model(ids[0][None]).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_its_file(fitted: GateLookaheadPredictor, tmp_path: Path) -> None:
    loaded = load_predictor(save_predictor(fitted, tmp_path / "g.predictor.safetensors"))
    assert isinstance(loaded, GateLookaheadPredictor)
    assert recall(loaded, 1) == pytest.approx(recall(fitted, 1), abs=0.02)  # half precision


def test_without_hidden_states_it_is_popularity(fitted: GateLookaheadPredictor) -> None:
    rows = StepRows(
        token_ids=np.zeros(2, np.int64),
        sequence_ids=np.arange(2),
        positions=np.zeros(2, np.int64),
        decode=False,
    )
    fitted.reset()
    fitted.begin_step(rows)
    np.testing.assert_allclose(fitted.predict(0).sum(axis=1), 4, atol=0.2)
    fitted.observe(0, np.array([[0, 1, 2, 3], [0, 1, 2, 3]]))
    first = fitted.predict(1)
    np.testing.assert_array_equal(first[0], first[1])
    with pytest.raises(PredictorError, match="made for another model"):
        fitted.observe(1, np.zeros((2, 4), np.int64), torch.zeros(2, 7))
    fitted.reset()


def test_refusals() -> None:
    with pytest.raises(PredictorError, match="two texts at least"):
        GateLookaheadPredictor.fit_model(tiny_model(), texts(1))
    model = tiny_model().eval()
    trace = record_hidden(model, read_spec(model), texts(2), 100).trace
    with pytest.raises(PredictorError, match="fitted to a live model"):
        GateLookaheadPredictor.fit([trace])
    with pytest.raises(PredictorError, match="needs hidden states"):
        list(replay(GateLookaheadPredictor.fit_model(model, texts(3), steps=1), trace))
