"""From recordings to ranked experts: which experts a model chooses when it starts to think (RICE).

Knows traces, markers and nPMI; does not know how experts are reinforced, nor files of steering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import FloatArray
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.steering.identification import (
    Identification,
    LayerMap,
    TokenClass,
)
from moe_runtime.steering.markers import Marker, marker_of
from moe_runtime.steering.npmi import Tally
from moe_runtime.steering.ranking import Scored, ranked_experts, score
from moe_runtime.steering.recordings import Counted, counted_rows, open_recordings
from moe_runtime.trace import PathLike, RoutingTrace
from moe_runtime.trace_reader import TraceReader

__all__ = ["LEVEL", "LISTED", "PAPER_TOKENS", "Progress", "identify"]

# RICE prefers starting a thought over ending it or switching to another.
PAPER_TOKENS: Mapping[str, float] = MappingProxyType(
    {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}
)
LEVEL = 0.95  # of intervals
LISTED = 20  # experts in `ranked` at least, chosen or not
_MAP_DECIMALS = 6
_BLOCK_ROWS, _LEAST_ROWS = 8192, 256
_BLOCK_BYTES = 64 << 20  # of counts by sequence, as many sequences as a block can have

Source: TypeAlias = RoutingTrace | PathLike
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What `identify` was asked for; see there."""

    top: int
    prompt: bool
    least_joint: int
    least_uses: int
    bootstrap: int
    smoothing: float
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("least_joint", 1), ("least_uses", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} has to be {least} or more, found {getattr(self, name)}")
        for name in ("bootstrap", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, found {getattr(self, name)}")
        if not 0 <= self.smoothing < math.inf:
            raise ConfigError(f"smoothing is a number of at least 0, found {self.smoothing}")


def identify(
    trace: Source | Sequence[Source],
    tokens: Mapping[str, float] | Mapping[Marker, float] = PAPER_TOKENS,
    top: int = 2,
    *,
    tokenizer: Any = None,
    prompt: bool = True,
    least_joint: int = 5,
    least_uses: int = 20,
    bootstrap: int = 200,
    smoothing: float = 0.0,
    seed: int = 0,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Identification:
    """Rank all experts of all layers by how their choice goes with marker tokens.

    An expert's score is the sum over the markers of coefficient x nPMI(marker, expert), from
    frequencies over rows (RICE, arXiv 2505.14681, section 3; the statistics are spelled out in
    `npmi.py`). The paper's ranking has no safeguard for small counts: markers come about once in a
    response, and an expert that never met any marker scores -(sum of coefficients), +1 with the
    paper's three. So experts need some events to be ranked, and the bootstrap, over sequences
    since rows of one sequence are no independent events, tells how far the ranking is to be
    trusted. Two things it cannot tell. Intervals are of each expert by itself: the best of many
    owes part of its score to chance. And a pair that never came together has nPMI -1 in every
    replicate too, where one event more could make it anything: `smoothing` takes this cliff away.

    Ties: experts whose scores agree to 12 decimals stand in the order of their joint counts,
    highest first, then of layers, then of numbers; `tied` and `tied_out` say how many.

    Args:
        trace: a trace, a file or folder of one, or several of one model, which add up. Files are
            read block by block and need not fit in memory.
        tokens: markers and their coefficients. A text counts as the tokenizer encodes it at the
            start of a text, after a space and after a new line; a marker of several tokens is
            attributed to its last.
        top: how many experts are chosen.
        tokenizer: of the model; needed unless all markers are `Marker`s.
        prompt: count the rows of the prompt too. The default, because templates (Qwen3's, R1's)
            put `<think>` in the prompt, and because a probe set whose responses went through the
            model in one forward pass has prompt rows only.
        least_joint: rows in which an expert was chosen for markers of positive coefficient
            (together; of any, if none is positive) that it needs to be ranked.
        least_uses: rows of any kind that it needs.
        bootstrap: replicates; 0: none. Fewer than two sequences: none either.
        smoothing: marker rows added at the experts' overall shares, see `npmi`; 0 is the paper's.
        seed: of the bootstrap's draws.
        fingerprint: of the model that is meant; "" if that does not matter.
        progress: is told the rows counted so far and of all.

    Raises:
        ConfigError: an option out of range, markers without a tokenizer or not in its vocabulary.
        TraceError: a damaged trace, one of another model or tokenizer or without token ids, a
            marker that never occurs in the rows that count, or too few events to choose `top`
            experts.
    """
    options = _Options(
        top=top,
        prompt=prompt,
        least_joint=least_joint,
        least_uses=least_uses,
        bootstrap=bootstrap,
        smoothing=smoothing,
        seed=seed,
    )
    markers, weights = _markers(tokens, tokenizer)
    readers = open_recordings(trace, fingerprint=fingerprint, tokenizer=tokenizer)
    counted = counted_rows(readers, markers, prompt=prompt, tokenizer=tokenizer)
    draws, redrawn = _draws(counted, options)
    tally = Tally(readers[0].grid, len(markers), draws, smoothing=smoothing)
    _count(readers, counted, tally, progress)
    classes = _classes(markers, weights, counted)
    return _identification(readers, classes, counted, tally, options, redrawn)


def _markers(
    tokens: Mapping[str, float] | Mapping[Marker, float], tokenizer: Any
) -> tuple[list[Marker], FloatArray]:
    """The markers and their coefficients, float64 `[M]`."""
    if not tokens:
        raise ConfigError("no markers: give one at least, for example {'<think>': 1.0}")
    found = []
    for token, weight in tokens.items():
        if not np.isfinite(weight) or weight == 0:
            text = token.text if isinstance(token, Marker) else token
            raise ConfigError(
                f"the coefficient of marker {text!r} has to be a finite number other than 0, "
                f"found {weight!r}"
            )
        if isinstance(token, Marker):
            found.append(token)
        elif tokenizer is None:
            raise ConfigError(f"marker {token!r} is a text; give the model's tokenizer= with it")
        else:
            found.append(marker_of(tokenizer, token))
    return found, np.array([float(weight) for weight in tokens.values()])


def _draws(counted: Counted, options: _Options) -> tuple[NDArray[np.uint16] | None, int]:
    """`[B, S]`: how often each replicate has each sequence, and how many were thrown away.

    A replicate without some marker says nothing about it, so it is drawn again.
    """
    sequences = counted.sequences
    if not options.bootstrap or sequences < 2:
        return None, 0
    random = np.random.default_rng(options.seed)
    draws = np.empty((options.bootstrap, sequences), np.uint16)
    number = redrawn = 0
    while number < len(draws):
        chosen = random.integers(sequences, size=sequences)
        times = np.bincount(chosen, minlength=sequences)
        if counted.with_marker[:, times > 0].any(axis=1).all():
            draws[number] = times
            number += 1
        else:
            redrawn += 1
    return draws, redrawn


def _count(
    readers: Sequence[TraceReader], counted: Counted, tally: Tally, progress: Progress | None
) -> None:
    """Read all routing once, block by block."""
    grid = readers[0].grid
    fitting = _BLOCK_BYTES // (8 * grid.size)  # sequences
    rows = _BLOCK_ROWS if counted.sequences <= fitting else max(_LEAST_ROWS, fitting)
    total, before = sum(len(reader) for reader in readers), 0
    for reader in readers:
        for start, block in reader.blocks(rows):
            here = slice(before + start, before + start + len(block))
            keep = counted.keep[here]
            ids = block.topk_ids if keep.all() else block.topk_ids[keep]
            tally.add(ids, counted.sequence[here][keep], counted.marked[:, here][:, keep])
            if progress is not None:
                progress(here.stop, total)
        before += len(reader)


def _identification(
    readers: Sequence[TraceReader],
    classes: tuple[TokenClass, ...],
    counted: Counted,
    tally: Tally,
    options: _Options,
    redrawn: int,
) -> Identification:
    """Scores, ranking and intervals from the counts."""
    like, grid, top = readers[0].like, readers[0].grid, options.top
    weights = np.array([one.coefficient for one in classes])
    scored = score(tally, weights, least_joint=options.least_joint, least_uses=options.least_uses)
    _require_enough(scored, tally, options)
    tied = scored.tied(int(scored.order[top - 1]))
    return Identification(
        tokens=classes,
        top=top,
        ranked=ranked_experts(
            scored, tally, weights, grid, top=top, listed=max(top, LISTED), level=LEVEL
        ),
        layer_ids=grid.layers,
        experts=grid.experts,
        scores=_layer_map(scored.scores, np.isin(np.arange(grid.size), scored.order), grid.experts),
        npmi=tuple(
            _layer_map(row, known > 0, grid.experts)
            for row, known in zip(scored.npmi, tally.marked, strict=True)
        ),
        rows=int(counted.keep.sum()),
        sequences=counted.sequences,
        unknown_rows=counted.unknown,
        prompt=options.prompt,
        least_joint=options.least_joint,
        least_uses=options.least_uses,
        rankable=len(scored.order),
        tied_out=int((tied >= top).sum()),
        bootstrap=tally.replicates,
        redrawn=redrawn,
        level=LEVEL,
        smoothing=options.smoothing,
        seed=options.seed,
        model_id=like.model_id,
        fingerprint=like.fingerprint,
        tokenizer_id=like.tokenizer_id,
        traces=tuple(reader.name for reader in readers),
    )


def _require_enough(scored: Scored, tally: Tally, options: _Options) -> None:
    """TraceError unless as many experts can be ranked as are to be chosen."""
    if len(scored.order) < options.top:
        raise TraceError(
            f"{len(scored.order)} experts have {options.least_joint} rows with the markers and "
            f"{options.least_uses} uses (the most that one has: {int(scored.joint.max())} and "
            f"{int(tally.uses.max())}), but {options.top} are to be chosen; record more "
            "responses, or lower least_joint or least_uses"
        )


def _classes(
    markers: Sequence[Marker], weights: FloatArray, counted: Counted
) -> tuple[TokenClass, ...]:
    """The markers as they were counted."""
    parts = zip(markers, weights.tolist(), counted.marked, counted.with_marker, strict=True)
    return tuple(
        TokenClass(
            text=marker.text,
            coefficient=weight,
            variants=marker.variants,
            occurrences=int(rows.sum()),
            sequences=int(inside.sum()),
        )
        for marker, weight, rows, inside in parts
    )


def _layer_map(values: FloatArray, known: NDArray[np.bool_], experts: tuple[int, ...]) -> LayerMap:
    """By layer, rounded; None where not known."""
    plain = [
        round(value, _MAP_DECIMALS) if there else None
        for value, there in zip(values.tolist(), known.tolist(), strict=True)
    ]
    ends = np.cumsum(experts).tolist()
    return tuple(tuple(plain[end - n : end]) for end, n in zip(ends, experts, strict=True))
