"""The training run of a routing-path network: schedule, steps, held-out recall, best weights.

Seeded, and resumable from a state file. Knows sequences; knows no trace and no predictor.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moe_runtime.predictors.path_config import PathConfig
from moe_runtime.predictors.path_loss import path_loss, start_from_table
from moe_runtime.predictors.path_measure import first_rows, network_recall, table_recall
from moe_runtime.predictors.path_network import PathNetwork
from moe_runtime.predictors.path_recall import PathRecall, table_logits
from moe_runtime.predictors.path_sequences import (
    PathBatch,
    PathSequence,
    Vocabulary,
    epoch_packs,
    padded,
    token_counts,
)
from moe_runtime.predictors.path_state import load_state, save_state
from numpy.typing import NDArray
from torch import Tensor

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError

__all__ = ["TrainOptions", "TrainProgress", "Trained", "train_path"]

LIMITS = (
    "epochs",
    "steps",
    "minutes",
    "patience",
)  # an interrupted training may go on under others


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How the network is trained.

    Args:
        epochs: passes over the training sequences, at most.
        steps: batches at most; 0: any.
        minutes: time at most, over all starts; 0: any. With it, weights depend on the clock.
        peak_rate, last_rate: AdamW's learning rate after the warm-up and at the end.
        warm_up: share of the epochs, or of the minutes, over which the rate rises.
        weight_decay: of matrices; norms and the embedding are left alone.
        clip: longest gradient.
        batch_tokens, longest: see `epoch_packs`.
        forget: share of tokens that are shown as unknown ones.
        evaluate_every: steps from one measurement of held-out recall to the next.
        patience: measurements without a better recall at 2k after which training ends.
        measured_rows: held-out tokens measured each time, at most about.
        seed: of everything random.
    """

    epochs: int = 12
    steps: int = 0
    minutes: float = 0.0
    peak_rate: float = 2e-3
    last_rate: float = 2e-5
    warm_up: float = 0.04
    weight_decay: float = 0.01
    clip: float = 1.0
    batch_tokens: int = 1024
    longest: int = 256
    forget: float = 0.005
    evaluate_every: int = 250
    patience: int = 10
    measured_rows: int = 8000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "longest", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if self.minutes < 0 or self.peak_rate <= 0 or not 0 <= self.forget < 1:
            raise ConfigError(
                "minutes must be 0 or more, peak_rate above 0 and forget from 0 to below 1, found "
                f"{self.minutes}, {self.peak_rate}, {self.forget}"
            )

    def rate(self, progress: float) -> float:
        """Learning rate at this share of the training: a linear rise, then a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        rate = self.last_rate + (self.peak_rate - self.last_rate) * cosine
        return rate * min(1.0, (progress + 1e-3) / max(self.warm_up, 1e-3))


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Where training is: 0 to 1 of it, steps, passes, the last loss, the recalls at 2k so far."""

    share: float
    step: int
    epoch: int
    loss: float
    recall_2k: float
    best_2k: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trained network and what it does on the held-out rows that training stopped by.

    Args:
        network: with the weights of the best measurement.
        vocabulary: the tokens of its rows.
        popularity: float32 `[G]`, share of training tokens that went to each expert.
        recall, table: of the network, and of the token-id table of the same training rows.
        steps, epochs, seconds: of training, over all starts; seconds with measurements.
        stopped: why it ended: "epochs", "steps", "minutes" or "recall".
    """

    network: PathNetwork
    vocabulary: Vocabulary
    popularity: NDArray[np.float32]
    recall: PathRecall
    table: PathRecall
    steps: int
    epochs: int
    seconds: float
    stopped: str


def train_path(
    train: Sequence[PathSequence],
    held_out: Sequence[PathSequence],
    *,
    grid: ExpertGrid,
    top_k: tuple[int, ...],
    config: PathConfig,
    options: TrainOptions,
    state: Path | None = None,
    resume: bool = False,
    progress: Callable[[TrainProgress], None] = lambda _: None,
) -> Trained:
    """Train until the epochs or minutes are over, or held-out recall at 2k no longer rises.

    Args:
        state: where to keep what is needed to go on; nowhere if not given.
        resume: go on from `state`.
        progress: told after each measurement.

    Raises:
        ConfigError: `resume` without such a state, or one of other data, sizes or options.
    """
    run = _Run(train, held_out, grid=grid, top_k=top_k, config=config, options=options)
    if resume:
        run.load(state)
    while run.stopped is None:
        run.one_epoch(state, progress)
    return run.result()


class _Run:
    """One training: network, optimizer, how far it is, the best weights so far."""

    def __init__(
        self,
        train: Sequence[PathSequence],
        held_out: Sequence[PathSequence],
        *,
        grid: ExpertGrid,
        top_k: tuple[int, ...],
        config: PathConfig,
        options: TrainOptions,
    ) -> None:
        self.train, self.grid, self.top_k, self.options = train, grid, top_k, options
        self.held_out = held_out
        self.vocabulary = Vocabulary.of(train)
        counts, rows = token_counts(train, self.vocabulary, grid)
        self.table = table_logits(counts, rows, grid)
        self.popularity = (1 / (1 + np.exp(-self.table[-1]))).astype(np.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.network = PathNetwork(config, vocabulary=len(self.vocabulary), outputs=grid.size)
        if config.prior:
            start_from_table(self.network, self.table, rows)
        self.optimizer = _optimizer(self.network, options)
        self.facts: dict[str, Any] = {
            "data": _fingerprint(train, held_out),
            "config": config.as_dict(),
            "options": {**asdict(options), **dict.fromkeys(LIMITS)},
            "step": 0,
            "epoch": 0,
            "batch": 0,
            "elapsed": 0.0,
            "worse": 0,
            "best": -1.0,
        }
        self.best: dict[str, Tensor] = {}
        self.stopped: str | None = None
        self._began = time.monotonic()
        self._loss = float("nan")

    def elapsed(self) -> float:
        """Seconds of training over all starts."""
        return float(self.facts["elapsed"]) + time.monotonic() - self._began

    def one_epoch(self, state: Path | None, progress: Callable[[TrainProgress], None]) -> None:
        """One pass, or what is left of it. Mutates."""
        options, facts = self.options, self.facts
        packs = epoch_packs(
            self.train,
            encoder=self.network.config.encoder_layers > 0,
            tokens=options.batch_tokens,
            longest=options.longest,
            seed=options.seed,
            epoch=facts["epoch"],
        )
        if not packs:
            raise ConfigError(
                "no training sequence has two tokens, so none has a prompt and a continuation"
            )
        for pack in packs[facts["batch"] :]:
            share = (facts["epoch"] + facts["batch"] / len(packs)) / options.epochs
            if options.minutes:
                share = max(share, self.elapsed() / 60 / options.minutes)
            if options.steps:
                share = max(share, facts["step"] / options.steps)
            # Where a limit ends it between two measurements, the last weights count too.
            if facts["step"] % options.evaluate_every == 0 or share >= 1.0:
                self._measure(share, state if facts["step"] else None, progress)
            if share >= 1.0:
                self.stopped = self.stopped or self._limit()
            if self.stopped:
                return
            self._step(padded(pack, self.vocabulary), share)
            facts["batch"] += 1
            facts["step"] += 1
        facts["epoch"], facts["batch"] = facts["epoch"] + 1, 0
        if facts["epoch"] >= options.epochs:
            self._measure(1.0, state, progress)
            self.stopped = self.stopped or "epochs"

    def _limit(self) -> str:
        """Which limit was reached."""
        steps = self.options.steps
        return "steps" if steps and self.facts["step"] >= steps else "minutes"

    def _step(self, batch: PathBatch, share: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(share)
        rng = np.random.default_rng([self.options.seed, 1, self.facts["step"]])
        for ids in (batch.tokens, batch.prompt):
            ids[rng.random(ids.shape) < self.options.forget] = len(self.vocabulary)
        self.network.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed + 7919 * self.facts["step"])
            loss = path_loss(_logits(self.network, batch), batch.topk_ids, self.grid)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = loss.item()

    def _measure(
        self, share: float, state: Path | None, progress: Callable[[TrainProgress], None]
    ) -> None:
        facts = self.facts
        some = first_rows(self.held_out, self.options.measured_rows)
        found = network_recall(self.network, some, self.vocabulary, self.grid, self.top_k)
        if found.recall_2k > facts["best"]:
            facts["best"], facts["worse"] = found.recall_2k, 0
            self.best = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        else:
            facts["worse"] += 1
            if facts["worse"] >= self.options.patience:
                self.stopped = "recall"
        if state is not None:
            now = {**facts, "elapsed": self.elapsed()}
            save_state(state, self.network, self.optimizer, self.best, now)
        progress(
            TrainProgress(
                share=min(share, 1.0),
                step=facts["step"],
                epoch=facts["epoch"],
                loss=self._loss,
                recall_2k=found.recall_2k,
                best_2k=facts["best"],
            )
        )

    def load(self, state: Path | None) -> None:
        """Go on from a state file. Mutates."""
        if state is None or not state.exists():
            raise ConfigError(f"{state}: no training state to go on from; train without --resume")
        self.best, facts = load_state(state, self.network, self.optimizer)
        for what in ("data", "config", "options"):
            if facts.get(what) != self.facts[what]:
                raise ConfigError(
                    f"{state}: a training with other {what} ({facts.get(what)!r:.200} there, "
                    f"{self.facts[what]!r:.200} here); give the same traces and options, or train "
                    "without --resume"
                )
        self.facts = facts

    def result(self) -> Trained:
        """The best network, measured on all held-out rows."""
        if self.best:
            self.network.load_state_dict(self.best)
        self.network.eval()
        shared = (self.held_out, self.vocabulary, self.grid, self.top_k)
        assert self.stopped is not None
        return Trained(
            network=self.network,
            vocabulary=self.vocabulary,
            popularity=self.popularity,
            recall=network_recall(self.network, *shared),
            table=table_recall(self.table, *shared),
            steps=self.facts["step"],
            epochs=self.facts["epoch"],
            seconds=self.elapsed(),
            stopped=self.stopped,
        )


def _logits(network: PathNetwork, batch: PathBatch) -> Tensor:
    read = None
    if network.config.encoder_layers:
        read = network.encode(
            torch.from_numpy(batch.prompt), torch.from_numpy(batch.prompt_lengths)
        )
    logits: Tensor = network(torch.from_numpy(batch.tokens), read)
    return logits


def _optimizer(network: PathNetwork, options: TrainOptions) -> torch.optim.AdamW:
    named = list(network.named_parameters())
    kept = {"embedding.weight"} | {name for name, p in named if p.ndim < 2 or "bias" in name}
    groups = [
        {"params": [p for n, p in named if n not in kept], "weight_decay": options.weight_decay},
        {"params": [p for n, p in named if n in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.peak_rate, betas=(0.9, 0.98), fused=True)


def _fingerprint(*sets: Sequence[PathSequence]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for sequences in sets:
        digest.update(str(len(sequences)).encode())
        for one in sequences:
            digest.update(one.token_ids.tobytes())
            digest.update(one.topk_ids.tobytes())
    return digest.hexdigest()
