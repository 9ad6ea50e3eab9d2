"""Progress while tokens come: a live line for each prompt, on standard error.

Knows streamers and counters; does not know commands.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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
    """A streamer for `generate` that shows tokens, hit rate and bytes of several prompts.

    Use as a context manager; call `start(group)` before each `generate`.

    Args:
        limits: the most tokens that each group of prompts will bring, by the group's name.
    """

    def __init__(self, model: Any, limits: Mapping[str, int], console: Console) -> None:
        self._model = model
        self._limits = dict(limits)
        self._tokens = dict.fromkeys(limits, 0)
        self._group = ""
        self._prompt_pending = False
        self._counters: Counters | None = None
        self._drawn = 0.0
        self._live = Live(self._table(), console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveRun:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def start(self, group: str) -> None:
        """The next prompt, one of `group`, begins."""
        self._group = group
        self._prompt_pending = True

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each new token."""
        if self._prompt_pending:
            self._prompt_pending = False
            return
        self._tokens[self._group] += value.numel()
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
        for group, limit in self._limits.items():
            tokens = self._tokens[group]
            bar = "━" * round(20 * tokens / limit)
            colour = "cyan" if group == self._group else "dim"
            table.add_row(group, f"[{colour}]{bar:<20}[/]", f"{tokens}/{limit} tokens")
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
