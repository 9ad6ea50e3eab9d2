"""Task files are refused by line, and checkers read an answer as a person would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import ConfigError
from moe_runtime.steering.tasks import CHECKERS, Task, judge, read_tasks, tasks_digest

GOOD = {"prompt": "What is 1+1?", "answer": "2", "checker": "number"}


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def task(checker: str, answer: str) -> Task:
    return Task(id="1", prompt="?", answer=answer, checker=checker)


def right(checker: str, answer: str, text: str) -> bool:
    return judge(task(checker, answer), text, end_marker="</think>", ended=True).right


def test_a_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        GOOD,
        "",
        {**GOOD, "id": "b", "family": "sum", "answer": 2, "more": [1]},
        {**GOOD, "prompt": "line\u2028separator"},
    )
    first, second, third = read_tasks(path)
    assert (first.id, first.family) == ("1", "")
    assert (second.id, second.family, second.answer) == ("b", "sum", "2")
    assert third.id == "4"
    assert tasks_digest([first]) != tasks_digest([second])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ({"answer": "2", "checker": "number"}, "field 'prompt' is missing"),
        ({**GOOD, "prompt": 3}, "field 'prompt' is 3, not a text"),
        ({**GOOD, "prompt": " "}, "field 'prompt' is empty"),
        ({**GOOD, "answer": None}, "field 'answer' is None"),
        ({**GOOD, "checker": "nummer"}, "unknown checker 'nummer'; known: exact, number"),
        ({**GOOD, "answer": "two"}, "is not a number"),
        ({**GOOD, "checker": "choice", "answer": "AB"}, "is not one letter"),
        ({**GOOD, "checker": "exact", "answer": " "}, "is not a text"),
        ({**GOOD, "checker": "regex", "answer": "("}, "is no pattern"),
        ({**GOOD, "id": "1"}, "the id '1' came before"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(ConfigError) as caught:
        read_tasks(path)
    assert f"{path} line 2" in str(caught.value)
    assert said in str(caught.value)


def test_a_file_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="no task in it"):
        read_tasks(write(tmp_path / "t.jsonl", ""))


@pytest.mark.parametrize(
    ("text", "ended", "form"),
    [
        ("<think>1</think>2", True, "ok"),
        ("<think>1</think>2", False, "cut"),
        ("<think>1", False, "cut"),
        ("2", True, "no_end"),
        ("<think>1</think> ", True, "no_answer"),
        ("<think>1</think>two", True, "no_answer"),
    ],
)
def test_the_form_of_an_answer(text: str, ended: bool, form: str) -> None:
    verdict = judge(task("number", "2"), text, end_marker="</think>", ended=ended)
    assert verdict.form == form
    assert verdict.right == (form == "ok")


def test_without_a_marker_the_whole_text_is_the_answer() -> None:
    assert judge(task("number", "2"), "it is 2", end_marker="", ended=True).right


@pytest.mark.parametrize(
    ("checker", "answer", "text", "expected"),
    [
        ("exact", "1,2", "x</think> 1,2\n", True),
        ("exact", "1,2", "x</think>1, 2", False),
        ("exact", "7", "7</think>8", False),  # what was thought does not count
        ("exact", "7", "a</think>8</think>7", True),  # the last end counts
        ("number", "7", "a</think>It is 7.", True),
        ("number", "7", "a</think>4+3=7.0", True),
        ("number", "7", "a</think>12-7", True),  # the sign after a digit is an operator
        ("number", "-7", "a</think>it is -7", True),
        ("number", "1200", "a</think>$1,200.", True),
        ("number", "1e3", "a</think>1000", True),
        ("number", "3", "a</think>1,2,3", True),  # no thousands
        ("number", "7", "a</think>7 or 8", False),
        ("choice", "B", "a</think>(B)", True),
        ("choice", "B", "a</think>b", True),
        ("choice", "b", "a</think>The answer is B. I am sure.", True),
        ("choice", "B", "a</think>Because", False),
        ("regex", r"\d+ apples?", "a</think> 12 apples\n", True),
        ("regex", r"\d+", "a</think>12 apples", False),
    ],
)
def test_checkers(checker: str, answer: str, text: str, expected: bool) -> None:
    assert right(checker, answer, text) == expected


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "= {} apples", "x={}."]))
def test_a_number_is_found_however_it_is_written(number: int, form: str) -> None:
    assert right("number", str(number), "5</think>" + form.format(number))
    assert not right("number", str(number + 1), "5</think>" + form.format(number))


@settings(max_examples=60)
@given(st.text(), st.sampled_from(sorted(CHECKERS)), st.booleans())
def test_no_text_breaks_a_checker(text: str, checker: str, ended: bool) -> None:
    answer = {"number": "1", "choice": "A"}.get(checker, "a")
    verdict = judge(task(checker, answer), text, end_marker="</think>", ended=ended)
    assert verdict.form == "ok" or not verdict.right
