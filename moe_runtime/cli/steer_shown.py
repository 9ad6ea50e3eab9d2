"""What `steer eval` shows: a live line while it runs, a table of the arms at the end.

Knows the evaluation's value; not how it is made.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_runtime.steering.evaluation import Estimate, SteeringEvaluation, select_beta

if TYPE_CHECKING:
    from moe_runtime.steering.arm_runner import Progress as Done

__all__ = ["EvaluationProgress", "show_evaluation"]

_PLAIN_SECONDS = 30.0  # between lines where standard error is no terminal


class EvaluationProgress:
    """Arm, samples done and tokens a second, on standard error. A context manager, then called.

    If the block is interrupted it says that what was done is kept, and where.
    """

    def __init__(self, console: Console, journal: Path) -> None:
        self._console, self._journal = console, journal
        self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("loading", total=None, rate="")

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        if self._journal.exists():
            self._console.print(f"going on from {self._journal}", style="dim")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt and self._journal.exists():
            self._console.print(
                f"kept in {self._journal}; the same command goes on from there", soft_wrap=True
            )

    def __call__(self, done: Done) -> None:
        """Shows how far it is."""
        rate = f"{done.new_tokens / done.seconds:,.0f} tokens/s" if done.seconds else ""
        self._bar.update(
            self._task, description=done.arm, completed=done.done, total=done.total, rate=rate
        )
        if self._bar.disable and time.monotonic() - self._said >= _PLAIN_SECONDS:
            self._said = time.monotonic()
            self._console.print(
                f"{done.arm}: {done.done:,} of {done.total:,} samples, {rate}", style="dim"
            )


def show_evaluation(found: SteeringEvaluation) -> None:
    """The arms as a table on standard output, and what to make of them."""
    console = Console(highlight=False)
    problems, samples = len(found.problem_ids), found.settings.samples
    console.print(f"{problems:,} problems, {samples} samples of each in each arm")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("arm", "accuracy %", "- unsteered", "p Holm", "thinking", "bad form"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm in found.arms:
        one = found.comparison(arm.name)
        bad = sum(arm.cut) + sum(arm.no_end) + sum(arm.no_answer)
        table.add_row(
            escape(arm.name),
            _percent(arm.accuracy),
            "" if one is None else _percent(one.difference, sign="+"),
            "" if one is None else f"{one.p_holm:.3g}",
            _tokens(arm.thinking_median),
            f"{100 * bad / (problems * samples):.1f} %",
        )
    console.print(table)
    console.print(
        f"Intervals: {found.settings.confidence:.0%}, bootstrap over problems (Wilson's over all "
        "samples, too narrow, is in the file). Thinking: median tokens. "
        "Bad form: cut off, thinking not ended, or no answer.",
        style="dim",
    )
    if any(arm.kind == "steered" for arm in found.arms):
        chosen = select_beta(found)
        console.print(
            f"On these problems beta {chosen:g} would be chosen"
            + (": steering is not ahead of doing nothing by more than noise" * (chosen == 1))
        )


def _percent(one: Estimate, sign: str = "") -> str:
    return f"{100 * one.value:{sign}.1f} [{100 * one.low:{sign}.0f}, {100 * one.high:{sign}.0f}]"


def _tokens(one: Estimate) -> str:
    return f"{one.value:g} [{one.low:g}, {one.high:g}]"
