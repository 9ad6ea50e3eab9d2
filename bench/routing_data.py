"""Owns the recordings that routing-path predictors are trained and measured on.

Texts that are read (teacher forced) and texts that the model goes on with, by domain. Held out are
documents, not rows: what `corpora.corpora` gives, the addresses and modules that the bundled
model never saw, and prompts from them. Does not know predictors.

    python bench/routing_data.py --english FOLDER_OF_TXT --out bench/work/routing/bundled
"""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer

import moe_runtime
from bundled_model.data import read_english, read_python
from bundled_model.puzzles import STANDARD, stream
from bundled_model.tokenizer import BEGIN, END, PAD, id_of
from corpora import corpora
from moe_runtime.trace import RoutingTrace

DOMAINS = ("english", "python", "puzzles")
SAY = Console(stderr=True, highlight=False)
Rows = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is recorded; `continued` are new tokens, half of the rows greedily, half drawn."""

    window: int = 320
    windows: int = 2000  # of each text domain
    puzzles: int = 15_000
    prompts: int = 384  # of each domain
    prompt: int = 48
    continued: int = 96
    held_out: int = 60  # documents of each held-out set


class Texts:
    """Token rows of each domain and split; each begins with the begin token."""

    def __init__(self, tokenizer: Tokenizer, english: Path, seed: int) -> None:
        """Reads all texts and cuts none of them yet."""
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)
        self.begin, self.end = id_of(tokenizer, BEGIN), id_of(tokenizer, END)
        # `corpora.corpora` is held out everywhere, so none of it may be trained on.
        library = Path(sysconfig.get_paths()["stdlib"])
        reserved = {path.read_text(encoding="utf-8").strip() + "\n"
                    for path in sorted(library.glob("*.py"))[:60]}  # fmt: skip
        topics = [text for _, text in sorted(pydoc_data.topics.topics.items())][60:]
        addresses, modules = read_english(english), read_python()
        self.documents = {
            "english train": addresses["train"] + topics,
            "python train": [text for text in modules["train"] if text not in reserved],
            "english held_out": addresses["held_out"],
            "python held_out": [text for text in modules["held_out"] if text not in reserved],
        }
        self._ids: dict[str, list[list[int]]] = {}

    def _encoded(self, name: str) -> list[list[int]]:
        if name not in self._ids:
            self._ids[name] = [
                self._tokenizer.encode(text, add_special_tokens=False).ids
                for text in self.documents[name]
            ]
        return self._ids[name]

    def windows(self, name: str, count: int, length: int) -> Rows:
        """Windows at random places, documents chosen by their length."""
        documents = [ids for ids in self._encoded(name) if len(ids) >= length]
        share = np.array([len(ids) for ids in documents], float)
        rows = []
        for at in self._rng.choice(len(documents), count, p=share / share.sum()).tolist():
            start = int(self._rng.integers(len(documents[at]) - length + 2))
            rows.append([self.begin, *documents[at][start : start + length - 1]])
        return rows

    def puzzles(self, split: Any, count: int, seed: int, *, solved: bool) -> Rows:
        """Puzzles with their solutions, or the prompts alone."""
        rows = []
        for one in islice(stream(split, seed, STANDARD), count):
            text = one.prompt + (one.solution if solved else "")
            rows.append(self._tokenizer.encode(text).ids + ([self.end] if solved else []))
        return rows

    def texts(self, texts: Sequence[str], length: int) -> Rows:
        """The beginnings of texts, as the tokenizer encodes them."""
        return [self._tokenizer.encode(text[:4000]).ids[:length] for text in texts]


def batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Rows of about one length together."""
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def padded(rows: Rows, pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, padded on the left."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
    }


@torch.no_grad()
def record(model: Any, read: Rows, prompts: Rows, pad: int, continued: int) -> RoutingTrace:
    """A trace of rows that are read and of prompts that the model goes on with."""
    stops = model.generation_config.eos_token_id
    with moe_runtime.record(model, stop_tokens=[stops]) as recorder:
        for batch in batches(read, 16):
            model(**padded(batch, pad), use_cache=True)
        for number, batch in enumerate(batches(prompts, 64)):
            drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0} if number % 2 else {}
            model.generate(
                **padded(batch, pad), max_new_tokens=continued, pad_token_id=pad,
                **({"do_sample": False} | drawn),
            )  # fmt: skip
    return recorder.trace


def foreign_texts(count: int) -> dict[str, list[str]]:
    """Kinds of text that nothing was trained on: C headers, and descriptions of packages."""
    headers = sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h"))
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/METADATA"))
    return {
        name: [path.read_text(encoding="utf-8", errors="replace") for path in paths[:count]]
        for name, paths in (("c", headers), ("packages", packages))
    }


def plan(texts: Texts, amounts: Amounts, seed: int) -> dict[str, tuple[Rows, Rows]]:
    """Rows to read and prompts to go on with, for each file."""
    made: dict[str, tuple[Rows, Rows]] = {}
    for domain in ("english", "python"):
        made[f"{domain}.train"] = (
            texts.windows(f"{domain} train", amounts.windows, amounts.window),
            texts.windows(f"{domain} train", amounts.prompts, amounts.prompt),
        )
    made["puzzles.train"] = (
        texts.puzzles("train", amounts.puzzles, seed + 1, solved=True),
        texts.puzzles("train", amounts.prompts, seed + 2, solved=False),
    )
    count = amounts.held_out
    for domain, held in corpora().items():
        made[f"{domain}.corpora"] = (texts.texts(held, 400), [])
    for domain in ("english", "python"):
        name = f"{domain} held_out"
        made[f"{domain}.held_out"] = (texts.windows(name, count, 400), [])
        made[f"{domain}.continued"] = ([], texts.windows(name, count, amounts.prompt))
    for kind, written in foreign_texts(count).items():
        made[f"{kind}.foreign"] = (texts.texts(written, 400), [])
    made["puzzles.continued"] = ([], texts.puzzles("held_out", 4 * count, 7, solved=False))
    return made


def main(
    english: Annotated[Path, typer.Option(help="Folder of the addresses' .txt.")],
    out: Annotated[Path, typer.Option(help="Folder of the traces.")],
    share: Annotated[float, typer.Option(help="Of the usual amounts of training text.")] = 1.0,
    model: Annotated[str, typer.Option(help="A checkpoint; the bundled one if none.")] = "",
    seed: Annotated[int, typer.Option()] = 5,
) -> None:
    """Records all traces; those that are there already are left alone."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = model or moe_runtime.bundled_model()
    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    runtime = moe_runtime.from_pretrained(path, expert_budget="100%", device="cpu")
    whole = Amounts()
    amounts = replace(
        whole,
        windows=round(share * whole.windows),
        puzzles=round(share * whole.puzzles),
        prompts=round(share * whole.prompts),
    )
    torch.manual_seed(seed)
    for name, (read, prompts) in plan(Texts(tokenizer, english, seed), amounts, seed).items():
        target = out / f"{name}.trace.safetensors"
        if target.exists():
            continue
        trace = record(runtime, read, prompts, id_of(tokenizer, PAD), amounts.continued)
        trace.save(target)
        SAY.print(f"{name}: {len(trace):,} rows, {len(trace.decode()):,} decoded")


if __name__ == "__main__":
    typer.run(main)
