"""Fingerprints of checkpoints: a change of any tensor's sampled bytes or of a header is noticed."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_runtime.errors import CheckpointError
from moe_runtime.parallel import fingerprint
from moe_runtime.parallel.fingerprint import BLOCK, checkpoint_fingerprint, sampled_blocks
from moe_runtime.parallel.shards import open_source
from moe_runtime.safetensors_index import CheckpointFiles, open_checkpoint
from tiny import FORMS, TinyCheckpoints, tiny_model


def test_fingerprints_tell_trainings_apart(
    writable_checkpoints: TinyCheckpoints, tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    same = open_source(tiny_checkpoints.fused).fingerprint()
    assert open_source(writable_checkpoints.fused).fingerprint() == same
    torch.manual_seed(5)
    other = tiny_model()
    for parameter in other.parameters():
        parameter.data.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    assert open_source(tmp_path / "other").fingerprint() != same
    assert (
        open_source(tiny_checkpoints.fused).spec.fingerprint
        == open_source(tmp_path / "other").spec.fingerprint
    )


def printed(paths: list[str]) -> str:
    return checkpoint_fingerprint(open_checkpoint(paths), "structure")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two shards with tensors short and long, an empty one among them."""
    folder = tmp_path_factory.mktemp("shards")
    paths = []
    for shard in range(2):
        tensors = {
            f"{shard}.{name}": torch.arange(count, dtype=torch.int16) + shard
            for name, count in (("none", 0), ("short", 10), ("block", 2048), ("long", 90_000))
        }
        tensors[f"{shard}.stacked"] = torch.ones(5, 60, 100, dtype=torch.int16)
        paths.append(str(folder / f"{shard}.safetensors"))
        save_file(tensors, paths[-1], metadata={"format": "pt"})
    return paths


def flipped(path: str, at: int, work: Callable[[], str]) -> str:
    """What `work` says while a byte of the file is another."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
        file.flush()
        try:
            return work()
        finally:
            file.seek(at)
            file.write(bytes([byte]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_in_any_tensors_block_is_noticed(
    shards: list[str], data: st.DataObject
) -> None:
    files = open_checkpoint(shards)
    name = data.draw(st.sampled_from(sorted(n for n, one in files.tensors.items() if one.nbytes)))
    entry = files.tensors[name]
    blocks = sampled_blocks(entry)
    parts = 5 if name.endswith("stacked") else 1
    assert len(blocks) == parts
    size = entry.nbytes // parts
    for part, (offset, count) in enumerate(blocks):
        start = entry.offset + part * size
        assert start <= offset
        assert offset + count <= start + size
        assert count == min(BLOCK, size)
    offset, count = data.draw(st.sampled_from(blocks))
    at = offset + data.draw(st.integers(0, count - 1))
    assert flipped(shards[entry.file], at, lambda: printed(shards)) != printed(shards)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_has_its_tensors_looked_at(
    tiny_checkpoints: TinyCheckpoints, form: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoints.form(form), copy)
    source = open_source(copy)
    before = source.fingerprint()
    for entry in list(source.files.tensors.values())[::7]:
        at = sum(sampled_blocks(entry)[-1]) - 1
        assert flipped(source.files.paths[entry.file], at, source.fingerprint) != before
    assert source.fingerprint() == before == open_source(copy).fingerprint()


def rewritten(path: str, to: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """A copy of a shard with another header of the same length, and the same bytes after it."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(change(json.loads(data[8 : 8 + length])), separators=(",", ":")).encode()
    assert len(header) <= length
    to.write_bytes(data[:8] + header.ljust(length) + data[8 + length :])
    return str(to)


def test_the_whole_header_counts(shards: list[str], tmp_path: Path) -> None:
    first, second = shards

    def swapped(header: dict[str, Any]) -> dict[str, Any]:
        """Names, shapes and all bytes stay; two tensors of one form change places."""
        header["0.a"], header["0.b"] = header["0.b"], header["0.a"]
        return header

    def noted(header: dict[str, Any]) -> dict[str, Any]:
        return header | {"__metadata__": {"format": "tp"}}

    same = tmp_path / "same.safetensors"
    save_file({f"0.{n}": torch.full((3000,), 7) for n in "ab"}, same)
    changed = rewritten(str(same), tmp_path / "changed.safetensors", swapped)
    assert printed([str(same)]) != printed([changed])
    other = rewritten(first, tmp_path / "other.safetensors", noted)
    assert printed([first, second]) != printed([other, second])
    assert printed([first, second]) != printed([second, first])


def test_what_is_read_has_a_bound(
    shards: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    many = str(tmp_path / "many.safetensors")
    save_file({f"{at:04}": torch.full((4,), at) for at in range(1000)}, many)
    counted: list[int] = []
    plain = os.pread

    def count(file: int, length: int, offset: int) -> bytes:
        counted.append(length)
        return plain(file, length, offset)

    monkeypatch.setattr(os, "pread", count)
    printed([many])
    headers = 2
    assert 1000 <= len(counted) <= 1000 + 64 + headers
    counted.clear()
    monkeypatch.setattr(fingerprint, "MOST_BLOCKS", 100)
    printed([many])
    assert len(counted) <= 100 + 64 + headers
    assert all(length <= BLOCK for length in counted[headers:])


def test_a_file_that_was_cut_off_meanwhile_is_named(shards: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    shutil.copy(shards[0], path)
    files: CheckpointFiles = open_checkpoint([str(path)])
    os.truncate(path, path.stat().st_size // 8)
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: .* was cut off"):
        checkpoint_fingerprint(files, "structure")
