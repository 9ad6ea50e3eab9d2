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

from moe_runtime.placement.bake_copy import Patch, copy_whole, write_patched
from moe_runtime.placement.bake_patches import expert_patches, indexed_patches, moves
from moe_runtime.placement.bake_record import RECORD_FILE, BakeRecord
from moe_runtime.placement.bake_rules import find_group_limits, find_indexed
from moe_runtime.placement.bake_source import BakeSource, other_files, relative_name
from moe_runtime.placement.plan import PathLike, Plan

from moe_runtime.core import IntArray, format_bytes
from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.version import __version__

__all__ = ["Bake", "bake"]

_SPARE_BYTES = 16 << 20  # beside the files: folders, the record, rounding up to blocks

Progress = Callable[[int, int], None]


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
    copies, left_behind = other_files(source)
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
    for number, shard in enumerate(source.files.paths):
        target = folder / relative_name(source, shard)
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
