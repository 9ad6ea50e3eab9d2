"""Owns the reasoning domain: seeded arithmetic and list puzzles with written-out steps.

Does not know tokenizers or models. Every puzzle belongs to one of two splits by a hash of its
prompt, so training and held-out puzzles cannot meet, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Literal

THINK, END_THINK = "<think>", "</think>"
HELD_OUT_SHARE = 16  # one prompt in so many is held out

Split = Literal["train", "held_out"]
Drawn = tuple[str, str, str]  # question, steps, answer


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One puzzle: what a model is given, what it should write, and how to tell if it did."""

    family: str
    prompt: str
    steps: str
    answer: str

    @property
    def solution(self) -> str:
        """The text that should follow the prompt."""
        return f"{THINK}{self.steps}{END_THINK}{self.answer}"

    @property
    def split(self) -> Split:
        return split_of(self.prompt)

    def check(self, continuation: str) -> bool:
        """Whether text generated after the prompt ends in the right answer.

        The answer is what follows the last `</think>`; steps do not count. Cut the text at the
        end-of-sequence token before (decoding with `skip_special_tokens` keeps think tokens only
        if they are not special; see the tokenizer).
        """
        _, marker, answer = continuation.rpartition(END_THINK)
        return bool(marker) and answer.strip() == self.answer


def split_of(prompt: str) -> Split:
    digest = hashlib.sha256(prompt.encode()).digest()
    return "held_out" if digest[0] % HELD_OUT_SHARE == 0 else "train"


@dataclass(frozen=True, kw_only=True)
class Level:
    """How hard puzzles are. Upper ends of ranges of numbers; those marked * are left out."""

    wide: float  # share of numbers with three digits in sums; half as many in products
    start: int  # first number of a chain or story
    terms: int  # of a chain
    term: int
    gets: int
    gives: int
    factor: int  # the one-digit factor of a product
    multiplied: int  # * its other factor, if it has two digits
    largest: int  # * numbers to find the largest or smallest of
    listed: int  # * numbers to sort, or to add the even ones of
    counted: int  # * numbers to count
    bound: int  # what they are counted above
    most: int  # numbers in a list
    sorted: int  # numbers in a list to sort


HARD = Level(
    wide=0.2, start=60, terms=4, term=20, gets=30, gives=90, factor=9, multiplied=100,
    largest=100, listed=30, counted=50, bound=40, most=6, sorted=5,
)  # fmt: skip
STANDARD = Level(
    wide=0.0, start=20, terms=3, term=9, gets=9, gives=9, factor=5, multiplied=50,
    largest=60, listed=20, counted=30, bound=20, most=4, sorted=4,
)  # fmt: skip


def _number(rng: random.Random, wide: float, below: int = 100) -> int:
    """Two digits, or three with the probability `wide`."""
    return rng.randint(100, 999) if rng.random() < wide else rng.randrange(10, below)


def _few(rng: random.Random, low: int, high: int, most: int) -> list[int]:
    """Three to `most` different numbers."""
    return rng.sample(range(low, high), rng.randint(3, most))


def _joined(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _sum(rng: random.Random, level: Level) -> Drawn:
    a, b = _number(rng, level.wide), _number(rng, level.wide)
    steps, carry, left, right = [], 0, a, b
    while left or right or carry:
        total = left % 10 + right % 10 + carry
        carried = f"+{carry}" if carry else ""
        steps.append(f"{left % 10}+{right % 10}{carried}={total}")
        left, right, carry = left // 10, right // 10, total // 10
    return f"What is {a}+{b}?", ",".join(steps), str(a + b)


def _chain(rng: random.Random, level: Level) -> Drawn:
    value = rng.randint(5, level.start)
    shown, steps = str(value), []
    for _ in range(rng.randint(2, level.terms)):
        term = rng.randint(2, level.term)
        sign = "-" if rng.random() < 0.5 and value >= term else "+"
        after = value - term if sign == "-" else value + term
        shown += f"{sign}{term}"
        steps.append(f"{value}{sign}{term}={after}")
        value = after
    return f"What is {shown}?", ",".join(steps), str(value)


def _story(rng: random.Random, level: Level) -> Drawn:
    name = rng.choice(("Ann", "Ben", "Cora", "Dan", "Eva", "Finn"))
    thing = rng.choice(("apples", "books", "coins", "pens", "shells", "stamps"))
    has, gets = rng.randint(5, level.start), rng.randint(2, level.gets)
    gives = rng.randint(2, min(level.gives, has + gets - 1))
    verb = rng.choice(("buys", "finds", "gets"))
    question = f"{name} has {has} {thing}, {verb} {gets} and gives away {gives}. How many are left?"
    left = has + gets - gives
    return question, f"{has}+{gets}={has + gets},{has + gets}-{gives}={left}", str(left)


def _product(rng: random.Random, level: Level) -> Drawn:
    a, b = rng.randint(2, level.factor), _number(rng, level.wide / 2, level.multiplied)
    parts = [a * int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))][::-1]
    tens = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))][::-1]
    steps = [f"{a}*{ten}={part}" for ten, part in zip(tens, parts, strict=True)]
    running = list(accumulate(parts))
    steps += [f"{x}+{y}={z}" for x, y, z in zip(running, parts[1:], running[1:], strict=False)]
    return f"What is {a}*{b}?", ",".join(steps), str(a * b)


def _largest(rng: random.Random, level: Level) -> Drawn:
    numbers = _few(rng, 10, level.largest, level.most)
    word, best = rng.choice((("largest", max), ("smallest", min)))
    steps = accumulate(numbers, best)
    return f"Which is the {word} of {_joined(numbers)}?", _joined(list(steps)), str(best(numbers))


def _sort(rng: random.Random, level: Level) -> Drawn:
    numbers = _few(rng, 1, level.listed, level.sorted)
    left, steps = list(numbers), []
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        steps.append(f"{least}|{_joined(left)}")
    return f"Sort {_joined(numbers)}.", ";".join(steps), _joined(sorted(numbers))


def _count(rng: random.Random, level: Level) -> Drawn:
    numbers, bound = _few(rng, 1, level.counted, level.most), rng.randint(10, level.bound)
    found = [n for n in numbers if n > bound]
    return (
        f"How many of {_joined(numbers)} are above {bound}?",
        _joined(found) or "none",
        str(len(found)),
    )


def _evens(rng: random.Random, level: Level) -> Drawn:
    numbers = _few(rng, 1, level.listed, level.most)
    even = [n for n in numbers if n % 2 == 0]
    running = list(accumulate(even))
    sums = [f"{x}+{y}={z}" for x, y, z in zip(running, even[1:], running[1:], strict=False)]
    steps = ";".join([_joined(even) or "none", *sums])
    return f"Add the even numbers of {_joined(numbers)}.", steps, str(sum(even))


FAMILIES: dict[str, Callable[[random.Random, Level], Drawn]] = {
    "sum": _sum,
    "chain": _chain,
    "story": _story,
    "product": _product,
    "largest": _largest,
    "sort": _sort,
    "count": _count,
    "evens": _evens,
}


def draw(rng: random.Random, level: Level = STANDARD) -> Puzzle:
    """One puzzle of any split and of a family drawn evenly."""
    family = rng.choice(list(FAMILIES))
    question, steps, answer = FAMILIES[family](rng, level)
    prompt = f"Question: {question}\nAnswer:"
    return Puzzle(family=family, prompt=prompt, steps=steps, answer=answer)


def stream(split: Split, seed: int, level: Level = STANDARD) -> Iterator[Puzzle]:
    """Puzzles of one split without end; the same for the same seed. Prompts may come again."""
    rng = random.Random(f"{split} {seed}")
    while True:
        puzzle = draw(rng, level)
        if puzzle.split == split:
            yield puzzle


def held_out(count: int, seed: int = 0, level: Level = STANDARD) -> list[Puzzle]:
    """`count` held-out puzzles with different prompts."""
    seen: dict[str, Puzzle] = {}
    for puzzle in stream("held_out", seed, level):
        seen.setdefault(puzzle.prompt, puzzle)
        if len(seen) == count:
            break
    return list(islice(seen.values(), count))
