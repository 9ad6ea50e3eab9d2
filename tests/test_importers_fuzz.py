"""Damaged recordings: only our errors come out, quickly, and nothing is left behind."""

from __future__ import annotations

import contextlib
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recordings as known
from moe_runtime import TraceError
from moe_runtime.importers import Facts, detect, import_recording

FACTS = Facts(hidden_layers=known.LAYERS, experts=(known.EXPERTS,), top_k=known.TOP_K)
SECONDS, BYTES = 10.0, 64 << 20  # for files of some kilobytes
QUICKLY = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = ["-1", "99999999999999999999", "1e400", "NaN", "null", "[]", "{}", '""', "65535", "true"]


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's bytes with bits flipped, parts cut, doubled, put in, or numbers changed."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["flip", "cut", "end", "insert", "set", "double", "number"]))
        if kind == "flip" and at < len(content):
            bit = 1 << draw(st.integers(0, 7))
            content = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + length :]
        elif kind == "end":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(max_size=40)) + content[at:]
        elif kind == "set":
            value = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * length
            content = content[:at] + value + content[at + length :]
        elif kind == "double":
            content = content[: at + length] + content[at : at + length] + content[at + length :]
        else:  # the next number of a text becomes another
            digits = [
                i for i in range(at, min(at + 200, len(content))) if chr(content[i]).isdigit()
            ]
            if digits:
                start = digits[0]
                stop = start
                while stop < len(content) and chr(content[stop]).isdigit():
                    stop += 1
                number = draw(st.sampled_from(NUMBERS)).encode()
                content = content[:start] + number + content[stop:]
    return content


@pytest.fixture(scope="module", params=known.WRITERS)
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(form, files of a recording, one of which can be damaged)."""
    form, write = known.WRITERS[request.param]
    folder = tmp_path_factory.mktemp("fuzz")
    paths = write(folder, known.known_trace(4))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "raw" not in p.name)
    return form, paths, files


def attempt(form: str, paths: list[Path], out: Path) -> None:
    """Import; TraceError alone may come out, and then nothing is left."""
    began = time.thread_time()  # of this thread alone: the machine may be busy, the disk slow
    expected = []
    with contextlib.suppress(TraceError):
        detect(paths[0])
        expected = [import_recording(paths, out / "x", form=form, facts=FACTS).path.name]
    assert [path.name for path in out.glob("*")] == expected
    shutil.rmtree(out, ignore_errors=True)
    assert time.thread_time() - began < SECONDS


@QUICKLY
@given(data=st.data())
def test_mutated_files_raise_our_errors_only(
    recording: Any, data: st.DataObject, tmp_path: Path
) -> None:
    form, paths, files = recording
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    try:
        file.write_bytes(data.draw(damage(whole)))
        attempt(form, paths, tmp_path / "out")
    finally:
        file.write_bytes(whole)


@QUICKLY
@given(content=st.binary(max_size=400))
def test_random_bytes_raise_our_errors_only(recording: Any, content: bytes, tmp_path: Path) -> None:
    form, paths, files = recording
    whole = files[0].read_bytes()
    try:
        files[0].write_bytes(content)
        attempt(form, paths, tmp_path / "out")
    finally:
        files[0].write_bytes(whole)


@settings(QUICKLY, max_examples=25)
@given(data=st.data())
def test_damage_never_makes_room_for_what_is_not_there(
    recording: Any, data: st.DataObject, tmp_path: Path
) -> None:
    form, paths, files = recording
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    tracemalloc.start()
    try:
        file.write_bytes(data.draw(damage(whole)))
        attempt(form, paths, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        file.write_bytes(whole)
    assert peak < BYTES


@pytest.mark.parametrize("name", known.WRITERS)
def test_every_form_survives_being_cut_anywhere(name: str, tmp_path: Path) -> None:
    form, write = known.WRITERS[name]
    paths = write(tmp_path, known.known_trace(4))
    file = paths[0] / "rank1.safetensors" if paths[0].is_dir() else paths[0]
    whole = file.read_bytes()
    for part in range(12):
        file.write_bytes(whole[: len(whole) * part // 12])
        attempt(form, paths, tmp_path / "out")
