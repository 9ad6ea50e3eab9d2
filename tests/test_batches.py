"""`generate_batches`: the tokens that each prompt has alone, whatever runs beside it."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.decayed_path import DecayedPath
from transformers import (
    DynamicCache,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import moe_runtime
from architectures import build, cases
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError, UnsupportedModelError
from moe_runtime.sequence_caches import GroupCache, gather
from moe_runtime.token_choice import TokenChoice
from moe_runtime.trace import RoutingTrace
from running import load
from tiny import EXPERT_BYTES, VOCAB, TinyCheckpoints

NEW = 5
RANDOM = np.random.default_rng(5)
PROMPTS = [RANDOM.integers(1, VOCAB, n).tolist() for n in (4, 11, 1, 7, 16, 3, 9)]


class Scripted:
    """Random paths, the same every run; fails as it is told to."""

    name: ClassVar[str] = "scripted"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, grid: ExpertGrid, fault: str = "", at: int = 3) -> None:
        self.grid, self.fault, self.at = grid, fault, at
        self.reset()

    def reset(self) -> None:
        self.rng, self.steps, self.rows = np.random.default_rng(1), 0, 0

    def begin_step(self, rows: StepRows) -> None:
        self.steps, self.rows = self.steps + 1, len(rows)
        self._fail("begin_step")

    def observe(self, position: int, topk_ids: Any, hidden: Any = None) -> None:
        assert topk_ids.shape[0] == self.rows
        self._fail("observe")

    def predict(self, position: int) -> Probabilities:
        self._fail("predict")
        paths = self.rng.random((self.rows, self.grid.experts[position])).astype(np.float32)
        if self.steps >= self.at and self.fault == "nan":
            paths[0, 0] = np.nan
        return paths[1:] if self.steps >= self.at and self.fault == "rows" else paths

    def _fail(self, where: str) -> None:
        if self.fault == where and self.steps >= self.at:
            raise RuntimeError("no idea")


class Recalled(Scripted):
    """The true path of each token, from a trace of the same prompts."""

    name: ClassVar[str] = "recalled"

    def __init__(self, trace: RoutingTrace) -> None:
        super().__init__(trace.grid)
        keys = zip(trace.sequence_ids.tolist(), trace.positions.tolist(), strict=True)
        self.row = {key: at for at, key in enumerate(keys)}
        self.chosen = trace.topk_ids.astype(np.int64)

    def begin_step(self, rows: StepRows) -> None:
        keys = zip(rows.sequence_ids.tolist(), rows.positions.tolist(), strict=True)
        self.at_rows = [self.row[key] for key in keys]

    def observe(self, position: int, topk_ids: Any, hidden: Any = None) -> None:
        # Rows are told of in the order in which they were announced, padding left out.
        assert np.array_equal(
            np.sort(topk_ids), np.sort(self.chosen[self.at_rows, position].reshape(topk_ids.shape))
        )

    def predict(self, position: int) -> Probabilities:
        path = np.zeros((len(self.at_rows), self.grid.experts[position]), np.float32)
        np.put_along_axis(path, self.chosen[self.at_rows, position], 1.0, axis=1)
        return path


@pytest.fixture(scope="module")
def model(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    return load(tiny_checkpoints.per_expert, expert_budget="100%")


@pytest.fixture(scope="module")
def paged(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    """The same in so little memory that every call reads."""
    return load(tiny_checkpoints.per_expert)


@pytest.fixture(scope="module")
def plain(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    return Qwen3MoeForCausalLM.from_pretrained(tiny_checkpoints.per_expert).eval()


@pytest.fixture(scope="module")
def alone(plain: PreTrainedModel) -> list[list[int]]:
    """What `generate` adds to each prompt alone."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = plain.generate(ids, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
        found.append(whole[0, len(prompt) :].tolist())
    return found


def run(model: PreTrainedModel, **options: Any) -> moe_runtime.BatchRun:
    options = {"batch_size": 2, "max_new_tokens": NEW, **options}
    return moe_runtime.generate_batches(model, PROMPTS, **options)


def lists(outcome: moe_runtime.BatchRun) -> list[list[int]]:
    return [list(tokens) for tokens in outcome.outputs]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "order"},
        {"schedule": "order", "window": 3},
        {"schedule": "union"},
        {"schedule": "union", "window": "all", "least_gain": 0.0},
        {"schedule": "k-medoids", "window": 3, "every": 2},
        {"schedule": "k-medoids", "window": 2, "batch_size": 3},
        {"batch_size": 1},
        {"batch_size": 20},
        {"batch_size": 2, "max_new_tokens": 1},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_tokens_are_those_of_generate(
    model: PreTrainedModel, alone: list[list[int]], options: dict[str, Any]
) -> None:
    outcome = run(model, verify=True, **options)
    count = options.get("max_new_tokens", NEW)
    assert lists(outcome) == [tokens[:count] for tokens in alone]
    agreement = outcome.agreement
    assert agreement is not None
    assert agreement.steps == count * len(PROMPTS) == outcome.new_tokens
    assert agreement.largest < 5e-5  # the tiny model's large random weights magnify rounding
    assert not agreement.different


def test_random_regrouping_each_step_changes_no_token(
    model: PreTrainedModel, alone: list[list[int]]
) -> None:
    grid = moe_runtime.runtime_of(model).spec.grid
    outcome = run(model, window=3, predictor=Scripted(grid), schedule="k-medoids", least_gain=0.0)
    assert lists(outcome) == alone
    assert outcome.regroupings >= 3
    assert outcome.moved > outcome.regroupings
    assert outcome.predictor == "scripted"


def test_stop_tokens_end_a_sequence_and_free_its_place(
    model: PreTrainedModel, alone: list[list[int]]
) -> None:
    stop = {alone[0][2], alone[4][0], alone[5][3]}
    expected = []
    for tokens in alone:
        ends = [at for at, token in enumerate(tokens) if token in stop]
        expected.append(tokens[: ends[0] + 1] if ends else tokens)
    assert expected != alone
    for schedule in ("order", "union"):
        outcome = run(model, stop_tokens=stop, schedule=schedule)
        assert lists(outcome) == expected
        assert outcome.decode.tokens == sum(map(len, expected)) - len(PROMPTS)
    full = run(model, schedule="order", stop_tokens=())
    stopped = run(model, schedule="order", stop_tokens=stop)
    assert stopped.decode.calls < full.decode.calls


def test_drawn_tokens_do_not_depend_on_the_batches(model: PreTrainedModel) -> None:
    drawn = run(model, temperature=1.0, seed=3, schedule="order", verify=True)
    assert drawn.agreement is not None
    assert not drawn.agreement.different
    for options in ({"batch_size": 4}, {"window": "all", "least_gain": 0.0}):
        assert run(model, temperature=1.0, seed=3, **options).outputs == drawn.outputs
    assert run(model, temperature=1.0, seed=4).outputs != drawn.outputs


def test_no_seed_draws_what_another_draws() -> None:
    logits, seen = torch.zeros(8), set()
    for seed in (0, 1, 2, 256, 1 << 24, 1 << 32):
        for number in (0, 1, 256):
            choice = TokenChoice(temperature=1.0, seed=seed, number=number)
            seen.add(tuple(choice.scores(logits).tolist()))
    assert len(seen) == 18


def test_drawn_tokens_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 3.0])
    choice = TokenChoice(temperature=2.0, seed=1, number=0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[int(choice.scores(logits).argmax())] += 1
    expected = (logits / 2.0).softmax(0) * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees, .001


def test_a_recording_tells_sequences_apart(model: PreTrainedModel, alone: list[list[int]]) -> None:
    grid = moe_runtime.runtime_of(model).spec.grid
    with moe_runtime.record(model) as recorder:
        run(model, window=3, predictor=Scripted(grid), schedule="k-medoids", least_gain=0.0)
        model.generate(  # type: ignore[operator]
            torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False
        )
        run(model)
    trace = recorder.trace
    fed = [prompt + tokens[:-1] for prompt, tokens in zip(PROMPTS, alone, strict=True)]
    for number, tokens in enumerate([*fed, PROMPTS[0] + alone[0][:2], *fed]):
        rows = trace.select(sequences=[number])
        assert rows.token_ids.tolist() == tokens
        assert rows.positions.tolist() == list(range(len(tokens)))
    assert len(np.unique(trace.sequence_ids)) == 2 * len(PROMPTS) + 1


def test_the_batch_that_ran_last_runs_first(model: PreTrainedModel) -> None:
    with moe_runtime.record(model) as recorder:
        run(model, schedule="order", window=3)
    decoded = recorder.trace.decode()
    calls = [
        frozenset(decoded.sequence_ids[decoded.step_ids == step].tolist())
        for step in np.unique(decoded.step_ids)
    ]
    # Three batches under way, then what is left of the prompts: there and back again.
    assert calls[:9] == [calls[at] for at in (0, 1, 2, 2, 1, 0, 0, 1, 2)]
    assert len(set(calls[:3])) == 3


def test_counts_are_those_of_the_routing(paged: PreTrainedModel) -> None:
    with moe_runtime.record(paged) as recorder:
        outcome = run(paged, window=2)
    decoded = recorder.trace.decode()
    steps = np.unique(decoded.step_ids)
    active = sum(len(access.experts) for access in decoded.iter_accesses())
    decode = outcome.decode
    assert decode.calls == len(steps)
    assert decode.tokens == len(decoded)
    assert decode.active == active
    assert decode.hits is not None
    assert decode.misses is not None
    assert decode.hits + decode.misses == active
    assert decode.bytes_read is not None
    assert decode.bytes_read >= decode.misses * EXPERT_BYTES  # direct reads take aligned supersets
    assert decode.active_per_call == active / len(steps)
    prompt = recorder.trace.prefill()
    assert outcome.prefill.tokens == len(prompt) == sum(map(len, PROMPTS))
    assert outcome.prefill.active == sum(len(a.experts) for a in prompt.iter_accesses())
    slots = sum(moe_runtime.runtime_of(paged).budget.slots) / len(decoded.layer_ids)
    expected = sum(max(0.0, len(a.experts) - slots) for a in decoded.iter_accesses())
    assert decode.on_demand == pytest.approx(expected)
    plain = outcome.to_dict()
    assert plain["decode"]["active_per_call"] == decode.active_per_call
    assert plain["outputs"] == lists(outcome)


def test_true_paths_need_fewer_experts_than_prompts_in_order(model: PreTrainedModel) -> None:
    with moe_runtime.record(model) as recorder:
        ordered = run(model, schedule="order", batch_size=3)
    recalled = Recalled(recorder.trace)
    grouped = run(model, predictor=recalled, batch_size=3, window="all")
    assert not grouped.fallback
    assert grouped.outputs == ordered.outputs
    assert grouped.decode.calls == ordered.decode.calls
    assert ordered.decode.active is not None
    assert grouped.decode.active is not None
    assert grouped.decode.active < 0.97 * ordered.decode.active


@pytest.mark.parametrize("fault", ["begin_step", "observe", "predict", "nan", "rows"])
def test_a_failing_predictor_changes_no_token(
    model: PreTrainedModel, alone: list[list[int]], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = moe_runtime.runtime_of(model).spec.grid
    predictor = Scripted(grid, fault, at=6)
    with caplog.at_level(logging.WARNING, logger="moe_runtime"):
        outcome = run(model, predictor=predictor, window=3, schedule="k-medoids", least_gain=0.0)
    assert lists(outcome) == alone
    assert "scripted" in outcome.fallback
    assert outcome.regroupings
    assert [record.message for record in caplog.records if "scripted" in record.message]


def test_an_interruption_leaves_the_model_usable(
    paged: PreTrainedModel, alone: list[list[int]]
) -> None:
    def press(done: int, tokens: int) -> None:
        if tokens > 10:
            raise KeyboardInterrupt

    runtime = moe_runtime.runtime_of(paged)
    with pytest.raises(KeyboardInterrupt):
        run(paged, progress=press)
    assert not runtime.executor.listeners
    runtime.check_integrity()
    assert lists(run(paged)) == alone
    runtime.check_integrity()


def test_a_trained_model_agrees_to_rounding() -> None:
    model = moe_runtime.from_pretrained(
        moe_runtime.bundled_model(), expert_budget="40%", device="cpu", dtype=torch.float32
    )
    grid = moe_runtime.runtime_of(model).spec.grid
    outcome = moe_runtime.generate_batches(
        model,
        PROMPTS,
        batch_size=2,
        max_new_tokens=4,
        window="all",
        schedule="k-medoids",
        least_gain=0.0,
        predictor=Scripted(grid),
        verify=True,
    )
    assert outcome.regroupings
    assert outcome.agreement is not None
    assert outcome.agreement.largest < 1e-5
    assert not outcome.agreement.beyond
    assert not outcome.agreement.different


def test_progress_counts_prompts_and_tokens(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    outcome = run(model, progress=lambda done, tokens: seen.append((done, tokens)))
    assert seen == sorted(seen)
    assert seen[-1] == (len(PROMPTS), outcome.new_tokens)


def test_a_plain_model_stays_in_order_and_counts_nothing(
    plain: PreTrainedModel, alone: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="moe_runtime"):
        outcome = run(plain)
    assert lists(outcome) == alone
    assert not outcome.scheduled
    assert "no path is known" in outcome.fallback
    assert caplog.records
    assert outcome.decode.active is None
    assert outcome.decode.active_per_call is None
    assert outcome.decode.tokens


def test_a_plain_model_is_scheduled_by_a_predictor(
    plain: PreTrainedModel, alone: list[list[int]]
) -> None:
    grid = ExpertGrid(layers=(0,), experts=(16,))
    outcome = run(plain, predictor=Scripted(grid), schedule="k-medoids", least_gain=0.0)
    assert lists(outcome) == alone
    assert outcome.regroupings


# Full attention with keys and values of two widths, sliding windows with sinks, both in one model,
# chunked experts' granite, a window of eight.
ARCHITECTURES = {
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "Gemma4ForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "MixtralForCausalLM",
}


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.name in ARCHITECTURES], ids=lambda case: case.name
)
def test_other_kinds_of_attention_are_regrouped(case: Any) -> None:
    model = build(case, torch.float32)
    outcome = moe_runtime.generate_batches(
        model,
        [[3 + token % 60 for token in prompt] for prompt in PROMPTS],
        batch_size=2,
        max_new_tokens=12,
        window=3,
        schedule="k-medoids",
        predictor=Scripted(ExpertGrid(layers=(0,), experts=(16,))),
        stop_tokens=(),
        verify=True,
    )
    assert outcome.regroupings >= 3
    assert outcome.agreement is not None
    assert outcome.agreement.largest < 2e-5
    assert not outcome.agreement.different


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("Qwen3NextForCausalLM", "layer 0"),
        ("MiniMaxForCausalLM", "layer 1 keeps"),
    ],
)
def test_a_past_that_is_no_keys_and_values_is_refused(name: str, layer: str) -> None:
    case = next((case for case in cases() if case.name == name), None)
    if case is None:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(UnsupportedModelError, match=layer):
        moe_runtime.generate_batches(
            build(case, torch.float32), [[5, 6]], batch_size=1, max_new_tokens=2
        )


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(
        vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, pad_token_id=0
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        run(T5ForConditionalGeneration(config).eval(), schedule="order")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "magic"}, "union, k-medoids, order"),
        ({"window": 0}, "window"),
        ({"window": "many"}, "'all'"),
        ({"every": 0}, "every"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"least_gain": 1.0}, "least_gain"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_named(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(model, **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is"),
        (["text"], "prompt 0 is 'text'"),
        ([[1], [2, VOCAB]], f"prompt 1 has the token id {VOCAB}"),
    ],
)
def test_bad_prompts_are_named(model: PreTrainedModel, prompts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moe_runtime.generate_batches(model, prompts, batch_size=2, max_new_tokens=2)


def test_a_predictor_that_does_not_fit_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="fitted to this model"):
        run(model, predictor=DecayedPath(ExpertGrid(layers=(0,), experts=(16,))))

    class Looking(Scripted):
        needs_hidden: ClassVar[bool] = True

    with pytest.raises(ConfigError, match="hidden states"):
        run(model, predictor=Looking(moe_runtime.runtime_of(model).spec.grid))


def test_rows_gathered_twice_are_what_they_were() -> None:
    """Keys of a token carry its sequence and place, so any row out of place shows."""

    def group(members: list[int], lengths: list[int]) -> GroupCache:
        longest = max(lengths)
        keys = torch.full((len(members), 2, longest, 3), float("nan"))
        for row, (member, length) in enumerate(zip(members, lengths, strict=True)):
            tokens = 100.0 * member + torch.arange(length)
            keys[row, :, longest - length :] = tokens[None, :, None]
        cache = DynamicCache()
        for layer in range(2):
            cache.update(keys + layer, -keys - layer, layer)
        return GroupCache(members=members, lengths=lengths, cache=cache)

    sources = [group([0, 1, 2], [5, 2, 9]), group([3, 4], [1, 4])]
    moved = [gather(sources, [4, 1]), gather(sources, [3, 0, 2])]
    assert [one.lengths for one in moved] == [[4, 2], [1, 5, 9]]
    assert [one.columns for one in moved] == [4, 9]
    for start in (sources, moved):
        for members in ([2, 4], [0], [1, 3, 0], [3, 1]):
            found = gather(start, members)
            assert found.columns == max(found.lengths)
            for row, (member, length) in enumerate(zip(members, found.lengths, strict=True)):
                for at, layer in enumerate(found.cache.layers):
                    expected = 100.0 * member + torch.arange(length) + at
                    assert torch.equal(layer.keys[row, 1, -length:, 2], expected)
                    assert torch.equal(layer.values[row, 0, -length:, 0], -expected)
    mask = moved[1].mask(torch.device("cpu"))
    assert mask.sum(1).tolist() == [2, 6, 10]
    assert mask[0].tolist() == [0] * 8 + [1, 1]
