"""Ctrl-C at any line of chosen modules, and at no other moment: the same number, the same line.

Knows Python's tracing; not what is interrupted.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

__all__ = ["lines_of", "run_interrupted"]


class _Lines:
    """Counts lines of some files on this thread; at one of them raises KeyboardInterrupt."""

    def __init__(self, modules: Collection[ModuleType], at: int) -> None:
        self._files = {str(Path(str(module.__file__))) for module in modules}
        self._at = at
        self.count = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not _opens_a_block(frame):
            self.count += 1
            if self.count == self._at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt(self.where)
        return self._line


def _opens_a_block(frame: FrameType) -> bool:
    """Whether the line opens or leaves a block, where Python handles no signal.

    Nor would the block that it stands in notice the exception.
    """
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.lstrip().startswith(("with ", "try:"))


def lines_of(work: Callable[[], Any], modules: Collection[ModuleType]) -> int:
    """How many lines of these modules the work runs on this thread."""
    lines = _Lines(modules, at=-1)
    _traced(work, lines)
    return lines.count


def run_interrupted(work: Callable[[], Any], modules: Collection[ModuleType], at: int) -> str:
    """Run the work, with a KeyboardInterrupt at the `at`-th line; "file:line", empty if it ended.

    Raises:
        BaseException: what else came out.
    """
    lines = _Lines(modules, at)
    try:
        _traced(work, lines)
    except KeyboardInterrupt:
        assert lines.where, "an interrupt of another origin"
        return lines.where
    assert not lines.where, f"the interrupt at {lines.where} was swallowed"
    return ""


def _traced(work: Callable[[], Any], lines: _Lines) -> None:
    before = sys.gettrace()
    sys.settrace(lines)
    try:
        work()
    finally:
        sys.settrace(before)
