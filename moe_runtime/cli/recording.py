"""Running prompts through a model while its routing is recorded, with progress.

Knows documents and batches; does not know the command's options or output.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_runtime.cli.options import tokenizer_options
from moe_runtime.cli.room import AskedRoom
from moe_runtime.errors import ConfigError, TraceError

__all__ = ["Recorded", "record_documents"]

T = TypeVar("T")

_TEXTS = 256  # tokenized at once


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a recording left: the file, its tokens, prompts that ran, whether it was cut short.

    Args:
        record: the run record of the runtime over all of it.
    """

    path: Path
    tokens: int
    prompts: int
    interrupted: bool
    record: dict[str, Any]


def record_documents(
    model_path: str,
    documents: Iterable[str],
    out: Path,
    *,
    hub: dict[str, Any],
    runtime: dict[str, Any],
    room: AskedRoom,
    new_tokens: int,
    batch_size: int,
    max_tokens: int | None,
    limit: int | None,
    chat: bool,
    console: Console,
) -> Recorded:
    """Load the model, run the documents in batches, leave a trace.

    Raises:
        ConfigError: no documents, or a tokenizer that cannot do what is asked.
        TraceError: the output exists.
        As `moe_runtime.from_pretrained`.
    """
    from transformers import AutoTokenizer

    import moe_runtime

    chosen = list(islice(documents, limit))
    if not chosen:
        raise ConfigError("no prompts in the data: it is empty or blank; give some text")
    if out.exists():  # said again by the writer, but before the model is loaded
        raise TraceError(f"{out}: exists already; move it away or name another file")
    tokenizer = AutoTokenizer.from_pretrained(model_path, **tokenizer_options(hub))
    _prepare(tokenizer, batched=batch_size > 1)
    rows = [
        ids
        for texts in _batches(chosen, _TEXTS)
        for ids in _token_ids(tokenizer, texts, max_tokens=max_tokens, chat=chat)
    ]
    if not any(rows):
        raise ConfigError("no prompt has a token; give some text")
    left = room.for_prompts(
        map(len, rows), new_tokens=max(new_tokens, 1), at_once=min(batch_size, len(rows))
    )
    model = moe_runtime.from_pretrained(model_path, **runtime, **left, **hub)
    stops = _stop_tokens(model)
    prompts, interrupted = 0, False
    with _progress(console) as progress:
        task = progress.add_task("recording", total=len(chosen), tokens=0)
        recorder = None
        try:
            with moe_runtime.record(
                model, path=out, tokenizer_id=str(model_path), stop_tokens=stops
            ) as recorder:
                for batch in _batches(rows, batch_size):
                    inputs = _inputs(tokenizer, batch)
                    if inputs is not None:
                        _run(model, inputs.to(model.device), new_tokens)
                    prompts += len(batch)
                    progress.update(task, completed=prompts, tokens=recorder.rows)
        except KeyboardInterrupt:
            interrupted = True
    return Recorded(
        path=out,
        tokens=0 if recorder is None else recorder.rows,
        prompts=prompts,
        interrupted=interrupted,
        record=moe_runtime.report(model, simulate=False).to_dict(),
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _prepare(tokenizer: Any, *, batched: bool) -> None:
    """Pad on the left, where decoding needs it."""
    tokenizer.padding_side = "left"
    if batched and tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                "the tokenizer has neither a padding nor an end token, so prompts cannot run "
                "together; use --batch-size 1"
            )
        tokenizer.pad_token = tokenizer.eos_token


def _stop_tokens(model: Any) -> tuple[int, ...]:
    """The tokens at which `generate` ends a sequence."""
    stops = getattr(model.generation_config, "eos_token_id", None)
    if stops is None:
        return ()
    return (stops,) if isinstance(stops, int) else tuple(int(stop) for stop in stops)


def _token_ids(
    tokenizer: Any, batch: Sequence[str], *, max_tokens: int | None, chat: bool
) -> list[array[int]]:
    """Token ids of each prompt, four bytes each.

    Raises:
        ValueError: `chat` is asked for and there is no template.
    """
    how = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
    if chat:
        rows = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in batch
        ]
        encoded = tokenizer(rows, add_special_tokens=False, return_token_type_ids=False, **how)
    else:
        encoded = tokenizer(list(batch), return_token_type_ids=False, **how)
    return [array("i", ids) for ids in encoded["input_ids"]]


def _inputs(tokenizer: Any, batch: Sequence[array[int]]) -> Any:
    """Ids and mask `[batch, tokens]`, without prompts that have no token; None if none has."""
    kept = [list(ids) for ids in batch if ids]
    if not kept:
        return None
    if len(kept) == 1:
        return _single(kept[0])
    return tokenizer.pad({"input_ids": kept}, return_tensors="pt", padding=True)


def _single(ids: list[int]) -> Any:
    """One row needs no padding token."""
    import torch
    from transformers import BatchEncoding

    tensor = torch.tensor([ids])
    return BatchEncoding({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)})


def _run(model: Any, inputs: Any, new_tokens: int) -> None:
    """Prefill and greedy decoding. One new token needs no call after the prompt's, like none."""
    pad = getattr(model.generation_config, "pad_token_id", None)
    stops = _stop_tokens(model)
    model.generate(
        **inputs,
        max_new_tokens=max(new_tokens, 1),
        do_sample=False,
        pad_token_id=pad if pad is not None else (stops[0] if stops else None),
    )
