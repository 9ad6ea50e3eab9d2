"""From permutations of experts to the byte ranges of a checkpoint that come from elsewhere.

Knows how experts and routers are stored; writes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from moe_runtime.placement.bake_copy import Patch
from moe_runtime.placement.bake_rules import ExpertIndexed, common_parts
from transformers import PreTrainedModel

from moe_runtime.checkpoint import ExpertMap, Segment, StoredName, read_names
from moe_runtime.core import IntArray
from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.model_spec import MoELayer, MoESpec
from moe_runtime.safetensors_index import CheckpointFiles, StoredTensor

__all__ = ["expert_patches", "indexed_patches", "moves"]


def moves(permutation: IntArray) -> bool:
    """Whether a permutation puts any expert at another place."""
    return bool((permutation != np.arange(len(permutation))).any())


def expert_patches(
    spec: MoESpec, experts: ExpertMap, permutations: Sequence[IntArray]
) -> dict[int, list[Patch]]:
    """For each shard the ranges of the experts that change places.

    Args:
        permutations: for each layer int64 `[E]`, the expert that comes to stand at each place.

    Raises:
        CheckpointError: experts of a layer are stored in different dtypes.
    """
    patches: dict[int, list[Patch]] = defaultdict(list)
    for layer, segments, permutation in zip(
        spec.layers, experts.segments, permutations, strict=True
    ):
        if not moves(permutation):
            continue
        by_role = [{(s.param, s.row): s for s in expert} for expert in segments]
        for place, expert in enumerate(permutation.tolist()):
            for role, target in by_role[place].items():
                source = by_role[expert][role]
                if _kind(source) != _kind(target):
                    raise CheckpointError(
                        f"layer {layer.layer}: {layer.params[target.param].name} of expert "
                        f"{expert} is stored as {source.dtype} {source.shape} and that of expert "
                        f"{place} as {target.dtype} {target.shape}; experts stored in different "
                        "ways cannot change places. Save the checkpoint in one dtype first."
                    )
                patches[target.file].append(
                    Patch(target.offset, target.nbytes, source.file, source.offset)
                )
    return dict(patches)


def _kind(segment: Segment) -> tuple[Any, ...]:
    return (segment.dtype, segment.shape, segment.transposed, segment.interleaved)


def indexed_patches(
    model: PreTrainedModel,
    spec: MoESpec,
    experts: ExpertMap,
    files: CheckpointFiles,
    model_keys: Iterable[str],
    indexed: Sequence[ExpertIndexed],
    permutations: Sequence[IntArray],
) -> dict[int, list[Patch]]:
    """For each shard the tensors of routers that have to be rewritten.

    Args:
        model: the skeleton, on the meta device.
        model_keys: names of all its parameters and buffers.
        indexed: what goes with the experts, as `find_indexed` tells.

    Raises:
        CheckpointError: such a tensor is missing, or has another shape than the model's.
        UnsupportedModelError: it is stored in a way that is not understood, or a tensor that the
            model does not use lies among the experts' and may depend on their order.
    """
    keys = set(model_keys)
    wanted = {one.name: one for one in indexed if moves(permutations[one.position])}
    names = read_names(model, files, keys)
    _refuse_unknown(spec, experts, names, keys, permutations)
    found: set[str] = set()
    patches: dict[int, list[Patch]] = defaultdict(list)
    for stored in names:
        goes_to = [wanted[name] for name in _targets(stored) if name in wanted]
        if not goes_to:
            continue
        for one in goes_to:
            if one.name in found or (
                stored.converter is not None and len(stored.converter.source_patterns) > 1
            ):
                raise UnsupportedModelError(
                    f"{one.name} is stored in several tensors ({stored.entry.name} is one); such "
                    "a router cannot be baked in place"
                )
            found.add(one.name)
        entry = stored.entry
        rewrite = _Rewrite(
            stored, model, tuple(goes_to), tuple(permutations[one.position] for one in goes_to)
        )
        rewrite.gather()  # what does not fit shows now, before anything is written
        patches[entry.file].append(
            Patch(entry.offset, entry.nbytes, entry.file, entry.offset, rewrite)
        )
    missing = sorted(name for name, one in wanted.items() if one.stored and name not in found)
    if missing:
        raise CheckpointError(
            f"no tensor for {missing[0]} in {files.paths[0]}; the checkpoint is incomplete"
        )
    return dict(patches)


def _targets(stored: StoredName) -> list[str]:
    """Every model tensor that a stored tensor goes into."""
    if stored.converter is None:
        return [stored.target]
    first, *others = stored.converter.target_patterns
    return [stored.target, *(stored.target.replace(first, other) for other in others)]


def _refuse_unknown(
    spec: MoESpec,
    experts: ExpertMap,
    names: Iterable[StoredName],
    model_keys: set[str],
    permutations: Sequence[IntArray],
) -> None:
    """Refuse tensors beside moving experts that this model does not use: another engine may."""
    blocks = {
        _block(entry.name for entry in stored.values()): layer
        for layer, stored, permutation in zip(spec.layers, experts.keys, permutations, strict=True)
        if moves(permutation)
    }
    for stored in names:
        if stored.target in model_keys:
            continue
        for block, layer in blocks.items():
            if stored.entry.name.startswith(block) and _may_depend(stored.entry, layer):
                raise UnsupportedModelError(
                    f"tensor {stored.entry.name} {stored.entry.shape} lies among the experts of "
                    f"layer {layer.layer}, and {spec.model_class} does not use it; whether it goes "
                    "with the order of the experts is not known, so the checkpoint is not baked"
                )


def _may_depend(entry: StoredTensor, layer: MoELayer) -> bool:
    return ".experts." in entry.name or layer.num_experts in entry.shape


def _block(names: Iterable[str]) -> str:
    """What the names of a layer's stored experts have in common, up to the block around them."""
    common = common_parts(name.split(".") for name in names)
    return ".".join(common[:-1] if common[-1:] == ["experts"] else common) + "."


@dataclass(frozen=True)
class _Rewrite:
    """The bytes of one stored tensor once the experts have changed places."""

    stored: StoredName
    model: PreTrainedModel
    goes_to: tuple[ExpertIndexed, ...]
    permutations: tuple[IntArray, ...]

    def __call__(self, raw: bytes) -> bytes:
        size = self.stored.entry.dtype.itemsize
        elements = np.frombuffer(raw, dtype=np.uint8).reshape(-1, size)[self.gather()]
        for one, permutation in zip(self.goes_to, self.permutations, strict=True):
            if one.dim is None:
                elements = self._renumber(elements, permutation)
        return elements.tobytes()

    def gather(self) -> IntArray:
        """int64 `[elements]`: for each element the one whose value it gets.

        The tensor's elements are numbered and sent through transformers' own conversion, so that
        transposed and divided tensors need no rule here.
        """
        entry = self.stored.entry
        labels = torch.arange(int(np.prod(entry.shape, dtype=np.int64))).reshape(entry.shape)
        targets = self._convert(labels)
        result = np.arange(labels.numel(), dtype=np.int64)
        for one, permutation in zip(self.goes_to, self.permutations, strict=True):
            target = targets.get(one.name)
            expected = tuple(self.model.state_dict()[one.name].shape)
            if target is None or tuple(target.shape) != expected:
                shape = entry.shape if target is None else tuple(target.shape)
                raise CheckpointError(
                    f"tensor {entry.name} has shape {shape}, but {one.name} is {expected}; wrong "
                    "config.json or checkpoint"
                )
            if one.dim is None:
                continue
            # Entries past the experts (a shared expert, or none at all) stay.
            order = np.concatenate([permutation, np.arange(len(permutation), one.size)])
            moved = target.index_select(one.dim, torch.from_numpy(order))
            result[target.flatten().numpy()] = moved.flatten().numpy()
        return result

    def _convert(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        converter, name = self.stored.converter, self.stored.target
        if converter is None:
            return {name: labels}
        tensors: dict[str, Any] = {converter.source_patterns[0]: [labels]}
        for operation in converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        first = converter.target_patterns[0]
        return {
            name if len(tensors) == 1 else name.replace(first, pattern): tensor
            for pattern, tensor in tensors.items()
        }

    def _renumber(self, elements: Any, permutation: IntArray) -> Any:
        """The bytes `[elements, itemsize]` of a table of experts' numbers, in the new numbers."""
        entry = self.stored.entry
        kind = np.dtype(str(entry.dtype).removeprefix("torch."))
        numbers = np.ascontiguousarray(elements).view(kind)
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
        if low < 0 or high >= len(permutation):
            raise CheckpointError(
                f"tensor {entry.name} should hold the numbers of {len(permutation)} experts, and "
                f"holds {low if low < 0 else high}"
            )
        places = np.argsort(permutation).astype(kind)
        return np.ascontiguousarray(places[numbers]).view(np.uint8)
