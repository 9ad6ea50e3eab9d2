"""Owns what every runner has in common: the task, the teacher-forced loop, the figures it returns.

Does not know any runner. Needs numpy only, so that runners with other environments can import it.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Step = Callable[[int, int], NDArray[np.float32]]
"""(token id, position) -> logits [vocab] of the next token; keeps its own key-value cache."""

SAMPLED_LOGITS = 64
IDS_FILE = "teacher_forced_ids.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one runner process is asked to do. `options` are the runner's own."""

    checkpoint: str
    gguf: str
    start: int  # index of the first teacher-forced id
    warmup: int  # tokens fed before the measured ones, one at a time as well
    tokens: int
    threads: int
    out: str
    options: dict[str, Any] = field(default_factory=dict)

    def ids(self) -> list[int]:
        """The ids to feed and one more, the last one's successor."""
        stored = json.loads((Path(self.checkpoint) / IDS_FILE).read_text())["ids"]
        wanted = self.start + self.warmup + self.tokens + 1
        if wanted > len(stored):
            raise ValueError(f"{IDS_FILE} holds {len(stored)} ids, {wanted} asked for")
        return [int(i) for i in stored[self.start : wanted]]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A runner that is ready: its step, and what to add to the result after the run."""

    step: Step
    extra: Callable[[], dict[str, Any]] = dict
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Of this process, all threads."""

    seconds: float
    read_bytes: int  # fetched from the block device, mapped and direct reads included
    major_faults: int
    minor_faults: int

    @classmethod
    def now(cls) -> Counters:
        lines = Path("/proc/self/io").read_text().splitlines()
        io = dict(line.split(": ") for line in lines)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(
            seconds=time.perf_counter(),
            read_bytes=int(io["read_bytes"]),
            major_faults=usage.ru_majflt,
            minor_faults=usage.ru_minflt,
        )

    def since(self, earlier: Counters) -> dict[str, float]:
        then = asdict(earlier)
        return {name: value - then[name] for name, value in asdict(self).items()}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def describe(logits: NDArray[np.float32], successor: int) -> dict[str, Any]:
    """What is kept of one step's logits, to compare runners by."""
    wide = logits.astype(np.float64)
    top = float(wide.max())
    every = max(1, wide.size // SAMPLED_LOGITS)
    return {
        "argmax": int(wide.argmax()),
        "std": float(wide.std()),
        "loss": top + float(np.log(np.exp(wide - top).sum())) - float(wide[successor]),
        "sampled": [round(float(v), 4) for v in wide[::every][:SAMPLED_LOGITS]],
    }


def teacher_force(step: Step, task: Task) -> dict[str, Any]:
    ids = task.ids()
    seconds: list[float] = []
    steps: list[dict[str, Any]] = []
    start = Counters.now()
    measured_from = start
    for position, (token, successor) in enumerate(itertools.pairwise(ids)):
        if position == task.warmup:
            measured_from = Counters.now()
        began = time.perf_counter()
        logits = step(token, position)
        ended = time.perf_counter()
        if position >= task.warmup:
            seconds.append(ended - began)
        steps.append(describe(logits, successor))
    return {
        "warmup": measured_from.since(start),
        "measured": Counters.now().since(measured_from),
        "token_seconds": seconds,
        "steps": steps,
    }


@contextmanager
def abandoned_with(parent: int) -> Iterator[None]:
    """Ends this process when the harness that started it is gone: nobody would read its result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def serve(open_runner: Callable[[Task], Opened]) -> None:
    """Runs the task named by the first argument (a JSON file) and writes its result file."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    result: dict[str, Any] = {}
    with abandoned_with(os.getppid()):
        try:
            before = Counters.now()
            opened = open_runner(task)
            result["load"] = Counters.now().since(before)
            result["versions"] = versions(opened.packages)
            result |= teacher_force(opened.step, task)
            result["extra"] = opened.extra()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            result["error"] = f"{type(error).__name__}: {error}"
            result["traceback"] = traceback.format_exc()[-4000:]
    write_json(Path(task.out), result)
