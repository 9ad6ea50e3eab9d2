"""Tasks with a checkable answer: the file, the checkers, and what is wrong with an answer's form.

Knows texts; no tokens, no models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from moe_runtime.errors import ConfigError

__all__ = ["CHECKERS", "AnswerForm", "Task", "Verdict", "judge", "read_tasks", "tasks_digest"]

# Exactly one of these; all but "ok" count as wrong.
AnswerForm = Literal["ok", "cut", "no_end", "no_answer"]

# A reader finds the answer in the text after thinking (None: there is none to read); a comparer
# says whether that is the task's answer.
_Reader = Callable[[str], str | None]
_Comparer = Callable[[str, str], bool]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem.

    Args:
        id: unique in its file.
        prompt: what the model is given.
        answer: the right one; for the checker "regex", a pattern.
        checker: a name of `CHECKERS`.
        family: kind of problem; "" if the file names none.
    """

    id: str
    prompt: str
    answer: str
    checker: str
    family: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer is right, the form it has, and what was read as the answer ("": none)."""

    right: bool
    form: AnswerForm
    answer: str = ""


def read_tasks(path: str | Path) -> tuple[Task, ...]:
    """The tasks of a JSON-lines file; blank lines are left out.

    A line is an object with texts `prompt`, `answer`, `checker`, and perhaps `id` (by itself the
    line's number) and `family`. An answer that is a whole number may be written as one.

    Raises:
        ConfigError: a file that cannot be read or has no task; a line that is no such object, has
            an unknown checker, an answer that its checker cannot compare with, or an id that came
            before. Names file and line.
    """
    tasks: dict[str, Task] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); check the path") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        task = _task(line, where, str(number))
        if task.id in tasks:
            raise ConfigError(f"{where}: the id {task.id!r} came before; ids have to differ")
        tasks[task.id] = task
    if not tasks:
        raise ConfigError(f"{path}: no task in it; write a JSON object a line, see docs/formats.md")
    return tuple(tasks.values())


def tasks_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 of what the tasks say, whatever the file looks like."""
    fields = [[one.id, one.prompt, one.answer, one.checker, one.family] for one in tasks]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def judge(task: Task, text: str, *, end_marker: str, ended: bool) -> Verdict:
    """Whether a text generated after the task's prompt gives the right answer.

    Args:
        text: without the end token and what follows it.
        end_marker: of thinking; the answer is what follows the last one. "" if the model does not
            think: the answer is the whole text.
        ended: the model ended it. An answer cut off at the length limit may be the beginning of
            another one, so it counts as wrong.
    """
    if not ended:
        return Verdict(right=False, form="cut")
    rest = text
    if end_marker:
        _, found, rest = text.rpartition(end_marker)
        if not found:
            return Verdict(right=False, form="no_end")
    read, same = CHECKERS[task.checker]
    answer = read(rest)
    if answer is None:
        return Verdict(right=False, form="no_answer")
    return Verdict(right=same(answer, task.answer), form="ok", answer=answer)


def _task(line: str, where: str, number: str) -> Task:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON ({error}); write one object a line") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: {line.strip()!r:.60} is no JSON object")
    fields: dict[str, str] = {}
    for name, required in _FIELDS.items():
        value = data.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and name in {"id", "answer"}:
            value = str(value)
        if value is None and not required:
            continue
        if not isinstance(value, str):
            found = "is missing" if name not in data else f"is {value!r:.60}, not a text"
            raise ConfigError(f"{where}: field {name!r} {found}")
        fields[name] = value
    if fields["checker"] not in CHECKERS:
        raise ConfigError(
            f"{where}: unknown checker {fields['checker']!r}; known: {', '.join(CHECKERS)}"
        )
    if not fields["prompt"].strip():
        raise ConfigError(f"{where}: field 'prompt' is empty")
    _require_comparable(fields["checker"], fields["answer"], where)
    return Task(**{"id": number, **fields})


_FIELDS = {"id": False, "prompt": True, "answer": True, "checker": True, "family": False}


def _require_comparable(checker: str, answer: str, where: str) -> None:
    """The answer has to be one that its checker could read from a text."""
    wanted = {"number": "a number", "choice": "one letter", "exact": "a text"}
    if checker == "regex":
        try:
            re.compile(answer)
        except re.error as error:
            raise ConfigError(f"{where}: the answer {answer!r} is no pattern ({error})") from error
        return
    if CHECKERS[checker][0](answer) is None or (checker == "choice" and len(answer.strip()) != 1):
        raise ConfigError(
            f"{where}: the answer {answer!r} is not {wanted[checker]}, which the checker "
            f"{checker!r} compares with"
        )


# A number in a text: thousands may have commas, a point needs digits after it. A sign after a
# digit is the operator of a formula.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
# A letter that stands alone: "B", "(B)", "B.", "answer: B". "I" is a word.
_LETTER = re.compile(r"(?<![A-Za-z0-9'])[A-HJ-Z](?![A-Za-z0-9'])")


def _stripped(text: str) -> str | None:
    return text.strip() or None


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _same_number(found: str, wanted: str) -> bool:
    try:
        right = _NUMBER.findall(wanted)[-1]
        return Decimal(found.replace(",", "")) == Decimal(right.replace(",", ""))
    except (InvalidOperation, IndexError):
        return False


def _last_letter(text: str) -> str | None:
    """The last capital that stands alone; a text of one letter may be small."""
    if len(text.strip()) == 1 and text.strip().isalpha():
        return text.strip().upper()
    found = _LETTER.findall(text)
    return found[-1] if found else None


CHECKERS: Mapping[str, tuple[_Reader, _Comparer]] = {
    # The whole text after thinking, stripped.
    "exact": (_stripped, lambda found, wanted: found == wanted.strip()),
    # The last number in it, equal in value.
    "number": (_last_number, _same_number),
    # The last capital letter that stands alone.
    "choice": (_last_letter, lambda found, wanted: found == wanted.strip().upper()),
    # A pattern that the stripped text matches from beginning to end.
    "regex": (_stripped, lambda found, wanted: re.fullmatch(wanted, found, re.DOTALL) is not None),
}
