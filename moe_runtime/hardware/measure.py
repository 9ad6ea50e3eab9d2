"""Measuring a machine: everything in turn, a few seconds in all, what fails as a note.

Knows no way of measuring itself, and no files but the one that is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from moe_runtime.core import format_bytes
from moe_runtime.errors import ConfigError
from moe_runtime.hardware.cache import machine_key
from moe_runtime.hardware.compute import copy_times, device_memory_rates, expert_times
from moe_runtime.hardware.curves import falls
from moe_runtime.hardware.devices import find_devices
from moe_runtime.hardware.disk import FILE_BYTES, measure_disk
from moe_runtime.hardware.host import host_facts, memory_rates
from moe_runtime.hardware.values import (
    CopyTime,
    DiskRead,
    ExpertShape,
    ExpertTime,
    HardwareProfile,
    MemoryRate,
    Note,
)

__all__ = ["Progress", "doubts", "measure_hardware"]

_NOISE = 0.2  # a time that falls by less than this with more work is noise


class Progress(Protocol):
    """Told what is being measured, and which share of all is done (0 to 1)."""

    def __call__(self, what: str, share: float) -> None: ...


def measure_hardware(
    *,
    path: str | os.PathLike[str],
    expert: ExpertShape | None = None,
    file_bytes: int = FILE_BYTES,
    progress: Progress | None = None,
) -> HardwareProfile:
    """Measure host, disk and every GPU that PyTorch can use. Takes a few seconds.

    The GPU's part (copies, memory, experts) has not yet been run on a GPU.

    Args:
        path: what the disk is measured by: a folder (its largest safetensors file, or a temporary
            one of `file_bytes`, removed afterwards) or a file.
        expert: the MLP that compute is timed with.
        progress: called before each part, and while the disk is read.

    Raises:
        ConfigError: `path` does not exist (a bad argument; what fails on the way is in `notes`).
    """
    folder = Path(path)
    if not folder.exists():
        raise ConfigError(f"{folder}: no such file or folder; give one on the disk to measure")
    expert = expert or ExpertShape()
    tell = progress or _silent
    began = time.perf_counter()
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0
    tell("devices", 0.0)
    devices, notes = find_devices()
    found = _Found(notes=notes)
    usable = [torch.device(device.cuda) for device in devices if device.cuda]
    share = 1 / (3 + 3 * len(usable))
    tell("host memory", 0.0)
    with _noting("host memory rate", found.notes):
        found.memory += memory_rates()
    tell("disk", share)
    disk = measure_disk(
        folder,
        file_bytes=file_bytes,
        progress=lambda done: tell("disk", (1 + done) * share),
    )
    tell("experts on the host", 2 * share)
    with _noting("experts on the host", found.notes):
        found.experts += expert_times(torch.device("cpu"), expert)
    for number, device in enumerate(usable):
        _measure_device(device, expert, found, tell, 3 * (1 + number) * share, share)
    profile = HardwareProfile(
        machine=machine_key(),
        measured=measured,
        seconds=round(time.perf_counter() - began, 3),
        load_average=load,
        host=host_facts(),
        devices=tuple(devices),
        disk=disk.facts,
        expert=expert,
        memory=tuple(found.memory),
        reads=disk.reads,
        copies=tuple(found.copies),
        experts=tuple(found.experts),
        notes=(*found.notes, *disk.notes),
    )
    tell("done", 1.0)
    return replace(profile, notes=(*profile.notes, *doubts(profile)))


@dataclass(kw_only=True)
class _Found:
    """What has been measured so far; what a part that fails had measured before stays."""

    notes: list[Note]
    memory: list[MemoryRate] = field(default_factory=list)
    copies: list[CopyTime] = field(default_factory=list)
    experts: list[ExpertTime] = field(default_factory=list)


def _measure_device(
    device: torch.device,
    expert: ExpertShape,
    found: _Found,
    tell: Progress,
    done: float,
    share: float,
) -> None:
    """The three parts of a device, each of which is `share` of all."""
    for pinned in (True, False):
        tell(f"copies to {device}", done)
        kind = "pinned" if pinned else "pageable"
        with _noting(f"copies from {kind} memory to {device}", found.notes):
            found.copies += copy_times(device, pinned=pinned)
    tell(f"memory of {device}", done + share)
    with _noting(f"memory of {device}", found.notes):
        found.memory += device_memory_rates(device)
    tell(f"experts on {device}", done + 2 * share)
    with _noting(f"experts on {device}", found.notes):
        found.experts += expert_times(device, expert)


def _silent(what: str, share: float) -> None:
    pass


@contextmanager
def _noting(what: str, notes: list[Note]) -> Iterator[None]:
    """What a machine cannot do becomes a note; PyTorch says so by a RuntimeError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        why = str(error).strip().split("\n", 1)[0] or type(error).__name__
        notes.append(Note(what=what, why=why))


def doubts(profile: HardwareProfile) -> list[Note]:
    """Measurements that cannot be right, one by another: most likely something else was at work.

    More bytes or tokens in less time, and copies faster than their link.
    """
    found: list[Note] = []

    def check(what: str, unit: Callable[[float], str], points: list[tuple[float, float]]) -> None:
        for less, more in falls(points, by=_NOISE):
            why = f"{unit(more)} took less time than {unit(less)}; measure again when it is quiet"
            found.append(Note(what=f"doubtful: {what}", why=why))

    for threads in sorted({read.threads for read in profile.reads}):
        check(f"disk reads by {threads} threads", format_bytes, _reads(profile.reads, threads))
    for place in sorted({one.place for one in profile.experts}):
        times = [(float(t.tokens), t.seconds.median) for t in profile.experts if t.place == place]
        check(f"experts on {place}", lambda count: f"{count:.0f} tokens", times)
    for place, pinned in sorted({(copy.place, copy.pinned) for copy in profile.copies}):
        chosen = [c for c in profile.copies if (c.place, c.pinned) == (place, pinned)]
        kind = "pinned" if pinned else "pageable"
        check(
            f"copies from {kind} memory to {place}",
            format_bytes,
            [(float(copy.nbytes), copy.seconds.median) for copy in chosen],
        )
        device = profile.device(place)
        most = device and device.link_bytes_per_second
        rate = max(copy.nbytes / copy.seconds.median for copy in chosen)
        if most and rate > 1.1 * most:
            why = f"{rate / 1e9:.1f} GB/s measured, but the link carries {most / 1e9:.1f}"
            found.append(Note(what=f"doubtful: copies to {place}", why=why))
    return found


def _reads(reads: tuple[DiskRead, ...], threads: int) -> list[tuple[float, float]]:
    return [(float(r.nbytes), r.seconds.median) for r in reads if r.threads == threads]
