"""An automatic budget leaves room for the keys and values of the prompts that a command gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import moe_runtime
from moe_runtime import batch_loop
from moe_runtime.batch_loop import BatchLoop
from moe_runtime.batches import SCHEDULES, generate_batches, sequences_held
from moe_runtime.cli import app
from moe_runtime.cli.room import AskedRoom
from moe_runtime.errors import ConfigError
from moe_runtime.sequence_caches import GroupCache
from tiny import tiny_model

TEXTS = ["def one(a):", "The State of the Union is what it was", "x = 3"]
NEW = 3


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def longest() -> int:
    """Tokens of the longest text."""
    tokenizer = AutoTokenizer.from_pretrained(moe_runtime.bundled_model())
    return max(len(ids) for ids in tokenizer(TEXTS)["input_ids"])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    return path


def command(name: str, prompts: Path, *more: object) -> Any:
    """One of the commands on the bundled model."""
    model = moe_runtime.bundled_model()
    if name == "trace":
        out = prompts.with_name(f"{len(list(prompts.parent.iterdir()))}.trace.safetensors")
        return run(name, model, "--data", prompts, "-o", out, "-n", NEW, *more)
    given = ("-p", TEXTS[1]) if name == "generate" else ("--prompts", prompts, "--window", 1)
    return run("generate", model, *given, "-n", NEW, *more)


@pytest.mark.parametrize(
    ("name", "options", "batch"),
    [
        ("generate", (), 1),
        ("many", ("--batch-size", 1), 2),
        ("many", ("--batch-size", 2), 5),  # all three, and a batch that is gathered
        ("many", (), 6),  # no more than there are prompts
        ("trace", (), 1),
        ("trace", ("--batch-size", 2), 2),
        ("trace", ("--batch-size", 8), 3),
    ],
)
def test_the_prompts_say_how_much(
    prompts: Path, longest: int, name: str, options: Sequence[object], batch: int
) -> None:
    told = json.loads(command(name, prompts, *options, "--json").stdout)["budget"]
    tokens = f"{longest + NEW} tokens"
    if batch > 1:
        tokens = f"{batch} times {tokens}"
    assert f"key/value cache of {tokens} and" in told["explanation"]
    assert told["shrunk"] is None
    assert told["slots"] > 0


@pytest.mark.parametrize("name", ["generate", "many", "trace"])
def test_what_is_asked_for_wins(prompts: Path, longest: int, name: str) -> None:
    result = command(name, prompts, "--max-batch", 5, "--max-length", 999, "--json")
    assert "5 times 999 tokens" in json.loads(result.stdout)["budget"]["explanation"]
    more = ("--max-batch", 5, "--batch-size", 2)[: 2 if name == "generate" else 4]
    result = command(name, prompts, *more, "--json")
    assert f"5 times {longest + NEW} tokens" in json.loads(result.stdout)["budget"]["explanation"]


@pytest.mark.parametrize("name", ["generate", "many", "trace"])
def test_people_are_told_unless_they_said_how_many_bytes(prompts: Path, name: str) -> None:
    assert "budget auto: " in command(name, prompts).stderr
    assert "budget" not in command(name, prompts, "--expert-budget", "50%").stderr


def test_less_room_more_experts(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is taken from the experts: with little free memory it shows."""
    monkeypatch.setattr("moe_runtime.budget.free_memory", lambda device: (256 << 20) + (8 << 20))
    slots = [
        json.loads(command("generate", prompts, *more, "--json").stdout)["budget"]["slots"]
        for more in ((), ("--max-length", 1000), ("--max-length", 2000))
    ]
    assert slots[0] > slots[1] > slots[2]


@given(
    lengths=st.lists(st.integers(0, 99), max_size=5), new=st.integers(0, 9), at_once=st.integers(1)
)
def test_room_for_prompts(lengths: list[int], new: int, at_once: int) -> None:
    room = AskedRoom().for_prompts(iter(lengths), new_tokens=new, at_once=at_once)
    assert room["max_batch"] == at_once
    assert room["max_length"] >= 1
    assert all(length + new <= room["max_length"] for length in lengths)
    assert room["max_length"] <= max([1, *(length + new for length in lengths), new])
    asked = AskedRoom(max_batch=7, max_length=8)
    given_ = asked.for_prompts(lengths, new_tokens=new, at_once=at_once)
    assert given_ == {"max_batch": 7, "max_length": 8}


@pytest.fixture(scope="module")
def attached() -> PreTrainedModel:
    return moe_runtime.attach(tiny_model(), device="cpu")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("batch_size", "window"), [(1, None), (2, 1), (2, 2), (3, None), (2, "all"), (9, "all")]
)
def test_no_more_sequences_are_held_than_room_is_left_for(
    attached: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    batch_size: int,
    window: int | str | None,
) -> None:
    gather = batch_loop.gather
    held: list[int] = []
    made: list[tuple[Sequence[GroupCache], GroupCache]] = []

    def counting(sources: Sequence[GroupCache], members: Sequence[int]) -> GroupCache:
        new = gather(sources, members)
        made.append((sources, new))
        fresh = sum(len(one.members) for source, one in made if source is sources)
        held.append(sum(len(one.members) for one in sources) + fresh)
        return new

    def arrange(self: BatchLoop) -> None:
        held.append(sum(len(one.members) for one in self._caches))
        arranged(self)

    arranged = BatchLoop._arrange
    monkeypatch.setattr(BatchLoop, "_arrange", arrange)
    monkeypatch.setattr(batch_loop, "gather", counting)
    prompts = [[1 + at, 2, 3][: 1 + at % 3] for at in range(9)]
    options: dict[str, Any] = {"batch_size": batch_size, "schedule": schedule, "window": window}
    generate_batches(attached, prompts, max_new_tokens=5, stop_tokens=range(0, 128, 7), **options)
    bound = sequences_held(len(prompts), **options)
    assert batch_size <= max(held) <= bound <= 2 * len(prompts)


def test_options_that_cannot_be_are_refused() -> None:
    for wrong in ({"batch_size": 0}, {"schedule": "best"}, {"window": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            sequences_held(3, **{"batch_size": 2, **wrong})  # type: ignore[arg-type]
