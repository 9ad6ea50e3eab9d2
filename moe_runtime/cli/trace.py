"""`moe-runtime trace`: record a model's routing, import other engines' recordings, look at a trace.

Does not know how routing is recorded or read.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.groups import group
from moe_runtime.cli.options import (
    AskedBatchOption,
    AskedLengthOption,
    DebugOption,
    DtypeOption,
    ExactOption,
    ExpertBudgetOption,
    HostBudgetOption,
    HostExecutionOption,
    JsonOption,
    LocalOption,
    ModelArgument,
    PolicyOption,
    ReaderThreadsOption,
    RevisionOption,
    SubfolderOption,
    VariantOption,
    hub_options,
    outcome_place,
)
from moe_runtime.cli.recording import Recorded, record_documents
from moe_runtime.cli.room import AskedRoom, budget_line
from moe_runtime.cli.session import emit_json, quiet_libraries, session, to_stderr
from moe_runtime.cli.trace_import import import_command
from moe_runtime.corpus import SPLITS, read_corpus
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import RoutingTrace

__all__ = ["trace"]

trace = group(
    "Record a model's routing to a trace, import other engines' recordings, look at a trace.\n\n"
    "Example:  [bold]moe-runtime trace ./olmoe --data prompts.txt -o olmoe.trace.safetensors[/bold]"
)


@trace.command("record")
def record(  # noqa: PLR0913, PLR0917  the command's options
    model: ModelArgument,
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE|-", help="The prompts; - is standard input.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="TRACE", help="A new *.trace.safetensors file."),
    ],
    split: Annotated[
        str,
        typer.Option(
            "--split",
            help="What is one prompt: lines, whole (the file), jsonl (an object a line with "
            "'prompt' or 'text'), auto (jsonl if it looks so, else lines).",
        ),
    ] = "auto",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "-n", min=0, help="Greedy tokens for each prompt; 0: none."
        ),
    ] = 64,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts that run together.")
    ] = 1,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Cut prompts to so many tokens.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Stop after so many prompts.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    expert_budget: ExpertBudgetOption = "auto",
    host_budget: HostBudgetOption = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")] = "auto",
    policy: PolicyOption = "lru",
    exact: ExactOption = False,
    host_execution: HostExecutionOption = "auto",
    reader_threads: ReaderThreadsOption = 3,
    max_batch: AskedBatchOption = None,
    max_length: AskedLengthOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    variant: VariantOption = None,
    local_files_only: LocalOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run prompts and record which experts each token goes to.

    Rows go to parts beside the output while the model runs; Ctrl-C ends the recording early and
    keeps what there is. An existing output is never added to: a second run needs another name.
    The last of the new tokens is not fed to the model, so it has no row.

    Example:  [bold]moe-runtime trace ./olmoe --data a.txt -n 128 -o a.trace.safetensors[/bold]
    """
    if split not in SPLITS:
        raise typer.BadParameter(f"--split is one of {', '.join(SPLITS)}, not {split!r}")
    with session(as_json=as_json, debug=debug):
        place = outcome_place(out)
        quiet_libraries(debug=debug)
        hub = hub_options(
            dtype=dtype,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            local_files_only=local_files_only,
        )
        options = {
            "expert_budget": expert_budget,
            "host_budget": host_budget,
            "device": device,
            "policy": policy,
            "exact": exact,
            "host_execution": host_execution,
            "reader_threads": reader_threads,
        }
        documents = read_corpus(sys.stdin if str(data) == "-" else data, split=split)
        began = time.perf_counter()
        done = record_documents(
            model,
            documents,
            place,
            hub=hub,
            runtime=options,
            room=AskedRoom(max_batch=max_batch, max_length=max_length),
            new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_tokens=max_tokens,
            limit=limit,
            chat=chat,
            console=to_stderr(),
        )
        _show_recorded(done, time.perf_counter() - began, as_json=as_json)


def _show_recorded(done: Recorded, seconds: float, *, as_json: bool) -> None:
    """Say where the trace is; KeyboardInterrupt again if the recording was interrupted."""
    size = done.path.stat().st_size if done.path.exists() else 0
    if as_json:
        emit_json(
            {
                "trace": str(done.path) if done.tokens else None,
                "tokens": done.tokens,
                "prompts": done.prompts,
                "bytes": size,
                "seconds": round(seconds, 3),
                "budget": done.record["budget"],
                "interrupted": done.interrupted,
            }
        )
    elif done.tokens:
        typer.echo(
            f"{done.path}: {done.tokens:,} tokens of {done.prompts:,} prompts in {seconds:.1f} s"
            + (", interrupted: it holds what ran until then" if done.interrupted else ""),
            err=done.interrupted,
        )
        if line := budget_line(done.record):
            typer.echo(line, err=True)
    if done.interrupted:
        raise KeyboardInterrupt


trace.command("import")(import_command)


@trace.command("show")
def show(
    path: Annotated[
        Path,
        typer.Argument(metavar="TRACE", help="A trace, the parts of one, or a file of counts."),
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a trace holds: tokens, layers, how even the experts' use is, how it repeats.

    Example:  [bold]moe-runtime trace show olmoe.trace.safetensors[/bold]
    """
    with session(as_json=as_json, debug=debug):
        facts = _facts(path)
        if as_json:
            emit_json(facts)
        else:
            _print(facts)


def _facts(path: Path) -> dict[str, Any]:
    """Everything that the command shows, as plain data."""
    from moe_runtime.trace_summary import entropy, summarize

    if not path.name.endswith(".counts.safetensors"):
        return {"kind": "trace", **summarize(RoutingTrace.load(path)).to_dict()}
    counts = RoutingCounts.load(path)
    return {
        "kind": "counts",
        "tokens": counts.tokens or None,
        "uses": counts.uses,
        "model_id": counts.model_id,
        "fingerprint": counts.fingerprint,
        "source": counts.source,
        "layers": [
            {
                "layer": layer,
                "experts": counts.experts[at],
                "top_k": counts.top_k[at],
                "entropy": round(entropy(counts.counts[at]), 6),
                "overlap": None,
            }
            for at, layer in enumerate(counts.layer_ids)
        ],
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(facts['model_id'] or 'unnamed model')}[/bold]")
    if facts["kind"] == "trace":
        console.print(
            f"{facts['tokens']:,} tokens ({facts['prompt_tokens']:,} prompt, "
            f"{facts['decoded_tokens']:,} decoded) in {facts['sequences']:,} sequences, "
            f"{facts['calls']:,} forward calls"
            + ("" if facts["weighted"] else "; no routing weights")
        )
    else:
        known = f"{facts['tokens']:,} tokens" if facts["tokens"] else "tokens unknown"
        uses = f"{facts['uses']:,.0f} uses, {known}"
        console.print(f"counts without tokens ({escape(facts['source'])}): {uses}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("layer", "experts", "top-k", "evenness", "overlap"):
        table.add_column(name, justify="right")
    for layer in facts["layers"]:
        overlap = layer["overlap"]
        table.add_row(
            str(layer["layer"]),
            str(layer["experts"]),
            str(layer["top_k"] or "?"),
            f"{layer['entropy']:.3f}",
            "" if overlap is None else f"{overlap:.3f}",
        )
    console.print(table)
