"""What the plan commands read: recordings of one model put together, and what its checkpoint says.

Knows the files' forms; does not know what is planned with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_runtime.errors import BudgetError, PlanError, TraceError
from moe_runtime.placement.plan import Plan
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import DECODE, PREFILL, RoutingTrace

__all__ = [
    "ModelFacts",
    "Recording",
    "in_phase",
    "model_facts",
    "read_recordings",
    "require_plan_like",
]

Recording: TypeAlias = RoutingTrace | RoutingCounts
_READER_THREADS = 3  # what the commands read with unless told otherwise
COUNTS_FORMAT = "moe-runtime.counts"
PHASES = {"all": None, "prefill": PREFILL, "decode": DECODE}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a checkpoint says about its experts.

    Args:
        model_id, fingerprint: of the model.
        layer_ids, experts, expert_bytes: absolute index, experts and bytes of one expert of each
            MoE layer.
        staging: bytes that the runtime reads through, in a budget of the memory asked for.
    """

    model_id: str
    fingerprint: str
    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    staging: int

    def require(self, recording: Recording, name: str) -> None:
        """TraceError unless the recording is of this model."""
        theirs = recording.fingerprint
        if theirs and self.fingerprint != theirs:
            raise TraceError(
                f"{name}: recorded of {recording.model_id or 'a model'} with fingerprint {theirs}, "
                f"{self.model_id} has {self.fingerprint}; plan from its own trace"
            )
        if recording.layer_ids != self.layer_ids:
            odd = sorted(set(recording.layer_ids) ^ set(self.layer_ids))
            raise TraceError(
                f"{name}: has MoE layers {list(recording.layer_ids)}, {self.model_id} has "
                f"{list(self.layer_ids)}" + (f"; layer {odd[0]} is in one of them only" * bool(odd))
            )
        for layer, found, has in zip(self.layer_ids, recording.experts, self.experts, strict=True):
            if found != has:
                raise TraceError(
                    f"{name}: layer {layer} has {found} experts, {self.model_id} has {has}"
                )


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


def model_facts(model: str, memory: int | None = None) -> ModelFacts:
    """Read a checkpoint's structure; no weight is loaded.

    Args:
        memory: bytes of one device, for the runtime's working memory.

    Raises:
        As `inspect_checkpoint`.
        PlanError: the runtime cannot run the model in so little memory; says what it takes.
    """
    import moe_runtime
    from moe_runtime.budget import plan_budget
    from moe_runtime.cli.session import quiet_libraries
    from moe_runtime.layout import largest_whole_row

    quiet_libraries(debug=False)
    spec, experts = moe_runtime.inspect_checkpoint(model)
    floor = largest_whole_row(spec, experts, by_rows=False)
    staging = 0
    if memory is not None:
        try:
            staging = plan_budget(
                spec, memory, "", threads=_READER_THREADS, floor=floor, disk=True
            ).staging
        except BudgetError as error:
            raise PlanError(f"--memory is too little to run {model} in: {error}") from error
    return ModelFacts(
        model_id=spec.model_id,
        fingerprint=spec.fingerprint,
        layer_ids=tuple(layer.layer for layer in spec.layers),
        experts=tuple(layer.num_experts for layer in spec.layers),
        expert_bytes=tuple(layer.expert_bytes for layer in spec.layers),
        staging=staging,
    )


def _read(path: Path) -> Recording:
    if not path.is_dir():
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
        except (SafetensorError, OSError):
            header = {}  # said with the file's name by the reader below
        if header.get("format") == COUNTS_FORMAT:
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


def require_plan_like(plan: Plan, recording: Recording, path: Path, name: str) -> None:
    """PlanError, naming the plan's file, unless the plan fits the recording's model."""
    try:
        plan.require_model(
            layer_ids=recording.layer_ids,
            experts=recording.experts,
            fingerprint=recording.fingerprint,
            name=name,
        )
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
