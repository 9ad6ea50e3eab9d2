"""From the options of `plan make` to a plan: recordings read, the problem stated, the plan made.

Does not know how a plan is found, nor what is shown of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from moe_runtime.cli.plan_inputs import ModelFacts, model_facts
from moe_runtime.cli.plan_progress import SolveProgress
from moe_runtime.cli.step_time import ServingOptions, serving_of
from moe_runtime.errors import PlanError, TraceError
from moe_runtime.placement.affinity import shuffled
from moe_runtime.placement.groups import experts_of_groups, grouped_problem, in_groups
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.recordings import Recording, in_phase, read_recordings
from moe_runtime.placement.residency import apply_tiers, count_uses
from moe_runtime.placement.solve import make_plan, split_holdout
from moe_runtime.placement.timed_plan import Serving, make_timed_plan, timed_metrics
from moe_runtime.placement.topology import Topology
from moe_runtime.routing_counts import RoutingCounts

__all__ = ["MakeOptions", "default_place", "make"]

_ENDINGS = (".trace.safetensors", ".counts.safetensors", ".safetensors", ".trace")


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """The options of `plan make` as the command line took them; sizes in bytes."""

    traces: tuple[Path, ...]
    test: tuple[Path, ...]
    devices: int | None
    nodes: int
    topology: Path | None
    objective: str
    mode: str | None
    serving: ServingOptions
    load_cap: float | None
    redundant: int
    counts: str
    slack: float
    groups: int
    holdout: float
    phase: str
    weighted: bool
    smoothing: str
    shuffled: bool
    method: str
    stages: str
    time_limit: float
    starts: int
    seed: int
    memory: int | None
    host_memory: int | None
    model: str | None
    expert_bytes: int | None


def default_place(trace: Path) -> Path:
    """`x.plan.json` beside `x.trace.safetensors`."""
    name = trace.name
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), "")
    return trace.with_name(f"{name.removesuffix(ending)}.plan.json")


def make(options: MakeOptions, console: Console) -> Plan:
    """The plan, measured, with its tiers where memory is short.

    Args:
        console: where progress is shown.

    Raises:
        PlanError, TraceError: what is asked for cannot be had, or the recordings do not fit.
    """
    objective = Objective.parse(options.objective)
    solve_options = _solve_options(options, objective)
    recording = in_phase(read_recordings(options.traces), options.phase)
    # A plan for one device is one for the runtime.
    runtime = options.memory if options.devices == 1 else None
    facts = None if options.model is None else model_facts(options.model, runtime)
    if facts is not None:
        facts.require(recording, str(options.traces[0]))
    train, held_out = _split(options, recording)
    _check_affinity(recording, objective, options)
    problem = _problem(options, objective, recording, facts)
    if problem.topology.node_count > 1 and options.stages == "auto":
        two = not (objective.time or objective.is_load or problem.redundant)
        two = two and options.method != "exact"
        solve_options = replace(solve_options, stages=2 if two else 1)
    timed = options.mode is not None or options.serving.given
    serving = serving_of(options.serving, problem.topology, recording) if timed else None
    with SolveProgress(console, options.time_limit) as progress:
        if options.mode is not None and serving is not None:
            made = make_timed_plan(
                problem,
                train,
                serving,
                options.mode,
                held_out=held_out,
                options=solve_options,
                progress=progress,
            )
        else:
            made = _solved(options.groups, problem, train, held_out, solve_options, progress)
            made = _with_step_time(made, train, held_out, serving)
    if problem.spill:
        made = _with_tiers(made, train, problem, options, facts)
    return replace(
        made,
        model_id=made.model_id or (facts.model_id if facts is not None else ""),
        fingerprint=made.fingerprint or (facts.fingerprint if facts is not None else ""),
        settings={**made.settings, **_provenance(options, train, held_out)},
    )


def _solved(
    groups: int,
    problem: Problem,
    train: Recording,
    held_out: Recording | None,
    solve_options: SolveOptions,
    progress: SolveProgress,
) -> Plan:
    """The plan; routing groups stay whole if there are any."""
    if not groups:
        return make_plan(
            problem, train, held_out=held_out, options=solve_options, progress=progress
        )
    made = make_plan(
        grouped_problem(problem, groups),
        in_groups(train, groups),
        held_out=None if held_out is None else in_groups(held_out, groups),
        options=solve_options,
        progress=progress,
    )
    return experts_of_groups(made, problem.experts)


def _with_step_time(
    made: Plan, train: Recording, held_out: Recording | None, serving: Serving | None
) -> Plan:
    """With both modes' predictions in its metrics, if it is known how it is to be run."""
    if serving is None:
        return made
    found = timed_metrics(made.matrices(), made.topology, held_out or train, serving)
    found["measured_on"] = "train" if held_out is None else "held_out"
    return replace(made, metrics={**made.metrics, "step_time": found})


def _solve_options(options: MakeOptions, objective: Objective) -> SolveOptions:
    """Checked before a trace is read; `auto` stages are settled once the topology is known."""
    return SolveOptions(
        method=options.method,
        stages=2 if options.stages == "2" else 1,
        smoothing=options.smoothing,
        weighted=options.weighted and not objective.is_load,
        seed=options.seed,
        time_limit=options.time_limit,
        starts=options.starts,
    )


def _check_affinity(recording: Recording, objective: Objective, options: MakeOptions) -> None:
    """Say it at once, with the file's name, where an objective needs what was not recorded."""
    if objective.is_load:
        return
    if options.mode is not None:
        return  # of what is tried for a mode, the load needs no affinity
    if options.devices == 1:
        return  # nothing crosses: only the tiers are planned
    place = options.traces[0]
    if isinstance(recording, RoutingCounts):
        raise PlanError(
            f"{place}: counts without tokens say nothing of affinity, which the objective "
            f"{objective} needs; use --objective load, or record a trace (moe-runtime trace)"
        )
    if len(recording.layer_ids) < 2 and (objective.crossing or objective.time):
        raise PlanError(
            f"{place}: the trace has one MoE layer (layer {recording.layer_ids[0]}), so no expert "
            f"follows another and the objective {objective} is empty; use --objective load or "
            "distinct"
        )


def _split(options: MakeOptions, recording: Recording) -> tuple[Recording, Recording | None]:
    """(training, held-out), the training part shuffled for the control."""
    held_out: Recording | None
    if isinstance(recording, RoutingCounts):
        if options.shuffled:
            raise PlanError("counts have no affinity to shuffle; leave --shuffled out")
        if not options.test:
            return recording, None
        train: Recording = recording
        held_out = _test(options, recording)
    elif options.test:
        train, held_out = recording, _test(options, recording)
    else:
        train, held_out = split_holdout(recording, options.holdout, options.seed)
    if options.shuffled and not isinstance(train, RoutingCounts):
        train = shuffled(train, options.seed)
    return train, held_out


def _test(options: MakeOptions, recording: Recording) -> Recording:
    """The recordings of `--test`, which have to be of the same model."""
    test = in_phase(read_recordings(options.test), options.phase)
    for name in ("fingerprint", "layer_ids", "experts", "top_k"):
        mine, theirs = getattr(test, name), getattr(recording, name)
        known = mine and theirs if name == "fingerprint" else True
        if isinstance(test, RoutingCounts) != isinstance(recording, RoutingCounts):
            known = known and name != "top_k"
        if known and mine != theirs:
            raise TraceError(
                f"{options.test[0]}: has another {name} than {options.traces[0]}: {mine!r} "
                f"instead of {theirs!r}; test on a recording of the same model"
            )
    return test


def _problem(
    options: MakeOptions, objective: Objective, recording: Recording, facts: ModelFacts | None
) -> Problem:
    if options.topology is not None:
        topology = Topology.load(options.topology)
        if options.memory is not None:
            topology = replace(topology, memory=(options.memory,) * topology.devices)
    else:
        assert options.devices is not None
        topology = Topology.of(options.devices, options.nodes, memory=options.memory or 0)
    layers = len(recording.layer_ids)
    sizes = facts.expert_bytes if facts is not None else (options.expert_bytes or 0,) * layers
    if any(topology.memory) and not all(sizes):
        raise typer.BadParameter(
            "memory is limited, but how large an expert is stays unknown; give --model or "
            "--expert-bytes"
        )
    short = any(topology.memory) and (topology.devices == 1 or options.host_memory is not None)
    return Problem(
        layer_ids=recording.layer_ids,
        experts=recording.experts,
        topology=topology,
        redundant=options.redundant,
        counts=options.counts,
        slack=options.slack,
        load_cap=options.load_cap,
        # On one device nothing crosses and all load is its own.
        objective=Objective(crossing=0.0) if topology.devices == 1 else objective,
        expert_bytes=sizes,
        spill=short,
    )


def _with_tiers(
    made: Plan,
    train: Recording,
    problem: Problem,
    options: MakeOptions,
    facts: ModelFacts | None,
) -> Plan:
    """A tier for every expert. With the model known, one device keeps free what a runtime with as
    large a budget reads through.
    """
    uses = train.counts if isinstance(train, RoutingCounts) else count_uses(train)
    memory = made.topology.memory
    staging = facts.staging if facts is not None else 0
    tiered = apply_tiers(
        made,
        list(uses),
        problem.expert_bytes,
        memory=[limit - staging if limit else 0 for limit in memory],
        host_bytes=0 if options.host_memory is None else options.host_memory,
        time_limit=options.time_limit,
    )
    return replace(tiered, topology=made.topology)


def _provenance(
    options: MakeOptions, train: Recording, held_out: Recording | None
) -> dict[str, Any]:
    """Which tokens the plan was made from and measured on."""
    return {
        "traces": [path.name for path in options.traces],
        "test": [path.name for path in options.test],
        "holdout": None if options.test or held_out is None else options.holdout,
        "phase": options.phase,
        "shuffled": options.shuffled,
        "groups": options.groups,
        "train_tokens": train.tokens,
        "held_out_tokens": 0 if held_out is None else held_out.tokens,
    }
