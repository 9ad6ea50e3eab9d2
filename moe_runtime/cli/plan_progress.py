"""The solver at work: one live line on standard error.

Knows no solver; is told what is being done, the best cost and the bound.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

__all__ = ["SolveProgress"]


class SolveProgress:
    """Shows phase, seconds, best cost so far, bound and gap. Use as a context manager, then call.

    Where standard error is no terminal, nothing is shown.
    """

    def __init__(self, console: Console, time_limit: float) -> None:
        self._began = time.monotonic()
        self._limit = time_limit
        self._phase = "reading"
        self._best: float | None = None
        self._bound: float | None = None
        self._live = (
            Live(get_renderable=self._row, console=console, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> SolveProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, phase: str, best: float | None, bound: float | None) -> None:
        """What is done now; what is not said again stays as it was."""
        self._phase = phase
        self._best = best if best is not None else self._best
        self._bound = bound if bound is not None else self._bound

    def _row(self) -> Table:
        row = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        cells = [
            f"[cyan]{self._phase}[/]",
            f"{time.monotonic() - self._began:.0f} s of {self._limit:g}",
        ]
        if self._best is not None:
            cells.append(f"best {self._best:.4f}")
        if self._bound is not None:
            cells.append(f"bound {self._bound:.4f}")
        if self._best and self._bound is not None:
            cells.append(f"gap {100 * max(0.0, 1 - self._bound / self._best):.1f} %")
        row.add_row(*cells)
        return row
