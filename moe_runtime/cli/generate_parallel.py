"""`moe-runtime generate --expert-parallel`: one rank of several that torchrun started.

Knows prompts and what to print, on rank 0 alone; not how ranks work together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from moe_runtime.cli.generate_many import token_ids
from moe_runtime.cli.options import tokenizer_options
from moe_runtime.cli.session import emit_json, session, to_stderr
from moe_runtime.core import format_bytes
from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text
from moe_runtime.parallel import ParallelOptions, ParallelRun, generate
from moe_runtime.parallel.agreement import together
from moe_runtime.parallel.launch import die_with_parent, process_group, say_when_terminated
from moe_runtime.placement.plan import Plan
from moe_runtime.report import ParallelReport
from moe_runtime.report.summary import duration

__all__ = ["ParallelCommand", "run_rank", "summary"]


@dataclass(frozen=True, kw_only=True)
class ParallelCommand:
    """What the command was asked for, alike on every rank.

    Args:
        options: of the run.
        plan: a plan file; None for blocks of neighbouring experts.
        timeout: seconds that a rank waits for the others.
        chat: put prompts into the model's chat template.
        out: where texts go as JSON lines; None for standard output.
        run: where the run file goes; None for none.
        report: where the page goes, the same as `moe-runtime report` makes; None for none.
    """

    options: ParallelOptions
    plan: Path | None
    timeout: float
    chat: bool = False
    out: Path | None = None
    run: Path | None = None
    report: Path | None = None


def run_rank(
    model: str,
    documents: list[str],
    command: ParallelCommand,
    *,
    hub: dict[str, Any],
    as_json: bool,
    debug: bool,
) -> None:
    """Do this rank's part; rank 0 prints and writes, every rank says its errors.

    Raises:
        ConfigError: not started by torchrun, no prompts, one without a token.
        As `moe_runtime.parallel.generate`.
    """
    die_with_parent()
    with say_when_terminated(), process_group(timeout=command.timeout) as link:
        first = link.rank == 0
        # Errors of the run are told by the inner session: in JSON by rank 0 alone.
        with session(as_json=as_json and first, debug=debug), link.telling():
            plan = together(link, "reading the plan", lambda: _plan(command.plan))
            tokenizer, prompts = together(
                link, "reading the prompts", lambda: _tokens(model, documents, hub, command.chat)
            )
            with _working(first, f"{command.options.mode} on {link.size} ranks"):
                run = generate(
                    model, prompts, plan=plan, options=command.options, link=link, loading=hub
                )
            if first:
                _show(tokenizer, documents, run, command, as_json=as_json)


def _plan(path: Path | None) -> Plan | None:
    return None if path is None else Plan.load(path)


def _tokens(
    model: str, documents: list[str], hub: dict[str, Any], chat: bool
) -> tuple[Any, list[list[int]]]:
    from transformers import AutoTokenizer

    if not documents:
        raise ConfigError("no prompts in the file: it is empty or blank; give some text")
    tokenizer = AutoTokenizer.from_pretrained(model, **tokenizer_options(hub))
    prompts = [token_ids(tokenizer, text, chat=chat) for text in documents]
    empty = next((at for at, ids in enumerate(prompts) if not ids), None)
    if empty is not None:
        raise ConfigError(
            f"prompt {empty + 1} has no token: {documents[empty]!r:.40}; leave it out"
        )
    return tokenizer, prompts


@contextmanager
def _working(first: bool, what: str) -> Iterator[None]:
    console = to_stderr()
    if first and console.is_terminal:
        with console.status(what):
            yield
    else:
        yield


def _show(
    tokenizer: Any,
    documents: list[str],
    run: ParallelRun,
    command: ParallelCommand,
    *,
    as_json: bool,
) -> None:
    generated = [
        {
            "prompt": text,
            "text": tokenizer.decode(list(tokens), skip_special_tokens=True),
            "tokens": list(tokens),
            "new_tokens": len(tokens),
        }
        for text, tokens in zip(documents, run.outputs, strict=True)
    ]
    if command.out is not None:
        lines = [json.dumps(one, ensure_ascii=False) for one in generated]
        write_text(command.out, "\n".join(lines) + "\n")
    if command.run is not None:
        run.save(command.run)
    if command.report is not None:
        ParallelReport(run.to_dict()).save(command.report)
    if as_json:
        plain = run.to_dict()
        del plain["outputs"]
        places = {"out": command.out, "run_file": command.run, "report": command.report}
        emit_json(
            {"generated": generated, "run": plain}
            | {name: None if path is None else str(path) for name, path in places.items()}
        )
        return
    if command.out is None:
        for number, one in enumerate(generated, 1):
            typer.echo(f"{number}: {one['text']}")
    for line in summary(run):
        typer.echo(line, err=True)


def summary(run: ParallelRun) -> list[str]:
    """A parallel run in lines for people."""
    tokens = sum(len(one) for one in run.outputs)
    mode = run.mode if run.mode == run.asked else f"{run.mode} (asked for {run.asked})"
    head = f"{mode}, {run.ranks} ranks: {tokens:,} tokens in {run.steps} steps"
    lines = [f"{head}, {run.seconds:.1f} s with prefill"]
    if run.check is not None and not run.check.passed:
        lines.append(f"coherence does not fit this model: {run.check.reason}")
    kinds: dict[str, list[int]] = {}
    for one in run.traffic:
        entry = kinds.setdefault(one.kind, [0, 0])
        entry[0] += one.cross_bytes
        entry[1] += one.calls
    lines.append(
        f"between ranks in decode steps: {format_bytes(run.cross_bytes)}, of it "
        f"{format_bytes(run.routing_bytes)} of routing, "
        f"{format_bytes(run.keys_values_bytes)} of keys and values"
    )
    lines += [
        f"  {kind}: {format_bytes(nbytes)} in {calls:,} calls"
        for kind, (nbytes, calls) in kinds.items()
    ]
    if run.stayed_share is not None:
        foretold = run.predicted.get("heaviest_crossing")
        beside = "" if foretold is None else f" (the plan: {100 * (1 - foretold):.1f} %)"
        lines.append(f"rows that stayed where they were: {100 * run.stayed_share:.1f} %{beside}")
    if line := _prefill(run):
        lines.append(line)
    if run.cache_bytes:
        cache = ", ".join(format_bytes(one) for one in run.cache_bytes)
        lines.append(f"keys and values by rank at most: {cache}")
    idle = ", ".join(f"{one:.1f} s" for one in run.idle_seconds)
    lines.append(f"waiting for other ranks, by rank: {idle}")
    return lines


def _prefill(run: ParallelRun) -> str:
    """What prefill took, and what links were foretold to take of it."""
    if not run.prefill_wait_seconds:
        return ""
    least = duration(min(run.prefill_wait_seconds))
    line = f"prefill: {duration(run.prefill_seconds)}, of it {least} or more spent waiting"
    foretold = run.predicted.get("prefill", {}).get("seconds")
    return line if foretold is None else f"{line}; foretold on the links: {duration(foretold)}"
