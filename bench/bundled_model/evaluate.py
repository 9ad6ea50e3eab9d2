"""Owns the held-out figures of a model: loss by domain, share of puzzles solved.

Does not know training; it takes any causal language model with its tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from bundled_model.data import DOMAINS, IGNORED, Corpus
from bundled_model.puzzles import Puzzle
from bundled_model.tokenizer import END, PAD, id_of


@torch.no_grad()
def held_out_losses(
    model: Any, corpus: Corpus, *, rows: int = 16, context: int = 256
) -> dict[str, float]:
    """Mean cross entropy in nats a token; of the solutions only in the reasoning domain."""
    found = {}
    for domain in DOMAINS:
        batch = corpus.held_out(domain, rows, context)
        total, count = 0.0, 0
        for ids, labels in zip(
            torch.from_numpy(batch.ids).split(8), torch.from_numpy(batch.labels).split(8),
            strict=True,
        ):  # fmt: skip
            logits = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            wanted = labels[:, 1:].flatten()
            total += float(cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
            count += int((wanted != IGNORED).sum())
        found[domain] = total / count
    return found


@torch.no_grad()
def solve(
    model: Any, tokenizer: Tokenizer, puzzles: Sequence[Puzzle], *, batch: int = 64
) -> list[str]:
    """What the model writes greedily after each prompt, up to the end token (100 at the most)."""
    end, pad = id_of(tokenizer, END), id_of(tokenizer, PAD)
    written: list[str] = []
    for first in range(0, len(puzzles), batch):
        prompts = [tokenizer.encode(p.prompt).ids for p in puzzles[first : first + batch]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=100, do_sample=False,
            eos_token_id=end, pad_token_id=pad,
        )  # fmt: skip
        for row in out[:, longest:].tolist():
            cut = row[: row.index(end)] if end in row else row
            written.append(tokenizer.decode(cut, skip_special_tokens=True))
    return written


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Right answers out of so many, with Wilson's 95 % interval, and the same by family."""

    right: int
    count: int
    families: dict[str, tuple[int, int]]

    @property
    def share(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.count)


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    half /= 1 + z * z / count
    return middle - half, middle + half


def grade(puzzles: Sequence[Puzzle], written: Sequence[str]) -> Accuracy:
    families: dict[str, tuple[int, int]] = {}
    for puzzle, text in zip(puzzles, written, strict=True):
        right, count = families.get(puzzle.family, (0, 0))
        families[puzzle.family] = (right + puzzle.check(text), count + 1)
    return Accuracy(
        right=sum(right for right, _ in families.values()), count=len(puzzles), families=families
    )
