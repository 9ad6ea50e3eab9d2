"""Plans for the time of a decode step: both modes predicted, and the plan that is fastest in one.

Puts the cost model and the solvers together; each has files of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.decode_steps import first_choices, in_lanes, starts_of
from moe_runtime.placement.drawn_routing import drawn_trace
from moe_runtime.placement.links import Links
from moe_runtime.placement.messages import COHERENT, MODES, MessageSizes
from moe_runtime.placement.methods import Progress, SolveOptions
from moe_runtime.placement.plan import BoolArray, Plan
from moe_runtime.placement.prefill_traffic import prompts_in_lanes, replay_prefill
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.recordings import Recording
from moe_runtime.placement.solve import make_plan, plan_metrics
from moe_runtime.placement.step_time import (
    Compute,
    ModesCompared,
    ModeTime,
    compare_modes,
    step_time,
)
from moe_runtime.placement.step_traffic import replay
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import RoutingTrace

__all__ = [
    "PROMPT_TOKENS",
    "Serving",
    "make_timed_plan",
    "predict_modes",
    "predict_prefill",
    "predicted_times",
    "timed_metrics",
]

_MOST_STEPS = 400  # replayed of a recording: their mean is known to a percent or so
_DRAWN_STEPS = 200
PROMPT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a plan is to be run: what the cost model needs beside a placement and routing.

    Args:
        rows: sequences a decode step.
        sizes: bytes of each kind of message.
        links: between the devices.
        prompt_tokens: of each sequence's prompt, for the time of prefill.
        compute: seconds that devices compute; nothing if not given.
    """

    rows: int
    sizes: MessageSizes
    links: Links
    prompt_tokens: int = PROMPT_TOKENS
    compute: Compute = field(default_factory=Compute)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "rows": self.rows,
            "prompt_tokens": self.prompt_tokens,
            "sizes": self.sizes.to_dict(),
            "links": self.links.to_dict(),
            "compute": self.compute.to_dict(),
        }


def predict_modes(
    placement: Sequence[BoolArray],
    topology: Topology,
    recording: Recording,
    serving: Serving,
    *,
    seed: int = 0,
) -> ModesCompared:
    """Both modes' time a decode step for a placement, on recorded or drawn routing.

    A trace is replayed in lanes of neighbouring tokens, 400 steps at most; of counts without
    tokens, routing is drawn (`drawn_trace`), 200 steps of it.

    Args:
        placement: for each MoE layer bool `[E, G]`, whether the device holds the expert.
        seed: of drawn routing.

    Raises:
        PlanError: fewer tokens than rows, layers or experts that differ.
    """
    recorded = _as_trace(recording, serving, _DRAWN_STEPS, seed)
    trace, steps = in_lanes(recorded, serving.rows, most=_MOST_STEPS)
    starts = starts_of(placement, topology, trace, steps)
    vanilla, coherent = (
        replay(placement, topology, trace, steps, serving.sizes, mode, starts) for mode in MODES
    )
    return compare_modes(vanilla, coherent, serving.links, topology, serving.compute)


def predict_prefill(
    placement: Sequence[BoolArray],
    topology: Topology,
    recording: Recording,
    serving: Serving,
    *,
    seed: int = 0,
) -> dict[str, ModeTime]:
    """By mode the time of one call that reads the prompts of all sequences of a step.

    A prompt is `serving.prompt_tokens` neighbouring tokens of the recording, or as many as there
    are; `rows` of the result are tokens of all prompts together.

    Raises:
        PlanError: fewer tokens than sequences, layers or experts that differ.
    """
    recorded = _as_trace(recording, serving, serving.prompt_tokens, seed)
    trace, calls = prompts_in_lanes(recorded, serving.rows, serving.prompt_tokens)
    return {
        mode: step_time(
            replay_prefill(placement, topology, trace, calls, serving.sizes, mode),
            serving.links,
            topology,
            serving.compute,
        )
        for mode in MODES
    }


def predicted_times(
    placement: Sequence[BoolArray], topology: Topology, recording: Recording, serving: Serving
) -> dict[str, Any]:
    """Plain data: what `predict_modes` says of a decode step, and `prefill`, by mode."""
    prefill = predict_prefill(placement, topology, recording, serving)
    return predict_modes(placement, topology, recording, serving).to_dict() | {
        "prefill": {mode: found.to_dict() for mode, found in prefill.items()}
    }


def _as_trace(recording: Recording, serving: Serving, steps: int, seed: int) -> RoutingTrace:
    """The recording, or routing drawn from its counts: so many tokens of each sequence."""
    if not isinstance(recording, RoutingCounts):
        return recording
    return drawn_trace(recording, serving.rows * steps, top_k=serving.sizes.top_k, seed=seed)


def make_timed_plan(
    problem: Problem,
    train: Recording,
    serving: Serving,
    mode: str,
    *,
    held_out: Recording | None = None,
    options: SolveOptions | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan with the least predicted time a decode step in one mode.

    A step's time is no sum over expert pairs (it hangs on each collective's most loaded device), so
    it is not solved for. What its bytes are made of is: distinct devices for rows that return home,
    crossings of the heaviest experts for rows that stay, both together for the partial sums of
    top-k above one. Each such plan, and the load-balanced one, is timed on the training tokens; the
    fastest is returned, with its own certificate, which speaks of its own objective.

    Args:
        mode: `"vanilla"` or `"coherent"`.
        options: the time limit is shared by the plans that are tried.

    Returns:
        As `make_plan`, with `metrics["step_time"]`: both modes' predictions on held-out tokens
        (training ones if there are none) of the plan and of contiguous placement.

    Raises:
        As `make_plan`, and PlanError for fewer tokens than rows.
    """
    if mode not in MODES:
        raise PlanError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    options = options or SolveOptions()
    tries = _tries(problem, train, serving.sizes, mode)
    share = replace(options, time_limit=options.time_limit / len(tries))
    best: Plan | None = None
    least, timed = np.inf, []
    for name, objective, recording in tries:
        made = make_plan(
            replace(problem, objective=objective), recording, options=share, progress=progress
        )
        found = predict_modes(made.matrices(), problem.topology, train, serving, seed=options.seed)
        seconds = (found.coherent if mode == COHERENT else found.vanilla).seconds
        timed.append({"objective": name, "seconds": seconds})
        if seconds < least:
            best, least = made, seconds
    assert best is not None, "something is tried"
    measured = plan_metrics(problem, best.matrices(), train, held_out=held_out, seed=options.seed)
    timing = timed_metrics(best.matrices(), problem.topology, held_out or train, serving)
    timing |= {
        "mode": mode,
        "measured_on": "train" if held_out is None else "held_out",
        "tried": timed,
    }
    return replace(
        best,
        top_k=tuple(train.top_k),
        metrics={**best.metrics, **measured, "step_time": timing},
        settings={**best.settings, "objective": "time", "mode": mode},
    )


def timed_metrics(
    placement: Sequence[BoolArray], topology: Topology, recording: Recording, serving: Serving
) -> dict[str, Any]:
    """Plain data of both modes' predictions for a placement and for contiguous experts."""
    rival = contiguous(tuple(map(len, placement)), topology.devices)
    return {
        **serving.to_dict(),
        "plan": predicted_times(placement, topology, recording, serving),
        "contiguous": predicted_times(rival, topology, recording, serving),
    }


def _tries(
    problem: Problem, train: Recording, sizes: MessageSizes, mode: str
) -> list[tuple[str, Objective, Recording]]:
    """(name, objective, recording) of each plan to try."""
    balanced = ("load", Objective(crossing=0.0), train)
    if not isinstance(train, RoutingTrace) or problem.devices == 1:
        return [balanced]
    wide = max(train.top_k) > 1
    if mode != COHERENT:
        # A single expert a token is on one device whatever the placement.
        apart = [("distinct", Objective(crossing=0.0, distinct=1.0), train)] if wide else []
        return [*apart, balanced]
    if len(train.layer_ids) < 2:
        return [balanced]
    if not wide:
        return [("crossing", Objective(), train), balanced]
    # Bytes of the partial sums beside those of the moves, both as shares of what they could be.
    weight = (max(train.top_k) - 1) * (sizes.move + sizes.partial_sums) / max(1, sizes.move)
    both = Objective(crossing=1.0, distinct=round(weight, 3))
    return [
        (str(both), both, train),
        ("crossing of the heaviest", Objective(), first_choices(train)),
        balanced,
    ]
