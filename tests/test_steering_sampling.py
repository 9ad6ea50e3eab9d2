"""Samples are draws of the model's distribution, belong to their problem and number alone, and an
evaluation that is interrupted ends as one that is not."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moe_runtime
from moe_runtime.cli import app
from moe_runtime.errors import ConfigError
from moe_runtime.model_spec import read_spec
from moe_runtime.steering import Steering, write_steering
from moe_runtime.steering.arm_runner import Progress
from moe_runtime.steering.controls import Controls
from moe_runtime.steering.evaluate import evaluate_steering
from moe_runtime.steering.evaluation import SteeringEvaluation
from moe_runtime.steering.journal import Journal
from moe_runtime.steering.noise import SampleNoise, noise_stream, warpers
from moe_runtime.steering.outcomes import Markers, Outcome, outcome_of, thinking_tokens
from moe_runtime.steering.sampling import Completion, Request, Sampling, complete
from moe_runtime.steering.tasks import Task, read_tasks
from moe_runtime.steering.thought_penalty import ThoughtSwitchingPenalty

STOP, PAD = frozenset({2}), 0
QUESTIONS = {
    "Which is the largest of 41,12,37?": "41",
    "What is 12+7?": "19",
    "Sort 9,4,7.": "4,7,9",
    "How many of 3,25,14,8 are above 10?": "2",
}
TASKS = tuple(
    Task(id=f"t{at}", prompt=f"Question: {text}\nAnswer:", answer=answer, checker="exact")
    for at, (text, answer) in enumerate(QUESTIONS.items())
)
STEERING = Steering(betas={(2, 3): 1.0, (4, 5): 1.0})
SHORT = Sampling(max_new_tokens=30, temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def model() -> Any:
    # In float32, so that rounding, which does depend on the batch, changes no token.
    path = moe_runtime.bundled_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(moe_runtime.bundled_model())


def requests(tokenizer: Any, samples: int, tasks: Sequence[Task] = TASKS) -> list[Request]:
    return [
        Request(problem=task.id, sample=at, prompt=tuple(tokenizer.encode(task.prompt)))
        for task in tasks
        for at in range(samples)
    ]


def draw(model: Any, wanted: Sequence[Request], size: int) -> dict[tuple[str, int], Completion]:
    parts = complete(model, wanted, SHORT, batch_size=size, stop=STOP, pad=PAD)
    found = [one for part in parts for one in part]
    assert len(found) == len(wanted)
    return {(one.request.problem, one.request.sample): one for one in found}


# -- the noise -------------------------------------------------------------------------------------


def test_the_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -30.0, -math.inf])
    rows, steps, temperature = 50, 200, 0.7
    streams = [noise_stream(1, "p", at) for at in range(rows)]
    noise = SampleNoise(["row"] * rows, streams, temperature=temperature, stop=frozenset())
    seen: Counter[int] = Counter()
    ids: Any = torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(steps):
        seen.update(noise(ids, logits.expand(rows, -1)).argmax(-1).tolist())  # type: ignore[arg-type]
    expected = (logits / temperature).softmax(0)
    for token, share in enumerate(expected.tolist()):
        spread = math.sqrt(share * (1 - share) * rows * steps)
        assert abs(seen[token] - share * rows * steps) <= 4 * spread + 0.5


def test_streams_are_apart() -> None:
    names = list(itertools.product((0, 1, 2**32), ("p0", "p1", "p10"), (0, 1, 10)))
    first = {noise_stream(*name).standard_exponential() for name in names}
    assert len(first) == len(names)
    assert noise_stream(1, "11", 1).random() != noise_stream(1, "1", 11).random()


def test_logits_that_are_not_finite_are_named() -> None:
    streams = [noise_stream(0, "a", 2)]
    noise = SampleNoise(["problem 'a', sample 2"], streams, temperature=1, stop=STOP)
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    scores: Any = torch.tensor([[0.0, math.nan, 1.0]])
    with pytest.raises(ConfigError, match=r"'a', sample 2: .* not finite; use a smaller beta"):
        noise(ids, scores)


def test_top_p_counts_at_the_temperature() -> None:
    scores: Any = torch.log(torch.tensor([[0.6, 0.3, 0.1]]))
    ids: Any = torch.zeros(1, 1, dtype=torch.long)

    def kept(temperature: float) -> int:
        (warp,) = warpers(temperature=temperature, top_p=0.7, top_k=0)
        return int(torch.isfinite(warp(ids, scores)).sum())

    assert kept(0.3) == 1  # sharper: the first token has 0.9
    assert kept(1.0) == 2
    assert kept(20.0) == 3  # flatter: the first two have less than 0.7
    assert [type(one).__name__ for one in warpers(temperature=1, top_p=1, top_k=5)] == [
        "TopKLogitsWarper"
    ]


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5])
def test_a_sample_does_not_depend_on_its_batch(model: Any, tokenizer: Any, size: int) -> None:
    wanted = requests(tokenizer, 2, TASKS[: 2 if size == 1 else 4])
    together = draw(model, wanted, len(wanted))
    apart = draw(model, wanted[::-1], size)
    assert together == apart
    assert len({one.tokens for one in together.values()}) > len(
        {one.problem for one in wanted}
    )  # samples do differ
    assert any(one.ended for one in together.values())


def test_samples_of_the_unsteered_model_are_the_same_inside_steering(
    model: Any, tokenizer: Any
) -> None:
    wanted = requests(tokenizer, 2)
    with moe_runtime.steer(model, STEERING):
        steered = draw(model, wanted, 8)
    assert steered == draw(model, wanted, 8)


def test_spans_of_thinking_outlast_a_batch(model: Any, tokenizer: Any) -> None:
    """Rows that go on in another call are steered there as if they had not been moved."""
    steering = Steering(betas={(2, 17): 24.0, (4, 28): 24.0}, thinking=("<think>", "</think>"))
    wanted = requests(tokenizer, 2, TASKS[:2])
    with moe_runtime.steer(model, steering, tokenizer=tokenizer):
        together, apart = draw(model, wanted, len(wanted)), draw(model, wanted, 1)
    assert together == apart
    assert together != draw(model, wanted, len(wanted))  # steering does something


def test_limits_are_those_of_each_sample(model: Any, tokenizer: Any) -> None:
    found = draw(model, requests(tokenizer, 3), 12)
    for one in found.values():
        assert len(one.tokens) == SHORT.max_new_tokens or one.ended
        assert not STOP & set(one.tokens)


# -- thinking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Q", "<think>1+1=2</think>2", "1+1=2"),
        ("Q", "so <think>1+1</think> a</think>2", "1+1</think> a"),
        ("Q<think>", "1+1=2</think>2", "1+1=2"),
        ("Q<think>", "1+1", "1+1"),
        ("Q<think></think>", "2", ""),
        ("Q", "1+1</think>2", "1+1"),
        ("Q", "<think>1+1", "1+1"),
        ("Q", "2", ""),
    ],
)
def test_thinking_is_counted_between_the_markers(
    tokenizer: Any, prompt: str, text: str, expected: str
) -> None:
    def ids(part: str) -> list[int]:
        return list(tokenizer.encode(part, add_special_tokens=False))

    markers = Markers(start="<think>", end="</think>")
    tokens = ids(text)
    found = thinking_tokens(tokens, text, tokenizer=tokenizer, markers=markers, prompt=prompt)
    assert found == len(ids(expected))
    silent = Markers(start="", end="")
    assert thinking_tokens(tokens, text, tokenizer=tokenizer, markers=silent, prompt=prompt) == 0


def test_an_outcome_has_its_verdict(tokenizer: Any) -> None:
    tokens = tokenizer.encode("<think>12+7=19</think>19", add_special_tokens=False)
    found = outcome_of(
        TASKS[1], 4, tokens, ended=True, tokenizer=tokenizer,
        markers=Markers(start="<think>", end="</think>"), prompt=TASKS[1].prompt,
    )  # fmt: skip
    assert (found.right, found.form, found.answer) == (True, "ok", "19")
    assert found.tokens == len(tokens) + 1


# -- the thought-switching penalty -----------------------------------------------------------------


def penalised(rows: list[list[int]], new: list[int], **options: Any) -> list[list[bool]]:
    """After the first tokens of rows and each one more: which rows have token 7 made rarer."""
    options = {"penalty": 3.0, "span": 2, "start": [(1,)], "end": [(2, 3)], **options}
    penalty = ThoughtSwitchingPenalty([7], new=new, **options)
    found = []
    for length in range(min(len(row) for row in rows) - 4, min(len(row) for row in rows) + 1):
        ids: Any = torch.tensor([row[:length] for row in rows])
        scores: Any = torch.zeros(len(rows), 9)
        changed = penalty(ids, scores)
        assert not scores.any()  # not in place
        assert set(changed.flatten().tolist()) <= {0.0, -3.0}
        found.append((changed[:, 7] < 0).tolist())
    return found


def test_the_penalty_lasts_while_a_thought_is_young() -> None:
    # 1 begins a thought, 7 another one, 2 3 ends them; two tokens are young.
    assert [row for (row,) in penalised([[1, 5, 5, 5, 7, 5]], [0])] == [
        True, False, False, True, True,
    ]  # fmt: skip
    assert [row for (row,) in penalised([[5, 5, 1, 2, 3, 5]], [0])] == [
        False, True, True, False, False,
    ]  # fmt: skip
    # Without a start marker: from the first new token on, in a row that goes on, too.
    assert [row for (row,) in penalised([[5, 5, 5, 5, 5, 5]], [0], start=())] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert [row for (row,) in penalised([[5, 5, 5, 5, 5, 5]], [1], start=())] == [
        True, False, False, False, False,
    ]  # fmt: skip


def test_the_penalty_makes_the_end_of_thinking_rarer(model: Any, tokenizer: Any) -> None:
    found = evaluated(
        model, tokenizer, betas=[1], samples=2,
        controls=Controls(kinds=("tip",), tip_penalty=30.0, tip_span=20),
    )  # fmt: skip
    assert min(found.arm("tip").thinking) >= 20 > found.unsteered.thinking_median.value


# -- whole evaluations -----------------------------------------------------------------------------


def evaluated(model: Any, tokenizer: Any, **options: Any) -> SteeringEvaluation:
    options = {
        "betas": [1, 8], "samples": 2, "sampling": SHORT, "batch_size": 6, "resamples": 200,
        "controls": Controls(kinds=("prompt",), prompt_place="before-last-line"),
        **options,
    }  # fmt: skip
    return evaluate_steering(model, tokenizer, TASKS, STEERING, **options)


class Interrupt:
    """Progress that gives up after so many calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, progress: Progress) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def without_times(found: SteeringEvaluation) -> dict[str, Any]:
    data = found.to_dict()
    for arm in data["arms"]:
        del arm["seconds"]
    return data


def test_an_interrupted_evaluation_goes_on_where_it_was(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    whole = evaluated(model, tokenizer)
    assert [arm.name for arm in whole.arms] == ["unsteered", "beta 8", "prompt"]
    assert whole.arm("prompt").right != whole.unsteered.right
    journal = tmp_path / "x.journal"
    calls: list[int] = []
    for stop_after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            evaluated(model, tokenizer, journal=journal, progress=Interrupt(stop_after))
    with journal.open("a") as file:
        file.write('{"arm": "prompt", "outco')  # killed while writing
    resumed = evaluated(model, tokenizer, journal=journal, progress=lambda p: calls.append(p.done))
    assert without_times(resumed) == without_times(whole)
    assert calls[0] > 4
    assert calls[-1] == 3 * len(TASKS) * 2
    assert evaluated(model, tokenizer, journal=journal, progress=Interrupt(1)) == resumed  # no work


def test_a_journal_of_other_settings_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, tokenizer, journal=journal, progress=Interrupt(1))
    with pytest.raises(ConfigError, match=r"settings.samples was 2, now 1; give the same to go on"):
        evaluated(model, tokenizer, journal=journal, samples=1)
    with pytest.raises(ConfigError, match=r"arms.beta 4 was null, now"):
        evaluated(model, tokenizer, journal=journal, betas=[8, 4])
    text = journal.read_text().splitlines()
    journal.write_text("\n".join([*text[:1], '{"arm": 1}', *text[1:]]) + "\n")
    with pytest.raises(ConfigError, match=r"x.journal line 2: damaged .* remove the file"):
        evaluated(model, tokenizer, journal=journal)
    journal.write_text("other\n")
    with pytest.raises(ConfigError, match="line 1: no JSON"):
        evaluated(model, tokenizer, journal=journal)


def test_a_journal_begun_but_empty_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    path.write_text('{"form')
    journal = Journal(path, {"a": (1, 2)})
    one = Outcome(
        problem="p", sample=0, right=True, form="ok", thinking=1, tokens=2, answer="\u2028é"
    )
    journal.add("arm", [one], 0.5)
    again = Journal(path, {"a": (1, 2)})
    assert again.outcomes("arm") == {("p", 0): one}
    assert (again.seconds("arm"), again.count) == (0.5, 1)


def test_greedy_samples_are_compared_by_mcnemar(model: Any, tokenizer: Any) -> None:
    greedy = Sampling(max_new_tokens=40, temperature=0)
    found = evaluated(model, tokenizer, sampling=greedy, samples=1, controls=Controls())
    assert {one.test for one in found.comparisons} == {"McNemar exact"}
    for task in TASKS:
        inputs = tokenizer(task.prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(out[:-1])
        at = found.problem_ids.index(task.id)
        assert found.unsteered.right[at] == (text.rpartition("</think>")[2].strip() == task.answer)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampling": Sampling(temperature=0)}, "give samples 1, or a temperature"),
        ({"samples": 0}, "samples and batch size have to be 1 or more"),
        ({"thinking": ("<think>", "")}, "needs an end marker too"),
        ({"sampling": Sampling(max_new_tokens=100_000)}, "'t0': its prompt of .* positions"),
        ({"betas": [-1]}, "beta of expert 3 in layer 2"),
    ],
)
def test_what_cannot_be_is_refused(
    model: Any, tokenizer: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        evaluated(model, tokenizer, **options)


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": math.nan}, {"top_p": 0},
     {"top_k": -1}, {"seed": -1}],
)  # fmt: skip
def test_impossible_sampling_is_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        Sampling(**options)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(model: Any, tmp_path: Path) -> Callable[..., Any]:
    """`moe-runtime steer eval` on two tasks and two experts; more options as given."""
    tasks = [
        {"prompt": one.prompt, "answer": one.answer, "checker": "exact", "family": "f"}
        for one in TASKS[:2]
    ]
    lines = [json.dumps(one) for one in tasks]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    write_steering(tmp_path / "s.steer.json", STEERING, model=read_spec(model))

    def run(*options: object) -> Any:
        return CliRunner().invoke(
            app,
            ["steer", "eval", moe_runtime.bundled_model(), "--tasks", str(tmp_path / "t.jsonl"),
             "--steer", str(tmp_path / "s.steer.json"), "-o", str(tmp_path / "o.steer-eval.json"),
             "-n", "30", "--samples", "2", "--dtype", "float32", *map(str, options)],
        )  # fmt: skip

    return run


def test_the_command_writes_and_shows(command: Callable[..., Any], tmp_path: Path) -> None:
    result = command("--beta", "1,4,...,16", "--controls", "tip", "--thinking-only")
    assert result.exit_code == 0, result.stderr
    found = SteeringEvaluation.load(tmp_path / "o.steer-eval.json")
    assert [arm.name for arm in found.arms] == ["unsteered", "beta 4", "beta 16", "tip"]
    assert found.settings.thinking_only
    assert found.settings.tasks == "t.jsonl"
    assert "would be chosen" in result.stdout
    assert not list(tmp_path.glob("*.journal"))
    assert len(read_tasks(tmp_path / "t.jsonl")) == 2


def test_the_command_runs_inside_a_budget(command: Callable[..., Any], tmp_path: Path) -> None:
    result = command("--beta", "8", "--json", "--expert-budget", "50%")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [arm["name"] for arm in data["arms"]] == ["unsteered", "beta 8"]
    plain = command("--beta", "8", "--json")
    rights = [arm["right"] for arm in data["arms"]]
    assert rights == [arm["right"] for arm in json.loads(plain.stdout)["arms"]]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--beta", "two"), 2, "write numbers of at least 0"),
        (("--beta", "1,...,8"), 2, "write numbers of at least 0"),
        (("--beta", "4,2,...,1"), 2, "write numbers of at least 0"),
        (("--controls", "randm"), 2, "unknown control"),
        (("--controls", "frequency"), 1, "--trace"),
        (("--prompt-place", "top"), 1, "unknown place"),
        (("--tasks", "none.jsonl"), 1, "none.jsonl: cannot be read"),
        (("--thinking", "", "", "--thinking-only"), 1, "needs both markers"),
    ],
)
def test_the_command_says_what_is_wrong(
    command: Callable[..., Any], options: tuple[str, ...], code: int, said: str
) -> None:
    result = command(*options)
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())
