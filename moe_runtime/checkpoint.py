"""Where each expert's bytes lie in a checkpoint, whatever form the checkpoint has.

Reads transformers' own conversion mapping (renames, merged lists, concatenations, transposes,
interleaved rows) as a recipe of byte ranges, so that one expert can be read in place.
Does not read weights and does not know tiers or budgets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.model_spec import ExpertParam, MoELayer, MoESpec
from moe_runtime.safetensors_index import CheckpointFiles, StoredTensor

__all__ = ["ExpertMap", "Segment", "StoredName", "map_experts", "read_names"]

# Conversions that deal a list of experts out to several expert tensors, each run merged as by
# MergeModulelist and Concatenate.
_DEALING = ("ErnieFuseAndSplitTextVisionExperts",)
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Segment:
    """One contiguous byte range that fills part of one tensor of one expert.

    Args:
        file: number of the shard.
        offset: first byte in the shard.
        dtype: stored dtype.
        shape: shape of the range as stored, `[rows, ...]`.
        param: which tensor of the expert (position in `MoELayer.params`).
        row: first row of the target that it fills.
        transposed: the target is filled through its transpose.
        interleaved: rows alternate between the target's first and second half.
    """

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    param: int
    row: int = 0
    transposed: bool = False
    interleaved: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def target(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of an expert's tensor that this range fills, shaped like `shape` as stored.

        An interleaved range is shaped `[rows / 2, 2, ...]`.
        """
        if self.interleaved:
            halves: torch.Tensor = tensor.unflatten(0, (2, -1))
            return halves.transpose(0, 1)
        view = tensor.transpose(0, 1) if self.transposed else tensor
        return view[self.row : self.row + self.shape[0]]


@dataclass(frozen=True, kw_only=True)
class ExpertMap:
    """The byte ranges of every expert, by layer position and expert number.

    Args:
        paths: the shards.
        segments: `segments[position][expert]`, ordered by file and offset.
        keys: the stored tensors that belong to each layer position, under the names that they have
            in the model before they are merged (the checkpoint's, with transformers' renames).
    """

    paths: tuple[str, ...]
    segments: tuple[tuple[tuple[Segment, ...], ...], ...]
    keys: tuple[Mapping[str, StoredTensor], ...]


# One expert's tensor while the conversion is followed: the ranges that make it, in target rows.
_Pieces = list[Segment]


def map_experts(
    model: PreTrainedModel,
    spec: MoESpec,
    files: CheckpointFiles,
    model_keys: Iterable[str],
    *,
    key_mapping: dict[str, str] | None = None,
) -> ExpertMap:
    """Find every expert of `spec` in `files`.

    Args:
        model: the model, experts left out or not; only its structure is used.
        model_keys: names of all its parameters and buffers, experts included.
        key_mapping: the caller's own renames, as transformers takes them.

    Raises:
        CheckpointError: an expert's tensor is missing or has another shape.
        UnsupportedModelError: stored as something that cannot be read in place.
    """
    wanted = {
        key: (position, number, expert)
        for position, layer in enumerate(spec.layers)
        for number, param in enumerate(layer.params)
        for expert, key in enumerate(layer.keys(param))
    }
    collected, converters, names = _collect(model, files, set(model_keys), wanted, key_mapping)
    segments: list[list[list[Segment]]] = [
        [[] for _ in range(layer.num_experts)] for layer in spec.layers
    ]
    for name, (position, number, expert) in wanted.items():
        layer = spec.layers[position]
        source = collected.get(name)
        if source is None:
            raise CheckpointError(
                f"no tensor for {name} in {_files_text(files)}; "
                "the checkpoint is incomplete or belongs to another model"
            )
        recipe = _Recipe(name, layer, number, files.paths)
        if layer.modules:
            segments[position][expert].append(recipe.alone(expert, source, converters.get(name)))
            continue
        for place, pieces in enumerate(recipe.follow(source, converters.get(name))):
            segments[position][place].extend(pieces)
    return ExpertMap(
        paths=files.paths,
        segments=tuple(
            tuple(tuple(sorted(s, key=lambda one: (one.file, one.offset))) for s in layer)
            for layer in segments
        ),
        keys=tuple(
            {
                names[entry.name]: entry
                for param in layer.params
                for key in layer.keys(param)
                for entries in collected[key].values()
                for entry in entries
            }
            for layer in spec.layers
        ),
    )


@dataclass(frozen=True, slots=True)
class StoredName:
    """Where transformers puts one stored tensor.

    Args:
        entry: the stored tensor.
        target: the model tensor that it goes into, alone or merged with others; the first one where
            a conversion makes several. No name of the model's if the model has no use for it.
        renamed: its name after renaming, before any conversion.
        pattern: the source pattern that it matched in `converter`.
        converter: the conversion that it goes through, if any.
    """

    entry: StoredTensor
    target: str
    renamed: str
    pattern: str | None
    converter: WeightConverter | None


def read_names(
    model: PreTrainedModel,
    files: CheckpointFiles,
    model_keys: Iterable[str],
    *,
    key_mapping: dict[str, str] | None = None,
) -> list[StoredName]:
    """Every stored tensor with the model tensor that it goes into, in the order of merging.

    Follows the order and the rules of transformers' own loader, so that lists merge alike.
    """
    mapping = get_model_conversion_mapping(model, key_mapping)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    present: dict[str, Any] = dict.fromkeys(model_keys, True)
    prefix = model.base_model_prefix
    found = []
    for key in sorted(files.tensors, key=dot_natural_key):
        active = renamings
        name, pattern = rename_source_key(key, active, converters, prefix, present)
        if name not in present and key in present:
            active = []
            name, pattern = rename_source_key(key, [], [], prefix, present)
        found.append(
            StoredName(
                files.tensors[key],
                name,
                rename_source_key(key, active, [])[0],
                pattern,
                None if pattern is None else by_pattern[pattern],
            )
        )
    return found


def _collect(
    model: PreTrainedModel,
    files: CheckpointFiles,
    model_keys: set[str],
    wanted: Collection[str],
    key_mapping: dict[str, str] | None,
) -> tuple[
    dict[str, dict[str, list[StoredTensor]]],
    dict[str, WeightConverter],
    dict[str, str],
]:
    """Group the checkpoint's expert tensors by the model tensor that they go into.

    Returns:
        The tensors of each model tensor by source pattern, its converter if it has one, and the
        name of each stored tensor after renaming.
    """
    collected: dict[str, dict[str, list[StoredTensor]]] = defaultdict(lambda: defaultdict(list))
    used: dict[str, WeightConverter] = {}
    renamed: dict[str, str] = {}
    for one in read_names(model, files, model_keys, key_mapping=key_mapping):
        if one.target not in wanted:
            continue
        collected[one.target][one.pattern or one.entry.name].append(one.entry)
        renamed[one.entry.name] = one.renamed
        if one.converter is not None:
            used[one.target] = one.converter
    for name, converter in list(used.items()):
        _deal_out(name, converter, collected, used)
    return collected, used, renamed


def _deal_out(
    name: str,
    converter: WeightConverter,
    collected: dict[str, dict[str, list[StoredTensor]]],
    used: dict[str, WeightConverter],
) -> None:
    """Share the lists of a converter with several targets among them, in equal runs.

    transformers names such a converter's first target for all; its operation fuses the experts of
    a layer's towers, one run of the list for each.
    """
    targets = converter.target_patterns
    if len(targets) < 2 or type(converter.operations[0]).__name__ not in _DEALING:
        return
    whole = collected.pop(name)
    for place, target in enumerate(targets):
        other = name.replace(targets[0], target)
        for pattern, entries in whole.items():
            run = -(-len(entries) // len(targets))
            collected[other][pattern] = entries[place * run : (place + 1) * run]
        used[other] = converter


def _files_text(files: CheckpointFiles) -> str:
    first = files.paths[0]
    return first if len(files.paths) == 1 else f"{first} and {len(files.paths) - 1} more shards"


@dataclass(frozen=True)
class _Recipe:
    """Follows the conversion of one model tensor, `[experts, ...]` or of one expert alone."""

    name: str
    layer: MoELayer
    number: int
    paths: tuple[str, ...]

    @property
    def param(self) -> ExpertParam:
        return self.layer.params[self.number]

    def follow(
        self, source: Mapping[str, list[StoredTensor]], converter: WeightConverter | None
    ) -> list[_Pieces]:
        """The ranges of each expert, checked against the expert's shape."""
        if converter is None:
            (entries,) = source.values()
            result = self._split(entries)
        else:
            result = self._convert(source, converter)
        for expert, pieces in enumerate(result):
            self._check(expert, pieces)
        return result

    def alone(
        self,
        expert: int,
        source: Mapping[str, list[StoredTensor]],
        converter: WeightConverter | None,
    ) -> Segment:
        """The range of the one tensor that is an expert's alone, checked against its shape."""
        entries = [entry for entries in source.values() for entry in entries]
        if converter is not None or len(entries) != 1:
            raise self._unsupported(f"a conversion of {len(entries)} tensors into one expert's")
        piece = self._segment(entries[0], entries[0].offset, entries[0].shape)
        if piece.shape != self.param.shape:
            raise self._misfit(expert, piece.file, piece.shape)
        return piece

    def _convert(
        self, source: Mapping[str, list[StoredTensor]], converter: WeightConverter
    ) -> list[_Pieces]:
        # In the converter's order of patterns: concatenation follows it, not the files'.
        parts = [source[p] for p in converter.source_patterns if p in source]
        if len(parts) != len(converter.source_patterns):
            missing = [p for p in converter.source_patterns if p not in source]
            raise CheckpointError(
                f"{self.name}: no tensor like {missing[0]!r} in {self.paths[0]}; "
                "the checkpoint is incomplete"
            )
        stacks: list[list[_Pieces]] | None = None
        operation: Any
        for operation in converter.operations:
            kind = type(operation).__name__
            if kind == "MergeModulelist" and operation.dim == 0 and stacks is None:
                stacks = [self._merge(entries) for entries in parts]
                continue
            if kind in _DEALING:
                merged = [self._merge(entries) for entries in parts]
                stacks = [[self._concatenate(pieces) for pieces in zip(*merged, strict=True)]]
                continue
            stacks = stacks if stacks is not None else [self._split(entries) for entries in parts]
            if kind == "Concatenate" and operation.dim == 1:
                stacks = [[self._concatenate(pieces) for pieces in zip(*stacks, strict=True)]]
            elif kind == "Transpose" and {operation.dim0, operation.dim1} == {1, 2}:
                stacks = [[self._transpose(p, operation) for p in stack] for stack in stacks]
            elif kind == "Interleave" and operation.dim == 1 and not operation.inverse:
                stacks = [[self._interleave(p) for p in stack] for stack in stacks]
            else:
                raise self._unsupported(f"conversion {operation!r}")
        if stacks is None or len(stacks) != 1:
            raise self._unsupported("a conversion of several tensors into one")
        return stacks[0]

    def _segment(self, entry: StoredTensor, offset: int, shape: tuple[int, ...]) -> Segment:
        if entry.dtype not in _READABLE:
            path = self.paths[entry.file]
            kind = str(entry.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"{path}: tensor {entry.name} is stored as {kind}, not as a float type that can be "
                "computed with (quantised?); the runtime reads float64/32/16 and bfloat16 experts"
            )
        return Segment(entry.file, offset, entry.dtype, shape, self.number)

    def _merge(self, entries: list[StoredTensor]) -> list[_Pieces]:
        """One tensor for each expert."""
        count = self.layer.num_experts
        if len(entries) != count:
            numbers = {
                int(m[1]) for e in entries if (m := re.search(r"\.(\d+)\.[^.]*\D*$", e.name))
            }
            missing = sorted(set(range(count)) - numbers)
            hint = f"; expert {missing[0]} is missing" if missing and len(numbers) > 1 else ""
            raise CheckpointError(
                f"{self.name} needs {count} expert tensors like {entries[0].name}, "
                f"found {len(entries)}{hint}. The checkpoint is incomplete."
            )
        return [[self._segment(entry, entry.offset, entry.shape)] for entry in entries]

    def _split(self, entries: list[StoredTensor]) -> list[_Pieces]:
        """One tensor `[experts, ...]`."""
        entry = entries[0]
        count = self.layer.num_experts
        if len(entries) != 1 or len(entry.shape) < 2 or entry.shape[0] != count:
            raise self._shape_error(entry)
        each = entry.nbytes // count
        return [
            [self._segment(entry, entry.offset + expert * each, entry.shape[1:])]
            for expert in range(count)
        ]

    def _concatenate(self, parts: tuple[_Pieces, ...]) -> _Pieces:
        result: _Pieces = []
        row = 0
        for pieces in parts:
            if len(pieces) != 1 or pieces[0].transposed or pieces[0].interleaved:
                raise self._unsupported("a concatenation of converted tensors")
            result.append(replace(pieces[0], row=row))
            row += pieces[0].shape[0]
        return result

    def _transpose(self, pieces: _Pieces, operation: Any) -> _Pieces:
        if getattr(operation, "check_dims", False) and pieces[0].shape == self.param.shape:
            return pieces
        if len(pieces) != 1 or pieces[0].interleaved:
            raise self._unsupported("a transpose of converted tensors")
        return [replace(pieces[0], transposed=not pieces[0].transposed)]

    def _interleave(self, pieces: _Pieces) -> _Pieces:
        if len(pieces) != 1 or pieces[0].transposed or pieces[0].shape[0] % 2:
            raise self._unsupported("an interleaving of converted tensors")
        return [replace(pieces[0], interleaved=True)]

    def _check(self, expert: int, pieces: _Pieces) -> None:
        shape = self.param.shape
        rows = sum(piece.shape[0] for piece in pieces)
        for piece in pieces:
            found = tuple(reversed(piece.shape)) if piece.transposed else piece.shape
            fits = found == shape if piece.transposed else found[1:] == shape[1:]
            if not fits or (not piece.transposed and rows != shape[0]):
                raise self._misfit(expert, piece.file, found)

    def _misfit(self, expert: int, file: int, found: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.name} expert {expert} in {self.paths[file]}: stored shape {found}, but the "
            f"model's expert is {self.param.shape}; wrong config.json or checkpoint"
        )

    def _shape_error(self, entry: StoredTensor) -> CheckpointError:
        shape = (self.layer.num_experts, *self.param.shape)
        return CheckpointError(
            f"{self.paths[entry.file]}: tensor {entry.name} has shape {entry.shape}, but "
            f"{self.name} is {shape}; wrong config.json or checkpoint"
        )

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.name} ({self.layer.class_name}): {what} cannot be read in place"
        )
