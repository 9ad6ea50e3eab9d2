"""Damaged checkpoints: each is refused by the name of the file or tensor at fault."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_runtime.errors import (
    CheckpointError,
    UnsupportedModelError,
)
from running import generate, load
from tiny import (
    EXPERTS,
    FORMS,
    TinyCheckpoints,
    expert_shard,
)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of the shard with the last experts and write it again."""
    path = expert_shard(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_shard_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, keep: float
) -> None:
    path = expert_shard(writable_checkpoints.form(form))
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(path.parent)


def corrupt(path: Path, kind: str) -> None:
    blob = path.read_bytes()
    length = struct.unpack("<Q", blob[:8])[0]
    header, body = blob[8 : 8 + length], blob[8 + length :]
    if kind == "absurd length":
        path.write_bytes(struct.pack("<Q", 1 << 62) + blob[8:])
    elif kind == "zero bytes":
        path.write_bytes(bytes(len(blob)))
    elif kind == "no JSON":
        path.write_bytes(blob[:8] + b"x" * length + body)
    elif kind == "no text":
        path.write_bytes(blob[:8] + b"\xff" * length + body)
    elif kind == "a list":
        path.write_bytes(blob[:8] + b"[]".ljust(length) + body)
    else:
        fields = json.loads(header)
        name = next(key for key in fields if ".experts." in key)
        if kind == "beyond the end":
            fields[name]["data_offsets"] = [len(body) - 8, len(body) + 8]
        elif kind == "other shape":
            fields[name]["shape"][0] += 1
        elif kind == "negative shape":
            fields[name]["shape"] = [-dimension for dimension in fields[name]["shape"]]
        elif kind == "no dtype":
            del fields[name]["dtype"]
        elif kind == "no fields":
            fields[name] = 7
        text = json.dumps(fields).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("form", ["per_expert", "fused_sharded"])
@pytest.mark.parametrize(
    "kind",
    [
        "absurd length",
        "zero bytes",
        "no JSON",
        "no text",
        "a list",
        "beyond the end",
        "other shape",
        "negative shape",
        "no dtype",
        "no fields",
    ],
)
def test_a_corrupt_header_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, kind: str
) -> None:
    path = expert_shard(writable_checkpoints.form(form))
    corrupt(path, kind)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(path.parent)


@pytest.mark.parametrize("form", ["per_expert_sharded", "fused_sharded"])
def test_an_index_that_names_a_missing_shard_is_refused(
    writable_checkpoints: TinyCheckpoints, form: str
) -> None:
    path = expert_shard(writable_checkpoints.form(form))
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(path.parent)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'],
)
def test_a_damaged_index_is_named(writable_checkpoints: TinyCheckpoints, text: str) -> None:
    folder = writable_checkpoints.per_expert_sharded
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape("model.safetensors.index.json")):
        load(folder)


def test_an_index_cannot_lead_out_of_its_folder(writable_checkpoints: TinyCheckpoints) -> None:
    folder = writable_checkpoints.per_expert_sharded
    path = expert_shard(folder)
    outside = folder.parent / "outside.safetensors"
    path.rename(outside)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(path.name, "../outside.safetensors"))
    with pytest.raises(CheckpointError, match=re.escape("outside.safetensors")):
        load(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extent", ["one tensor", "all experts of the layer"])
def test_a_missing_expert_tensor_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, extent: str
) -> None:
    gone: list[str] = []

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        gone.extend(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)
        del gone[1 if extent == "one tensor" else len(gone) :]
        for key in gone:
            del tensors[key]

    folder = writable_checkpoints.form(form)
    edit(folder, remove)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        fields = json.loads(index.read_text())
        for key in gone:
            del fields["weight_map"][key]
        index.write_text(json.dumps(fields))
    assert gone
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts"):
        load(folder)


def test_a_tensor_that_only_the_index_has_is_refused(
    writable_checkpoints: TinyCheckpoints,
) -> None:
    folder = writable_checkpoints.per_expert_sharded

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)]

    edit(folder, remove)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts"):
        load(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["wider", "longer", "flat", "turned"])
def test_a_misshapen_expert_tensor_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, how: str
) -> None:
    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)
        old = tensors[key]
        tensors[key] = {
            "wider": lambda: torch.nn.functional.pad(old, [0, 1]),
            "longer": lambda: torch.nn.functional.pad(old, [0, 0, 0, 1]),
            "flat": old.flatten,
            "turned": lambda: old.transpose(-1, -2).contiguous(),
        }[how]()

    path = edit(writable_checkpoints.form(form), reshape)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts.*shape|shape.*layers\.3"):
        load(path.parent)


def test_a_fused_tensor_with_an_expert_too_few_is_named(
    writable_checkpoints: TinyCheckpoints,
) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.3.mlp.experts.down_proj"
        tensors[key] = tensors[key][: EXPERTS - 1].clone()

    path = edit(writable_checkpoints.fused, shorten)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj"):
        load(path.parent)


@pytest.mark.parametrize("form", ["per_expert", "fused"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn], ids=str
)
def test_experts_stored_as_no_float_are_refused_by_name(
    writable_checkpoints: TinyCheckpoints, form: str, dtype: torch.dtype
) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)
        tensors[key] = tensors[key].to(dtype)

    path = edit(writable_checkpoints.form(form), convert)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UnsupportedModelError, match=rf"layers\.3\.mlp\.experts.*{kind}"):
        load(path.parent)


@pytest.mark.parametrize("form", ["per_expert", "fused"])
def test_experts_stored_wider_than_the_model_are_converted_on_read(
    writable_checkpoints: TinyCheckpoints,
    form: str,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.3.mlp.experts" in key]:
            tensors[key] = tensors[key].double()

    path = edit(writable_checkpoints.form(form), widen)
    assert torch.equal(generate(load(path.parent, dtype=torch.float32), prompt), eager_tokens)


def test_a_checkpoint_of_pickles_is_refused_and_says_what_to_do(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    torch.save(
        load_file(tiny_checkpoints.fused / "model.safetensors"), tmp_path / "pytorch_model.bin"
    )
    (tmp_path / "config.json").write_bytes((tiny_checkpoints.fused / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_checkpoints.fused / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load(tmp_path)
