"""Owns the training and held-out tokens of the three domains, and the batch of each step.

A batch is a pure function of (seed, step): a resumed run reads what an uninterrupted one reads.
Does not know the model.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bundled_model.puzzles import HARD, STANDARD, Puzzle, Split, stream
from bundled_model.tokenizer import BEGIN, END, id_of

Ids: TypeAlias = NDArray[np.int64]
Tokens: TypeAlias = NDArray[np.uint16]

DOMAINS = ("english", "python", "reasoning")
IGNORED = -100  # label of a token that is not learned
HELD_OUT_SHARE = 16  # one document in so many is held out
LARGEST_SOURCE = 400_000  # bytes; longer modules of the standard library are tables
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}

Documents: TypeAlias = dict[Split, list[str]]


def _split(name: str) -> Split:
    digest = hashlib.sha256(name.encode()).digest()
    return "held_out" if digest[0] % HELD_OUT_SHARE == 0 else "train"


def read_english(folder: Path) -> Documents:
    """State of the Union addresses, one .txt a speech."""
    documents: Documents = {"train": [], "held_out": []}
    for path in sorted(folder.glob("*.txt")):
        documents[_split(path.name)].append(path.read_text(encoding="utf-8").strip())
    if not documents["train"]:
        raise FileNotFoundError(f"{folder}: no .txt file; name the folder of the addresses")
    return documents


def read_python() -> Documents:
    """Modules of the running interpreter's standard library, without its tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: Documents = {"train": [], "held_out": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts) and 200 < path.stat().st_size < LARGEST_SOURCE:
            text = path.read_text(encoding="utf-8", errors="replace")
            documents[_split(name.as_posix())].append(text.strip() + "\n")
    return documents


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids int64 `[rows, context]`, labels likewise (`IGNORED` where nothing is learned)."""

    ids: Ids
    labels: Ids


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What each batch is made of: the domain of every row, and the rows' length.

    Before step `hard_until` the puzzles are of the hard level. (The bundled model began so; they
    turned out too hard to learn in the time there was, and it went on with the standard level.)
    """

    rows: tuple[str, ...] = ("reasoning", "english", "reasoning", "python")
    context: int = 256
    hard_until: int = 1250


class Corpus:
    """Tokens of the text domains by (domain, split), and puzzles made as they are needed."""

    def __init__(self, tokenizer: Tokenizer, tokens: dict[str, Tokens]) -> None:
        """Takes the tokens of "english train", "english held_out", "python train", ..."""
        self.tokens = tokens
        self._tokenizer = tokenizer
        self._begin = id_of(tokenizer, BEGIN)
        self._end = id_of(tokenizer, END)

    @classmethod
    def from_texts(cls, tokenizer: Tokenizer, texts: dict[str, Documents]) -> Corpus:
        """All documents one after another, each between the begin and the end token."""
        end = np.array([id_of(tokenizer, END)], np.uint16)
        tokens: dict[str, Tokens] = {}
        for domain, documents in texts.items():
            for split, some in documents.items():
                pieces: list[Tokens] = [np.zeros(0, np.uint16)]
                for text in some:  # one by one: a whole domain at once holds gigabytes of offsets
                    pieces += [np.array(tokenizer.encode(text).ids, np.uint16), end]
                tokens[f"{domain} {split}"] = np.concatenate(pieces)
        return cls(tokenizer, tokens)

    def fingerprint(self) -> str:
        """Changes with any token of the texts (another Python has another standard library)."""
        digest = hashlib.sha256()
        for key in sorted(self.tokens):
            digest.update(self.tokens[key].tobytes())
        return digest.hexdigest()[:16]

    def puzzle_ids(self, puzzle: Puzzle) -> tuple[list[int], list[int]]:
        """Ids and labels of one puzzle; its prompt is read and not learned."""
        prompt = self._tokenizer.encode(puzzle.prompt).ids
        solution = self._tokenizer.encode(puzzle.solution, add_special_tokens=False).ids
        solution.append(self._end)
        return prompt + solution, [IGNORED] * len(prompt) + solution

    def _puzzle_row(self, puzzles: Iterator[Puzzle], context: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < context:
            more_ids, more_labels = self.puzzle_ids(next(puzzles))
            ids += more_ids
            labels += more_labels
        return ids[:context], labels[:context]

    def _text_row(self, tokens: Tokens, start: int, context: int) -> list[int]:
        """A window of the text behind a begin token, which every row starts with."""
        return [self._begin, *tokens[start : start + context - 1].tolist()]

    def batch(self, mixture: Mixture, seed: int, step: int) -> Batch:
        """The batch of one step of training."""
        rng = np.random.default_rng([seed, step])
        level = HARD if step < mixture.hard_until else STANDARD
        ids, labels = [], []
        for domain in mixture.rows:
            if domain == "reasoning":
                puzzles = stream("train", int(rng.integers(1 << 60)), level)
                row = self._puzzle_row(puzzles, mixture.context)
            else:
                tokens = self.tokens[f"{domain} train"]
                start = int(rng.integers(max(1, len(tokens) - mixture.context)))
                text = self._text_row(tokens, start, mixture.context)
                row = (text, text)
            ids.append(row[0])
            labels.append(row[1])
        return Batch(ids=np.array(ids), labels=np.array(labels))

    def held_out(self, domain: str, rows: int, context: int) -> Batch:
        """Held-out rows of one domain, evenly spread over its text; always the same."""
        if domain == "reasoning":
            puzzles = stream("held_out", 0)
            made = [self._puzzle_row(puzzles, context) for _ in range(rows)]
            return Batch(ids=np.array([m[0] for m in made]), labels=np.array([m[1] for m in made]))
        tokens = self.tokens[f"{domain} held_out"]
        starts = np.linspace(0, len(tokens) - context, rows).astype(int)
        ids = np.array([self._text_row(tokens, start, context) for start in starts.tolist()])
        return Batch(ids=ids, labels=ids)


def tokenizer_texts(texts: dict[str, Documents], puzzles: int = 10_000) -> Iterator[str]:
    """What the tokenizer is trained on: the training texts and some training puzzles."""
    for documents in texts.values():
        yield from documents["train"]
    for puzzle in islice(stream("train", 1, HARD), puzzles):
        yield puzzle.prompt
        yield puzzle.solution
