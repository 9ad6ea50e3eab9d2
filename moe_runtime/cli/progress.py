"""Progress while tokens come: a live line for each prompt, on standard error.

Knows streamers and counters; does not know commands.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

import moe_runtime
from moe_runtime.core import format_bytes
from moe_runtime.report import Counters

__all__ = ["LiveRun"]

_REFRESH_SECONDS = 0.25


class LiveRun(BaseStreamer):
    """A streamer for `generate` that shows tokens, hit rate and bytes of a run of prompts.

    Use as a context manager; call `start(name)` before each `generate`.
    """

    def __init__(self, model: Any, names: list[str], new_tokens: int, console: Console) -> None:
        self._model = model
        self._names = names
        self._limit = new_tokens
        self._tokens = [0] * len(names)
        self._at = -1
        self._prompt_pending = False
        self._counters: Counters | None = None
        self._drawn = 0.0
        self._live = Live(self._table(), console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveRun:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def start(self) -> None:
        """The next prompt begins."""
        self._at += 1
        self._prompt_pending = True

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each new token."""
        if self._prompt_pending:
            self._prompt_pending = False
            return
        self._tokens[self._at] += value.numel()
        if time.monotonic() - self._drawn >= _REFRESH_SECONDS:
            self._draw()

    def end(self) -> None:
        """Called by `generate` when the prompt is done."""
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._counters = moe_runtime.report(self._model, simulate=False).counters
        self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        for at, name in enumerate(self._names):
            done = self._tokens[at] / self._limit
            bar = "━" * round(20 * done)
            colour = "cyan" if at == self._at else "dim"
            table.add_row(
                name,
                f"[{colour}]{bar:<20}[/]",
                f"{self._tokens[at]}/{self._limit} tokens",
            )
        counters = self._counters
        if counters is not None:
            rate = (
                counters.decode_tokens / counters.decode_seconds if counters.decode_seconds else 0
            )
            table.add_row(
                "so far",
                f"{100 * (counters.hit_rate or 0):.1f} % hits",
                f"{format_bytes(counters.bytes_read)} read, {rate:.0f} tokens/s",
            )
        return table
