"""`moe-runtime hardware`: this machine measured, kept, and shown.

Does not know how anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from moe_runtime.cli.options import DebugOption, JsonOption
from moe_runtime.cli.session import emit_json, session, to_stderr
from moe_runtime.core import format_bytes
from moe_runtime.errors import ConfigError
from moe_runtime.hardware import ExpertShape, HardwareProfile

__all__ = ["hardware"]


def _shape(text: str) -> tuple[int, int]:
    """Two sizes of a text like `2048,768`; wrong usage otherwise."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not hidden,intermediate, like 2048,768")
    return int(parts[0]), int(parts[1])


def hardware(
    path: Annotated[
        Path | None,
        typer.Option(
            "--path",
            metavar="DIR",
            help="Where to measure the disk: a checkpoint's folder (a shard of it is read), or "
            "any other (a temporary file of 128 MiB). Without it, where the profile is kept.",
        ),
    ] = None,
    expert_shape: Annotated[
        str | None,
        typer.Option(
            "--expert-shape",
            metavar="HIDDEN,INTERMEDIATE",
            help="The expert that compute is timed with: 2048,768 unless given.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Its type: bfloat16 unless given, float16, float32."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again, whatever has been kept.")
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="DIR",
            help="Keep the profile here, not in the user's cache folder.",
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure this machine: memory, disk, links, and experts on host and devices.

    Takes a few seconds once; the profile is kept for each kind of machine and shown the next time,
    unless another disk, expert or GPU is asked for. What cannot be measured is listed with the
    reason. The GPU's part has not yet been run on a GPU.

    Example:  [bold]moe-runtime hardware --path ./olmoe --expert-shape 2048,1024[/bold]
    """
    shape = None if expert_shape is None else _shape(expert_shape)
    with session(as_json=as_json, debug=debug):
        from moe_runtime.hardware import cached_path, profile_to_dict

        kept = cached_path(cache_dir)
        wanted = _wanted(shape, dtype)
        profile = None if refresh else _fitting(kept, path, shape, dtype)
        fresh = profile is None
        if profile is None:
            profile, file = _measure(kept, path, wanted)
        else:
            file = str(kept)
        if as_json:
            emit_json({**profile_to_dict(profile), "file": file, "fresh": fresh})
        else:
            _print(profile, file, fresh=fresh)


def _wanted(shape: tuple[int, int] | None, dtype: str | None) -> ExpertShape:
    usual = ExpertShape()
    hidden, intermediate = shape or (usual.hidden, usual.intermediate)
    return ExpertShape(hidden=hidden, intermediate=intermediate, dtype=dtype or usual.dtype)


def _fitting(
    kept: Path, path: Path | None, shape: tuple[int, int] | None, dtype: str | None
) -> HardwareProfile | None:
    """The profile that is kept, if it answers what is asked; why it does not on standard error."""
    from moe_runtime.hardware import cached_profile
    from moe_runtime.hardware.devices import find_devices
    from moe_runtime.hardware.disk import mount_of

    try:
        profile = cached_profile(kept.parent)
    except ConfigError as error:
        to_stderr().print(f"{escape(str(error))}; measuring again", soft_wrap=True)
        return None
    if profile is None:
        return None
    expert, disk = profile.expert, profile.disk
    found, _ = find_devices()
    reasons = {
        "another disk": path is not None and (disk is None or mount_of(path)[0] != disk.mount),
        "another expert": (shape or (expert.hidden, expert.intermediate), dtype or expert.dtype)
        != ((expert.hidden, expert.intermediate), expert.dtype),
        "other GPUs": [(d.name, d.cuda, d.memory_bytes) for d in found]
        != [(d.name, d.cuda, d.memory_bytes) for d in profile.devices],
    }
    other = [reason for reason, holds in reasons.items() if holds]
    if other:
        to_stderr().print(f"the profile kept is of {' and '.join(other)}; measuring again")
    return None if other else profile


def _measure(
    kept: Path, path: Path | None, expert: ExpertShape
) -> tuple[HardwareProfile, str | None]:
    """(a new profile, the file that it is kept in; None if it could not be kept)."""
    from moe_runtime.hardware import measure_hardware, save_profile

    folder = kept.parent if path is None else path
    if path is None:
        # Without a home that can be written to, the working folder's disk is as good.
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = Path()
    with _bar() as tell:
        profile = measure_hardware(path=folder, expert=expert, progress=tell)
    try:
        return profile, str(save_profile(profile, kept))
    except OSError as error:
        to_stderr().print(f"not kept: {escape(str(error))}; give --cache-dir", soft_wrap=True)
        return profile, None


@contextmanager
def _bar() -> Iterator[Any]:
    """Progress on standard error, where that is a terminal."""
    console = to_stderr()
    columns = (TextColumn("{task.description:<28}"), BarColumn(bar_width=24))
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("measuring", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def _print(profile: HardwareProfile, file: str | None, *, fresh: bool) -> None:
    console = Console(highlight=False)
    host = profile.host
    console.print(
        f"[bold]{escape(host.processor)}[/bold]  {host.cores} cores, "
        f"{format_bytes(host.memory_bytes)}, last-level cache {format_bytes(host.cache_bytes)}"
    )
    for device in profile.devices:
        link = device.link_bytes_per_second
        parts = [f"{device.cuda or 'not usable'}", format_bytes(device.memory_bytes)]
        parts += [f"link {link / 1e9:.1f} GB/s by its form"] if link else []
        parts += [f"{device.peer_links} NVLinks"] if device.peer_links else []
        console.print(f"[bold]{escape(device.name)}[/bold]  {', '.join(parts)}")
    if profile.disk is not None:
        disk = profile.disk
        how = "direct reads" if disk.direct else "buffered reads"
        source = "a file there" if disk.existing else "a temporary file"
        console.print(
            f"[bold]{escape(disk.path)}[/bold]  {disk.filesystem} at {escape(disk.mount)}, {how} "
            f"of {source}, {format_bytes(disk.file_bytes)}",
            soft_wrap=True,
        )
    for table in (_memory(profile), _disk(profile), _copies(profile), _experts(profile)):
        if table.row_count:
            # Rich would wrap a title at the table's width.
            console.print(f"\n[bold]{table.title}[/bold]", soft_wrap=True)
            table.title = None
            console.print(table)
    if profile.notes:
        console.print("\n[bold]not measured, or doubtful[/bold]")
    for note in profile.notes:
        console.print(f"  {escape(note.what)}: {escape(note.why)}", soft_wrap=True)
    when = "measured now" if fresh else f"measured {profile.measured}"
    kept = f", kept in {file}" if file else ", not kept"
    console.print(
        f"\n{when} in {profile.seconds:.1f} s at load {profile.load_average}{escape(kept)}; "
        "medians, in brackets lowest to highest",
        style="dim",
        soft_wrap=True,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    return table


def _memory(profile: HardwareProfile) -> Table:
    table = _table("memory", "place", "threads", "kind", "GB/s", "")
    for row in profile.memory:
        rate = row.rate
        table.add_row(
            row.place,
            str(row.threads),
            row.kind,
            f"{rate.median / 1e9:.1f}",
            f"({rate.low / 1e9:.1f} to {rate.high / 1e9:.1f})",
        )
    return table


def _disk(profile: HardwareProfile) -> Table:
    threads = sorted({read.threads for read in profile.reads})
    heads = [f"{count} thread{'s' * (count > 1)}" for count in threads]
    table = _table("disk, random reads: GB/s (ms a read)", "size", *heads)
    found = {(read.nbytes, read.threads): read for read in profile.reads}
    for nbytes in sorted({read.nbytes for read in profile.reads}):
        cells = []
        for count in threads:
            read = found.get((nbytes, count))
            cells.append(
                f"{read.rate.median / 1e9:.2f} ({read.seconds.median * 1e3:.2f})" if read else "-"
            )
        table.add_row(format_bytes(nbytes), *cells)
    return table


def _copies(profile: HardwareProfile) -> Table:
    table = _table("copies to a device", "place", "memory", "size", "GB/s", "ms", "")
    for copy in profile.copies:
        seconds = copy.seconds
        table.add_row(
            copy.place,
            "pinned" if copy.pinned else "pageable",
            format_bytes(copy.nbytes),
            f"{copy.nbytes / seconds.median / 1e9:.2f}",
            f"{seconds.median * 1e3:.3f}",
            f"({seconds.low * 1e3:.3f} to {seconds.high * 1e3:.3f})",
        )
    return table


def _experts(profile: HardwareProfile) -> Table:
    expert = profile.expert
    size = format_bytes(expert.nbytes)
    title = f"an expert of {expert.hidden} x {expert.intermediate}, {expert.dtype}, {size}"
    if any(time.place == "host" for time in profile.experts):
        title += f" (host: {profile.host.compute_threads} threads)"
    table = _table(title, "place", "tokens", "ms", "", "GB/s of weights")
    for time in profile.experts:
        seconds = time.seconds
        table.add_row(
            time.place,
            str(time.tokens),
            f"{seconds.median * 1e3:.3f}",
            f"({seconds.low * 1e3:.3f} to {seconds.high * 1e3:.3f})",
            f"{expert.nbytes / seconds.median / 1e9:.1f}",
        )
    return table
