"""`moe-runtime plan`: a placement from recorded routing, with its certificate and held-out worth.

Does not know how a plan is found, measured or drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.groups import group
from moe_runtime.cli.options import DebugOption, JsonOption, outcome_place
from moe_runtime.cli.plan_compare import compare_command
from moe_runtime.cli.plan_make import MakeOptions, default_place, make
from moe_runtime.cli.plan_show import made_facts, print_made, show_command
from moe_runtime.cli.session import emit_json, session, to_stderr
from moe_runtime.cli.step_time import (
    BatchOption,
    ComputeOption,
    LinkOption,
    NodeLinkOption,
    PromptTokensOption,
    ServingOptions,
    WidthsOption,
)
from moe_runtime.core import parse_bytes
from moe_runtime.errors import ConfigError
from moe_runtime.placement.messages import MODES
from moe_runtime.placement.methods import METHODS
from moe_runtime.placement.timed_plan import PROMPT_TOKENS

__all__ = ["plan"]

plan = group(
    "Plan which device holds which expert from recorded routing; look at plans, compare them.\n\n"
    "Example:  [bold]moe-runtime plan olmoe.trace.safetensors --devices 8 --nodes 2 "
    "--load-cap 1.05 -o olmoe.plan.json[/bold]"
)


def _bytes(text: str | None) -> int | None:
    """A byte size as an option's callback."""
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def _choice(*known: str) -> Any:
    """A callback that takes one of these words."""

    def check(text: str | None) -> str | None:
        if text is not None and text not in known:
            raise typer.BadParameter(f"{text!r} is none of {', '.join(known)}")
        return text

    return check


@plan.command("make")
def make_command(  # noqa: PLR0913, PLR0917  the command's options
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="*.trace.safetensors, a recording's folder x.trace, or *.counts.safetensors; "
            "several of one model are put together.",
        ),
    ],
    devices: Annotated[
        int | None, typer.Option("--devices", "-G", min=1, max=4096, help="Equal devices.")
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, help="Nodes that they stand in, evenly, in order.")
    ] = 1,
    topology: Annotated[
        Path | None,
        typer.Option("--topology", metavar="FILE.yaml", help="Devices, nodes, memory and costs."),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="TERMS",
            help="load, or a sum of crossing, distinct, time: crossing+0.5*distinct.",
        ),
    ] = "crossing",
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            callback=_choice(*MODES),
            help="With --objective time: least predicted time a decode step, rows returning home "
            "(vanilla) or staying with their experts (coherent). Needs --link, and --model or "
            "--widths.",
        ),
    ] = None,
    link: LinkOption = None,
    node_link: NodeLinkOption = None,
    batch: BatchOption = 32,
    prompt_tokens: PromptTokensOption = PROMPT_TOKENS,
    widths: WidthsOption = None,
    compute_ms: ComputeOption = 0.0,
    load_cap: Annotated[
        float | None,
        typer.Option("--load-cap", help="Highest load of a device over the mean, each layer."),
    ] = None,
    redundant: Annotated[
        int, typer.Option("--redundant", min=0, help="Further slots a layer, for replicas.")
    ] = 0,
    counts: Annotated[
        str,
        typer.Option(
            "--counts",
            callback=_choice("equal", "capped"),
            help="Experts a device: equal (what engines ask for), or capped by --slack.",
        ),
    ] = "equal",
    slack: Annotated[
        float, typer.Option("--slack", help="With --counts capped: times an equal share.")
    ] = 1.25,
    groups: Annotated[
        int,
        typer.Option("--groups", min=0, help="Routing groups that stay whole (n_group); 0: none."),
    ] = 0,
    holdout: Annotated[
        float, typer.Option("--holdout", help="Share of the sequences to measure on, unseen.")
    ] = 0.3,
    test: Annotated[
        list[Path] | None,
        typer.Option("--test", metavar="TRACE", help="Measure on this instead; repeatable."),
    ] = None,
    phase: Annotated[
        str,
        typer.Option(
            "--phase",
            callback=_choice("all", "prefill", "decode"),
            help="Tokens that count: all, prefill, decode.",
        ),
    ] = "all",
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Count uses by the router's weights.")
    ] = False,
    smoothing: Annotated[
        str,
        typer.Option(
            "--smoothing", help="Of the counts: auto (cross-validated), none, some, strong."
        ),
    ] = "auto",
    shuffled: Annotated[
        bool,
        typer.Option(
            "--shuffled", help="Control: plan from the trace with its affinity shuffled away."
        ),
    ] = False,
    method: Annotated[
        str, typer.Option("--method", callback=_choice(*METHODS), help=f"{', '.join(METHODS)}.")
    ] = "auto",
    stages: Annotated[
        str,
        typer.Option(
            "--stages",
            callback=_choice("auto", "1", "2"),
            help="2: nodes first, then devices. auto: 2 where nodes are several and neither the "
            "objective nor replicas stand against it.",
        ),
    ] = "auto",
    time_limit: Annotated[
        float, typer.Option("--time-limit", help="Seconds to solve and to bound.")
    ] = 60.0,
    starts: Annotated[int, typer.Option("--starts", min=1, help="Starts of the sweeps.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all random choices.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", callback=_bytes, help="For experts on each device: 80GiB."
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory",
            metavar="SIZE",
            callback=_bytes,
            help="For experts that do not fit on devices; what fits nowhere stays on disk.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Checkpoint to read expert bytes from, and to check the trace against."
        ),
    ] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option(
            "--expert-bytes", metavar="SIZE", callback=_bytes, help="One expert, without --model."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="X.plan.json", help="Beside the trace, if not given, and new."
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Plan where experts live, and say what the plan is worth on tokens it has not seen.

    With --devices 1 --memory SIZE it is a residency plan: what one device keeps, for
    --plan of the other commands.

    Example:  [bold]moe-runtime plan olmoe.trace.safetensors --devices 8 --nodes 2
    --load-cap 1.05 -o olmoe.plan.json[/bold]
    """
    if (devices is None) == (topology is None):
        raise typer.BadParameter("give exactly one of --devices and --topology")
    if topology is not None and nodes != 1:
        raise typer.BadParameter("the topology's file names the nodes; leave --nodes out")
    if model is not None and expert_bytes is not None:
        raise typer.BadParameter("give --model or --expert-bytes, not both")
    if mode is not None and objective.strip() != "time":
        raise typer.BadParameter(f"--mode {mode} needs --objective time, found {objective!r}")
    if mode is not None and groups:
        raise typer.BadParameter("--mode plans single experts; leave --groups out")
    place = outcome_place(out) if out is not None else default_place(traces[0])
    if out is None and place.exists():
        raise typer.BadParameter(f"{place} exists already; name the plan's file with --out")
    with session(as_json=as_json, debug=debug):
        options = MakeOptions(
            traces=tuple(traces),
            test=tuple(test or ()),
            devices=devices,
            nodes=nodes,
            topology=topology,
            objective=objective,
            mode=mode,
            serving=ServingOptions(
                link=link,
                node_link=node_link,
                batch=batch,
                prompt_tokens=prompt_tokens,
                widths=widths,
                compute_ms=compute_ms,
                model=model,
            ),
            load_cap=load_cap,
            redundant=redundant,
            counts=counts,
            slack=slack,
            groups=groups,
            holdout=holdout,
            phase=phase,
            weighted=weighted,
            smoothing=smoothing,
            shuffled=shuffled,
            method=method,
            stages=stages,
            time_limit=time_limit,
            starts=starts,
            seed=seed,
            # The callbacks have made numbers of the texts.
            memory=None if memory is None else int(memory),
            host_memory=None if host_memory is None else int(host_memory),
            model=model,
            expert_bytes=None if expert_bytes is None else int(expert_bytes),
        )
        made = make(options, to_stderr())
        made.save(place)
        if as_json:
            emit_json(made_facts(made, place))
        else:
            print_made(made, place, model)


plan.command("show")(show_command)
plan.command("compare")(compare_command)
