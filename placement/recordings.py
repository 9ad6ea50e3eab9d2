"""Recordings of one model put together: traces one after another, counts summed.

Knows the files' forms; does not know what is planned with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import DECODE, PREFILL, RoutingTrace

__all__ = ["Recording", "in_phase", "read_recordings"]

Recording: TypeAlias = RoutingTrace | RoutingCounts
COUNTS_FORMAT = "moe-runtime.counts"
PHASES = {"all": None, "prefill": PREFILL, "decode": DECODE}
_LONGEST_HEADER = 1 << 26


def read_recordings(paths: Sequence[Path]) -> Recording:
    """Traces one after another, or the sum of counts; which they are, their headers say.

    Sequences of different files get different numbers.

    Raises:
        TraceError: damaged files, different models, or traces and counts together.
    """
    loaded = [_read(path) for path in paths]
    traces = [one for one in loaded if isinstance(one, RoutingTrace)]
    counts = [one for one in loaded if isinstance(one, RoutingCounts)]
    if traces and counts:
        at = next(path for path, one in zip(paths, loaded, strict=True) if one is counts[0])
        raise TraceError(
            f"{at}: holds counts, but {paths[loaded.index(traces[0])]} is a trace of tokens; give "
            "one kind"
        )
    for path, one in zip(paths, loaded, strict=True):
        _require_same(one, loaded[0], path, paths[0])
    if counts:
        return RoutingCounts.total(counts)
    return RoutingTrace.concat(_distinct_sequences(traces))


def in_phase(recording: Recording, phase: str) -> Recording:
    """The rows of `"prefill"` or `"decode"`, or `"all"`.

    Raises:
        TraceError: counts, which do not know phases, or no row of that phase.
    """
    number = PHASES[phase]
    if number is None:
        return recording
    if isinstance(recording, RoutingCounts):
        raise TraceError("counts do not tell prefill from decode; use --phase all")
    chosen = recording.select(phase=number)
    if not len(chosen):
        raise TraceError(f"none of the {len(recording)} tokens was recorded in {phase}")
    return chosen


def _read(path: Path) -> Recording:
    if _format(path) == COUNTS_FORMAT:
        return RoutingCounts.load(path)
    trace = RoutingTrace.load(path)
    if not len(trace):
        raise TraceError(f"{path}: the trace has no tokens; record or import more")
    return trace


def _require_same(one: Recording, first: Recording, path: Path, first_path: Path) -> None:
    """The library says which field differs, but not in which file."""
    for name in ("model_id", "fingerprint", "layer_ids", "experts", "top_k"):
        mine, theirs = getattr(one, name), getattr(first, name)
        if mine != theirs:
            raise TraceError(
                f"{path}: has another {name} than {first_path}: {mine!r} instead of {theirs!r}; "
                "plan from recordings of one model only"
            )


def _distinct_sequences(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Number the sequences through, so that a held-out split never cuts one by mistake."""
    renumbered, start = [], 0
    for trace in traces:
        values, numbers = np.unique(trace.sequence_ids, return_inverse=True)
        renumbered.append(replace(trace, sequence_ids=(numbers + start).astype(np.int32)))
        start += len(values)
    return renumbered


def _format(path: Path) -> str:
    """What a safetensors header calls its format; "" where there is none. The readers say why."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
        return str(header["__metadata__"]["format"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
