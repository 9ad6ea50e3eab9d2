"""Baking: a checkpoint with its experts in a plan's order, so that contiguous blocks are the plan.

Copies bytes from file to file and computes nothing. Does not know how a plan is found, nor engines.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.placement.bake_copy import Patch, copy_whole, write_patched
from moe_runtime.placement.bake_patches import expert_patches, indexed_patches, moves
from moe_runtime.placement.bake_record import RECORD_FILE, BakeRecord
from moe_runtime.placement.bake_rules import find_group_limits, find_indexed
from moe_runtime.placement.plan import PathLike, Plan
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from moe_runtime.checkpoint import ExpertMap, map_experts
from moe_runtime.core import IntArray, format_bytes
from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.loading import build_structure, read_config, resolve_class
from moe_runtime.model_spec import MoESpec
from moe_runtime.safetensors_index import (
    HUB_OPTIONS,
    CheckpointFiles,
    open_checkpoint,
    resolve_shards,
)
from moe_runtime.version import __version__

__all__ = ["Bake", "BakeSource", "bake", "open_source"]

# Files that hold weights: of other forms they would keep the old order, so they are left behind.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".onnx", ".npz", ".index.json", ".safetensors.index", ".ot"),
)
# What a checkpoint on the hub may have beside its weights, and what loading it may want.
_SIDE_FILES = (
    *("config.json", "generation_config.json", "README.md", "LICENSE", RECORD_FILE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
_SPARE_BYTES = 16 << 20  # beside the files: folders, the record, rounding up to blocks

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class BakeSource:
    """A checkpoint opened for baking: its structure and where everything lies; no weights.

    Args:
        folder: where its files lie.
        variant: as transformers takes it.
        files: its shards.
        model: its skeleton on the meta device, built from `config`.
        keys: names of all parameters and buffers.
        spec, experts: its MoE layers, and the byte ranges of their experts.
    """

    path_or_id: str
    folder: Path
    variant: str | None
    files: CheckpointFiles
    config: PreTrainedConfig
    model: PreTrainedModel
    keys: tuple[str, ...]
    spec: MoESpec
    experts: ExpertMap

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(os.path.getsize(path) for path in self.files.paths)


@dataclass(frozen=True, kw_only=True)
class Bake:
    """What was baked.

    Args:
        folder: the new checkpoint.
        experts_moved, experts: how many stand at another place than before, and of how many.
        tensors: tensors rewritten beside the experts: routers, biases, scales, tables.
        shards, nbytes: files with weights, and bytes of all files.
        left_behind: files of the source with weights in other forms; they were not copied.
        record: the order of the experts, also in the folder.
    """

    folder: Path
    experts_moved: int
    experts: int
    tensors: int
    shards: int
    nbytes: int
    left_behind: tuple[str, ...]
    record: BakeRecord


def open_source(
    path_or_id: PathLike, *, auto_class: str | None = None, **options: Any
) -> BakeSource:
    """Open a checkpoint: configuration and headers.

    Args:
        auto_class: as `moe_runtime.from_pretrained` takes it.
        options: which revision, subfolder or variant, as transformers takes them.

    Raises:
        CheckpointError: files are missing or damaged.
        UnsupportedModelError: quantised, no MoE model, or stored in a way that is not understood.
    """
    path_or_id = os.fspath(path_or_id)
    config = read_config(path_or_id, options)
    cls = resolve_class(config, auto_class)
    variant = options.get("variant")
    named = {name: value for name, value in options.items() if name != "variant"}
    files = open_checkpoint(resolve_shards(path_or_id, variant=variant, **named))
    model, structure = build_structure(cls, config, getattr(config, "dtype", None))
    spec = structure.of()
    return BakeSource(
        path_or_id=path_or_id,
        folder=_folder(path_or_id, options),
        variant=variant,
        files=files,
        config=config,
        model=model,
        keys=tuple(structure.keys),
        spec=spec,
        experts=map_experts(model, spec, files, structure.keys),
    )


def _folder(path_or_id: str, options: dict[str, Any]) -> Path:
    """Where a checkpoint's files lie; those of one on the hub are fetched."""
    if os.path.isdir(path_or_id):
        return Path(path_or_id, options.get("subfolder") or "")
    hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    for name in _SIDE_FILES:
        cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False, **hub)
    config = cached_file(path_or_id, "config.json", **hub)
    assert config is not None, "it has been read"
    return Path(config).parent


def bake(
    source: BakeSource,
    plan: Plan,
    out: PathLike,
    *,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Bake:
    """Write a checkpoint that computes the same and has each layer's experts in the plan's order.

    The first E / G places of a layer are the experts of device 0, the next those of device 1, and
    so on: an engine that deals experts out to G devices in contiguous blocks runs the plan. Names,
    shapes, dtypes and shards stay as they are.

    Args:
        plan: one with equal counts and no replicas, for this model.
        out: the folder to make. It must not exist, or be empty.
        progress: told (bytes done, bytes in all) while writing.
        check: called with the finished folder under its temporary name; if it raises, nothing is
            kept.

    Raises:
        PlanError: the plan is for another model, has replicas or unequal counts, or breaks the
            groups that a router chooses among.
        UnsupportedModelError: it cannot be told what goes with the order of the experts.
        CheckpointError: files are missing or damaged.
        ConfigError: `out` is taken, inside the source, or on a disk that is too full.
    """
    out = Path(out)
    spec = source.spec
    permutations = _permutations(source, plan)
    _require_place(source, out)
    patches = expert_patches(spec, source.experts, permutations)
    indexed = find_indexed(type(source.model), source.config, source.model, spec)
    rewrites = indexed_patches(
        source.model, spec, source.experts, source.files, source.keys, indexed, permutations
    )
    record = _record(source, plan, permutations)
    copies, left_behind = _other_files(source)
    total = source.nbytes + sum(path.stat().st_size for path in copies.values())
    _require_space(out, total)
    with _made_at(out) as folder:
        _write(source, folder, _merged(patches, rewrites), copies, total, progress)
        record.save(folder)
        if check is not None:
            check(folder)
    return Bake(
        folder=out,
        experts_moved=sum(int((order != range(len(order))).sum()) for order in permutations),
        experts=spec.grid.size,
        tensors=sum(len(found) for found in rewrites.values()),
        shards=len(source.files.paths),
        nbytes=total,
        left_behind=left_behind,
        record=record,
    )


def _permutations(source: BakeSource, plan: Plan) -> list[IntArray]:
    """For each layer the expert that comes to each place; PlanError where that is wrong."""
    spec = source.spec
    plan.require_model(
        layer_ids=spec.grid.layers,
        experts=spec.grid.experts,
        fingerprint=spec.fingerprint,
        name=source.path_or_id,
    )
    permutations = [plan.permutation(position) for position in range(len(spec.layers))]
    limits = find_group_limits(source.model, spec)
    for layer, permutation, limit in zip(spec.layers, permutations, limits, strict=True):
        if limit is not None and moves(permutation):
            limit.check(layer.layer, permutation)
    return permutations


def _record(source: BakeSource, plan: Plan, permutations: Sequence[IntArray]) -> BakeRecord:
    """The record of this bake, on top of those that the source has had."""
    text = json.dumps(plan.to_dict(), sort_keys=True, separators=(",", ":"))
    bake = {
        "moe_runtime": __version__,
        "plan": {
            "model_id": plan.model_id,
            "devices": plan.devices,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
    }
    spec = source.spec
    before = BakeRecord.load(source.folder) or BakeRecord(
        model_id=source.path_or_id,
        fingerprint=spec.fingerprint,
        permutations={layer.layer: tuple(range(layer.num_experts)) for layer in spec.layers},
        bakes=(),
    )
    experts = {layer: len(order) for layer, order in before.permutations.items()}
    if before.fingerprint != spec.fingerprint or experts != dict(
        zip(spec.grid.layers, spec.grid.experts, strict=True)
    ):
        raise CheckpointError(
            f"{source.folder / RECORD_FILE} is of another model (fingerprint "
            f"{before.fingerprint}, the checkpoint has {spec.fingerprint}); remove it if it does "
            "not belong there"
        )
    return before.then(dict(zip(spec.grid.layers, permutations, strict=True)), bake)


# -- files ---------------------------------------------------------------------------------------


def _other_files(source: BakeSource) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Files to copy, by their name in the folder, and those with weights that are left behind."""
    shards = {_relative(source, path) for path in source.files.paths}
    copies: dict[str, Path] = {}
    left_behind = []
    for path in sorted(source.folder.rglob("*")):
        name = path.relative_to(source.folder)
        text = name.as_posix()
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if text in shards or text == RECORD_FILE:
            continue
        if text.endswith(_WEIGHTS) and not _indexes(path, shards):
            left_behind.append(text)
        else:
            copies[text] = path
    return copies, tuple(left_behind)


def _indexes(path: Path, shards: set[str]) -> bool:
    """Whether a file is the index of these very shards."""
    if path.suffix != ".json":
        return False
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()) == shards
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _relative(source: BakeSource, path: str) -> str:
    return Path(os.path.relpath(path, source.folder)).as_posix()


def _merged(*found: dict[int, list[Patch]]) -> dict[int, list[Patch]]:
    merged: dict[int, list[Patch]] = {}
    for patches in found:
        for number, some in patches.items():
            merged.setdefault(number, []).extend(some)
    return merged


def _write(
    source: BakeSource,
    folder: Path,
    patches: dict[int, list[Patch]],
    copies: dict[str, Path],
    total: int,
    progress: Progress | None,
) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, path in copies.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_whole(path, target, advance)
    for number, path in enumerate(source.files.paths):
        target = folder / _relative(source, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_patched(source.files.paths, number, patches.get(number, []), target, advance)


def _require_place(source: BakeSource, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; give another place")
    inside = source.folder.resolve()
    if inside == out.resolve() or inside in out.resolve().parents:
        raise ConfigError(f"{out} lies inside the checkpoint {inside}; give another place")


def _require_space(out: Path, total: int) -> None:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < total + _SPARE_BYTES:
        raise ConfigError(
            f"the baked checkpoint takes {format_bytes(total)} ({total} bytes), and "
            f"{format_bytes(free)} are free at {place}; make room or give another place"
        )


@contextmanager
def _made_at(out: Path) -> Iterator[Path]:
    """A folder under a temporary name beside `out` that gets its name if all goes well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    if folder.exists():  # of a process of the same number that was killed
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
        os.replace(folder, out)  # over an empty folder too
    finally:
        shutil.rmtree(folder, ignore_errors=True)
