"""From routing traces to a routing-path predictor: split, training, correction, figures.

Knows traces and predictors; knows no command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from moe_runtime.predictors.origin import Origin, require_held_out
from moe_runtime.predictors.path_config import PathConfig
from moe_runtime.predictors.path_correction import corrected, fit_correction
from moe_runtime.predictors.path_measure import first_rows, sequence_logits
from moe_runtime.predictors.path_recall import PathRecall, RecallSum
from moe_runtime.predictors.path_sequences import PathSequence, Vocabulary, sequences_of
from moe_runtime.predictors.path_training import Trained, TrainOptions, TrainProgress, train_path
from moe_runtime.predictors.routing_path import RoutingPathPredictor
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError, PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["TrainedPredictor", "split_traces", "train_predictor"]

CORRECTED_ROWS = 40_000  # rows that the correction is fitted to
LARGEST_CORRECTION = 4096  # experts of all layers; its square is stored


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedPredictor:
    """A predictor, how its network was trained, and recall once earlier layers are known.

    Args:
        observed: held-out recall of each layer after all before it were observed; None if the
            predictor has no correction.
    """

    predictor: RoutingPathPredictor
    trained: Trained
    observed: PathRecall | None


def split_traces(
    traces: Sequence[RoutingTrace], share: float, seed: int = 0
) -> tuple[list[RoutingTrace], list[RoutingTrace]]:
    """Whole sequences to train on and to hold out, drawn by the seed over all traces.

    Sequences that are drawn for holding out and mostly repeat training rows (a prompt that was run
    twice) are left out of both.

    Args:
        share: of the sequences to hold out; one at least is.

    Raises:
        ConfigError: a share outside 0 to 1, a single sequence, or none held out that is new.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the held-out share must be between 0 and 1, found {share}")
    named = [
        (number, sequence)
        for number, trace in enumerate(traces)
        for sequence in np.unique(trace.sequence_ids).tolist()
    ]
    count = max(1, round(share * len(named)))
    if count >= len(named):
        raise ConfigError(
            f"{len(named)} sequences cannot be split into training and held-out ones; give more "
            "traces, or name held-out traces"
        )
    drawn = np.random.default_rng(seed).permutation(len(named))[:count].tolist()
    held = {named[at] for at in drawn}
    parts: tuple[list[RoutingTrace], list[RoutingTrace]] = ([], [])
    for number, trace in enumerate(traces):
        mine = [sequence for n, sequence in held if n == number]
        inside = np.isin(trace.sequence_ids, mine)
        for part, rows in zip(parts, (~inside, inside), strict=True):
            if rows.any():
                part.append(trace.select(rows=rows))
    train, repeated = parts
    new = [part for part in (_without_seen(Origin.of(train), one) for one in repeated) if len(part)]
    if not new:
        raise ConfigError(
            "every sequence drawn for holding out is among the training ones; give more traces, or "
            "name held-out traces"
        )
    return train, new


def _without_seen(origin: Origin, trace: RoutingTrace) -> RoutingTrace:
    """The sequences of a trace that are held out from what this was fitted to."""
    kept = []
    for sequence in np.unique(trace.sequence_ids).tolist():
        try:
            require_held_out(origin, trace.select(sequences=[sequence]))
        except PredictorError:
            continue
        kept.append(sequence)
    return trace.select(sequences=kept)


def train_predictor(
    traces: Sequence[RoutingTrace],
    held_out: Sequence[RoutingTrace],
    *,
    config: PathConfig,
    options: TrainOptions,
    state: Path | None = None,
    resume: bool = False,
    progress: Callable[[TrainProgress], None] = lambda _: None,
) -> TrainedPredictor:
    """Train a routing-path predictor on traces with token ids.

    Args:
        traces: to train on. Rows of prefill are prompts, rows of decoding what was generated; a
            sequence that was only read is cut into the two.
        held_out: other sequences of the same model; training stops by them, and they alone are
            measured.
        config: sizes of the network.
        state, resume, progress: see `train_path`.

    Raises:
        TraceError: no traces, traces of different models, or rows without token ids.
        PredictorError: held-out sequences that are among the training ones.
        ConfigError: see `train_path`.
    """
    train, held = sequences_of(traces), sequences_of(held_out)
    origin = Origin.of(traces)
    for number, trace in enumerate(held_out):
        trace.require_like(traces[0], f"held-out trace {number}")
        require_held_out(origin, trace, f"held-out trace {number}")
    grid, top_k = origin.grid, origin.top_k
    trained = train_path(
        train, held, grid=grid, top_k=top_k, config=config, options=options,
        state=state, resume=resume, progress=progress,
    )  # fmt: skip
    correction, observed = None, None
    if len(grid.layers) > 1 and grid.size <= LARGEST_CORRECTION:
        correction, observed = _correction(trained, train, held, grid, top_k, options.seed)
    predictor = RoutingPathPredictor(
        origin=replace(origin, figures=figures(trained, observed)),
        network=trained.network,
        vocabulary=trained.vocabulary,
        popularity=trained.popularity,
        correction=correction,
    )
    return TrainedPredictor(predictor=predictor, trained=trained, observed=observed)


def figures(trained: Trained, observed: PathRecall | None) -> dict[str, Any]:
    """Held-out recall and precision, rounded, as they are kept in the file and printed."""
    found: dict[str, Any] = {
        "held_out_rows": trained.recall.rows,
        "routing_path": shares(trained.recall),
        "token_table": shares(trained.table),
    }
    if observed is not None:
        found["earlier_layers_known"] = shares(observed)
    return found


def shares(recall: PathRecall) -> dict[str, Any]:
    """Recall and precision at k and 2k to four places."""
    names = ("recall_k", "recall_2k", "precision_k", "precision_2k")
    rounded: dict[str, Any] = {name: round(getattr(recall, name), 4) for name in names}
    return {**rounded, "recall_2k_by_layer": [round(one, 4) for one in recall.by_layer]}


def _correction(
    trained: Trained,
    train: Sequence[PathSequence],
    held: Sequence[PathSequence],
    grid: ExpertGrid,
    top_k: tuple[int, ...],
    seed: int,
) -> tuple[NDArray[np.float32], PathRecall]:
    order = np.random.default_rng([seed, 2]).permutation(len(train)).tolist()
    some = first_rows([train[at] for at in order], CORRECTED_ROWS)
    correction = fit_correction(*_rows(trained, some), grid, seed=seed)
    logits, topk_ids = _rows(trained, held)
    total = RecallSum(grid, top_k)
    total.add(corrected(logits, topk_ids, correction, grid), topk_ids)
    return correction, total.result()


def _rows(
    trained: Trained, sequences: Sequence[PathSequence]
) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """Logits `[N, G]` and routing `[N, L, K]` of what follows the sequences' cuts."""
    used = [one for one in sequences if 0 < one.cut() < len(one)]
    vocabulary: Vocabulary = trained.vocabulary
    return (
        np.concatenate([sequence_logits(trained.network, vocabulary, one) for one in used]),
        np.concatenate([one.topk_ids[one.cut() :] for one in used]),
    )
