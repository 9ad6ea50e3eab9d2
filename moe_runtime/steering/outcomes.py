"""What came of one sample: whether it is right, the form of its answer, how long it thought.

Knows texts and token ids; not how samples are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.steering.tasks import AnswerForm, Task, judge

__all__ = ["Markers", "Outcome", "outcome_of", "thinking_tokens"]

_SHOWN = 200  # characters of an answer that are kept


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Texts that begin and end thinking; both "" for a model that does not think."""

    start: str
    end: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One sample, judged.

    Args:
        problem, sample: which.
        right, form: see `Verdict`.
        thinking: tokens between the markers. Thinking that does not end counts to the sample's end.
        tokens: new tokens, the end token included.
        answer: what was read as the answer, its first 200 characters.
    """

    problem: str
    sample: int
    right: bool
    form: AnswerForm
    thinking: int
    tokens: int
    answer: str


def outcome_of(
    task: Task,
    sample: int,
    tokens: Sequence[int],
    *,
    ended: bool,
    tokenizer: Any,
    markers: Markers,
    prompt: str,
) -> Outcome:
    """Judge a sample.

    Args:
        tokens: new ones, without the end token.
        ended: an end token came.
        prompt: the text that the model was given; thinking that it opened goes on in the sample.
    """
    text = tokenizer.decode(list(tokens))
    verdict = judge(task, _plain(text, tokenizer, markers), end_marker=markers.end, ended=ended)
    return Outcome(
        problem=task.id,
        sample=sample,
        right=verdict.right,
        form=verdict.form,
        thinking=thinking_tokens(tokens, text, tokenizer=tokenizer, markers=markers, prompt=prompt),
        tokens=len(tokens) + ended,
        answer=verdict.answer[:_SHOWN],
    )


def _plain(text: str, tokenizer: Any, markers: Markers) -> str:
    """Without special tokens' texts, except the markers, which some tokenizers make special."""
    for special in tokenizer.all_special_tokens:
        if special not in {markers.start, markers.end}:
            text = text.replace(special, "")
    return text


def thinking_tokens(
    tokens: Sequence[int], text: str, *, tokenizer: Any, markers: Markers, prompt: str
) -> int:
    """Tokens after the first start marker up to the last end marker or the text's end.

    A prompt that opens thinking (templates of some models do) puts the start before the first
    token. Without any start there is no thinking, unless an end marker comes, which has a start.
    """
    if not markers.end:
        return 0
    opened = bool(markers.start) and prompt.rfind(markers.start) > prompt.rfind(markers.end)
    ends = text.count(markers.end)
    begin = 0
    if not opened and markers.start and markers.start in text:
        begin = _length_until(tokens, lambda head: markers.start in head, tokenizer)
    elif not opened and not ends:
        return 0
    if not ends:
        return len(tokens) - begin
    end = _length_until(tokens, lambda head: head.count(markers.end) >= ends, tokenizer)
    marker = len(tokenizer.encode(markers.end, add_special_tokens=False))
    return max(0, end - marker - begin)


def _length_until(tokens: Sequence[int], reached: Callable[[str], bool], tokenizer: Any) -> int:
    """The least number of first tokens whose text has what is looked for; the whole text has it."""
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if reached(tokenizer.decode(list(tokens[:middle]))):
            high = middle
        else:
            low = middle + 1
    return low
