"""`moe-runtime generate --prompts`: many prompts, sequences regrouped by the experts they need.

Knows prompts, progress and what to print; not how sequences are grouped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_runtime.cli.options import tokenizer_options
from moe_runtime.cli.room import AskedRoom, budget_line
from moe_runtime.cli.session import emit_json, to_stderr
from moe_runtime.core import format_bytes
from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text
from moe_runtime.report import Report

__all__ = ["ManyOptions", "ManyRun", "generate_many", "show_many", "token_ids"]


@dataclass(frozen=True, kw_only=True)
class ManyOptions:
    """What to do with the prompts; see `moe_runtime.generate_batches`."""

    batch_size: int
    max_new_tokens: int
    schedule: str
    window: int | str | None
    every: int
    temperature: float
    seed: int
    predictor: Path | None
    verify: bool
    compare: bool
    chat: bool
    room: AskedRoom


@dataclass(frozen=True, kw_only=True)
class ManyRun:
    """Texts in the prompts' order, and the runs that they cost; `ordered` if one was compared.

    Args:
        generated: a dictionary for each prompt: `prompt`, `text`, `tokens`, `new_tokens`.
        run, ordered: `BatchRun`s.
        record: the run record of the model's runtime over everything.
    """

    generated: list[dict[str, Any]]
    run: Any
    ordered: Any
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, outputs once."""
        runs = {"run": self.run, "in_order": self.ordered}
        plain = {name: None if one is None else one.to_dict() for name, one in runs.items()}
        for one in plain.values():
            if one is not None:
                del one["outputs"]
        return {"generated": self.generated, **plain, "budget": self.record["budget"]}

    def save_lines(self, path: Path) -> None:
        """A JSON object a line, in the prompts' order, whole or not at all."""
        lines = [json.dumps(one, ensure_ascii=False) for one in self.generated]
        write_text(path, "\n".join(lines) + "\n")

    def summary(self) -> list[str]:
        """Lines for people."""
        lines = [_described(self.run)]
        if self.ordered is not None:
            lines += [_described(self.ordered), *_compared(self.run, self.ordered)]
        if self.run.fallback:
            lines.append(f"not scheduled all through: {self.run.fallback}")
        found = self.run.agreement
        if found is not None:
            lines.append(
                f"beside each prompt alone: {found.steps:,} steps, logits within "
                f"{found.largest:.1e} ({found.beyond:,} beyond 1e-5), {found.near_ties} tokens "
                f"differ at a near tie, {found.different} otherwise"
            )
        if line := budget_line(self.record):
            lines.append(line)
        return lines


def show_many(
    model_path: str,
    documents: list[str],
    options: ManyOptions,
    *,
    hub: dict[str, Any],
    runtime: dict[str, Any],
    out: Path | None,
    run: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Generate; texts go to standard output or to `out`, the summary to standard error.

    Raises:
        As `generate_many`.
    """
    done = generate_many(
        model_path, documents, options, hub=hub, runtime=runtime, console=to_stderr()
    )
    if out is not None:
        done.save_lines(out)
    for path in (run, page):
        if path is not None:
            Report.from_run(done.record).save(path)
    if as_json:
        places = {"out": out, "run_file": run, "report": page}
        emit_json(done.to_dict() | {k: None if v is None else str(v) for k, v in places.items()})
        return
    if out is None:
        for number, one in enumerate(done.generated, 1):
            typer.echo(f"{number}: {one['text']}")
    for line in done.summary():
        typer.echo(line, err=True)


def generate_many(
    model_path: str,
    documents: list[str],
    options: ManyOptions,
    *,
    hub: dict[str, Any],
    runtime: dict[str, Any],
    console: Console,
) -> ManyRun:
    """Load the model and generate for all documents.

    Raises:
        ConfigError: no documents, one without a token, or options out of range.
        PredictorError: the predictor's file is damaged or for another model.
        As `moe_runtime.from_pretrained`.
    """
    from transformers import AutoTokenizer

    import moe_runtime
    from moe_runtime.batches import sequences_held

    if not documents:
        raise ConfigError("no prompts in the file: it is empty or blank; give some text")
    tokenizer = AutoTokenizer.from_pretrained(model_path, **tokenizer_options(hub))
    prompts = [token_ids(tokenizer, text, chat=options.chat) for text in documents]
    empty = next((at for at, ids in enumerate(prompts) if not ids), None)
    if empty is not None:
        raise ConfigError(
            f"prompt {empty + 1} has no token: {documents[empty]!r:.40}; leave it out"
        )
    room = options.room.for_prompts(
        map(len, prompts),
        new_tokens=options.max_new_tokens,
        at_once=sequences_held(
            len(prompts),
            batch_size=options.batch_size,
            schedule=options.schedule,
            window=options.window,
        ),
    )
    model = moe_runtime.from_pretrained(model_path, **runtime, **room, **hub)
    given: dict[str, Any] = {
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    scheduled: dict[str, Any] = {
        "schedule": options.schedule,
        "window": options.window,
        "every": options.every,
    }
    predictor = None if options.predictor is None else _predictor(model, options.predictor)
    ordered = None
    if options.compare:
        with _progress(console, "in order", len(prompts)) as report:
            ordered = moe_runtime.generate_batches(
                model, prompts, schedule="order", progress=report, **given
            )
    with _progress(console, options.schedule, len(prompts)) as report:
        run = moe_runtime.generate_batches(
            model,
            prompts,
            predictor=predictor,
            verify=options.verify,
            progress=report,
            **scheduled,
            **given,
        )
    generated = [
        {
            "prompt": text,
            "text": tokenizer.decode(list(tokens), skip_special_tokens=True),
            "tokens": list(tokens),
            "new_tokens": len(tokens),
        }
        for text, tokens in zip(documents, run.outputs, strict=True)
    ]
    record = moe_runtime.report(model).to_dict()
    record["generated"] = [{k: v for k, v in one.items() if k != "tokens"} for one in generated]
    return ManyRun(generated=generated, run=run, ordered=ordered, record=record)


def token_ids(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, in the chat template if asked for."""
    if not chat:
        return list(tokenizer(text, return_token_type_ids=False)["input_ids"])
    filled = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(filled, add_special_tokens=False)["input_ids"])


def _predictor(model: Any, path: Path) -> Any:
    import moe_runtime
    from moe_runtime.predictors.files import load_predictor

    spec = moe_runtime.runtime_of(model).spec
    return load_predictor(path, fingerprint=spec.fingerprint, grid=spec.grid)


@contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[Callable[[int, int], None]]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as shown:
        task = shown.add_task(name, total=total, tokens=0)
        yield lambda done, tokens: shown.update(task, completed=done, tokens=tokens)


def _described(run: Any) -> str:
    """One run in a line."""
    decode = run.decode
    parts = [f"{run.schedule}, {run.window} x {run.batch_size}: {run.new_tokens:,} tokens"]
    if run.decode_tokens_per_second is not None:
        parts.append(f"{run.decode_tokens_per_second:.1f} tokens/s decode")
    if run.tokens_per_second is not None:
        parts.append(f"{run.tokens_per_second:.1f} with prefill")
    if decode.active_per_call is not None:
        parts.append(f"{decode.active_per_call:.1f} active experts a batch")
        parts.append(f"{decode.misses:,} loaded on demand, {format_bytes(decode.bytes_read)}")
    if run.regroupings:
        parts.append(f"{run.regroupings} regroupings in {run.rounds} steps")
    return ", ".join(parts)


def _compared(run: Any, ordered: Any) -> list[str]:
    """What the schedule was worth, and whether the tokens are the same."""
    lines = []
    if run.decode.active and ordered.decode.active and ordered.decode.misses:
        # For each token, since fewer sequences a batch would activate fewer experts too.
        active = run.decode.active / run.decode.tokens
        before = ordered.decode.active / ordered.decode.tokens
        loads = run.decode.misses_per_token / ordered.decode.misses_per_token
        rate = run.decode_tokens_per_second / ordered.decode_tokens_per_second
        lines.append(
            f"over in order, for each token: {100 * (active / before - 1):+.1f} % active experts, "
            f"{100 * (loads - 1):+.1f} % loads, {100 * (rate - 1):+.1f} % tokens/s decode "
            "(one run each)"
        )
    different = sum(a != b for a, b in zip(run.outputs, ordered.outputs, strict=True))
    lines.append(f"{different} of {len(run.outputs)} prompts have other tokens than in order")
    return lines
