"""The disk as measured: files that stay or go away, refusals, and disks that are full or fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_runtime.hardware import (
    disk,
)

MIB = 1 << 20


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "READ_SIZES", (4096, MIB))
    monkeypatch.setattr(disk, "READ_THREADS", (1, 2))
    monkeypatch.setattr(disk, "_WINDOW_SECONDS", 0.002)
    # A busy disk is measured as well, and whole; whoever wants it too slow says so.
    monkeypatch.setattr(disk, "_WRITE_SECONDS", 600.0)
    monkeypatch.setitem(disk.measure_disk.__kwdefaults__, "limit_seconds", 600.0)


def the_only_note(measured: disk.DiskMeasured) -> str:
    (note,) = measured.notes
    return f"{note.what}: {note.why}"


@pytest.mark.usefixtures("quick")
def test_a_folder_is_measured_by_a_file_that_goes_away(tmp_path: Path) -> None:
    shares: list[float] = []
    measured = disk.measure_disk(tmp_path, file_bytes=8 * MIB, progress=shares.append)
    assert measured.facts is not None
    assert measured.facts.file_bytes == 8 * MIB
    assert not measured.facts.existing
    assert {(r.nbytes, r.threads) for r in measured.reads} == {
        (size, threads) for size in (4096, MIB) for threads in (1, 2)
    }
    for read in measured.reads:
        # One thread cannot bring more than its reads, one after another, do.
        assert read.rate.low <= read.threads * read.nbytes / read.seconds.low * 1.01
        assert read.rate.samples == 3
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_shard_that_is_there_is_read_and_stays(tmp_path: Path) -> None:
    (tmp_path / "small.safetensors").write_bytes(bytes(10))
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(os.urandom(9 * MIB))
    before = shard.read_bytes()
    for path in (tmp_path, shard):
        facts = disk.measure_disk(path).facts
        assert facts is not None
        assert facts.existing
        assert facts.file_bytes == 9 * MIB
    assert shard.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM])
def test_where_direct_reads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    plain = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return plain(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    measured = disk.measure_disk(tmp_path, file_bytes=8 * MIB)
    assert measured.facts is not None
    assert not measured.facts.direct
    assert len(measured.reads) == 4
    assert the_only_note(measured).startswith(f"direct reads: {tmp_path}: {os.strerror(code)}")


@pytest.mark.usefixtures("quick")
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, file_bytes: int) -> None:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_fill", full)
        measured = disk.measure_disk(tmp_path)
        assert (measured.facts, measured.reads) == (None, ())
        assert "the disk is full" in the_only_note(measured)
        assert list(tmp_path.iterdir()) == []
    for free, file_bytes in ((4 * MIB, None), (20 * MIB, 10 * MIB)):
        monkeypatch.setattr(
            "shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free, total=free)
        )
        measured = disk.measure_disk(tmp_path)
        assert (measured.facts and measured.facts.file_bytes) == file_bytes
        assert ("full" if file_bytes is None else "10.00 MiB") in the_only_note(measured)


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> tuple[int, str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert (
        the_only_note(disk.measure_disk(tmp_path)) == f"disk reads: {tmp_path}: Permission denied"
    )


@pytest.mark.usefixtures("quick")
def test_a_disk_that_fails_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = os.preadv, [0]

    def failing(fd: int, buffers: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    measured = disk.measure_disk(tmp_path, file_bytes=8 * MIB)
    assert os.strerror(errno.EIO) in the_only_note(measured)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_slow_disk_is_measured_in_part(tmp_path: Path) -> None:
    measured = disk.measure_disk(tmp_path, file_bytes=8 * MIB, limit_seconds=0.0)
    assert len(measured.reads) == 1
    assert "too slow" in the_only_note(measured)
    (tmp_path / "tiny").write_bytes(bytes(100))
    assert "only 100 bytes" in the_only_note(disk.measure_disk(tmp_path / "tiny"))


@pytest.mark.usefixtures("quick")
def test_what_is_no_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0, total=0))
        assert "nothing can be stored" in the_only_note(disk.measure_disk(tmp_path))
    monkeypatch.setattr(disk, "mount_of", lambda path: ("/dev/shm", "tmpfs"))
    measured = disk.measure_disk(tmp_path, file_bytes=8 * MIB)
    assert "memory was measured" in the_only_note(measured)
    assert measured.reads
