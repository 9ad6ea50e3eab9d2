"""Which tensors of a model, beside its experts' own, go with the order of its experts.

Found by building the model's skeleton a second time with twice the experts: what grows is indexed
by expert, whatever sizes happen to be equal. Knows no files and no plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError, UnsupportedModelError
from moe_runtime.loading import build_structure
from moe_runtime.model_spec import MoELayer, MoESpec

__all__ = ["ExpertIndexed", "GroupLimit", "common_parts", "find_group_limits", "find_indexed"]

# What routers call the number of groups that they choose among before they choose experts, and
# how many groups they choose.
_GROUP_COUNTS = ("num_group", "n_group", "num_expert_group")
_GROUPS_CHOSEN = "topk_group"


@dataclass(frozen=True, kw_only=True)
class ExpertIndexed:
    """One tensor of the model that goes with the experts of one layer.

    Args:
        name: its name in the model's state dict.
        position: position of the layer in `MoESpec.layers`.
        dim: the dimension that has one entry for each expert. Entries past the number of experts
            (a shared expert, or none at all) keep their place. None if its values are the
            numbers of experts.
        size: length of that dimension; 0 if there is none.
        stored: whether a checkpoint must have it (buffers may be left out).
    """

    name: str
    position: int
    dim: int | None
    size: int
    stored: bool


@dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """A router that first chooses `chosen` of `groups` equal runs of consecutive experts."""

    groups: int
    chosen: int

    def check(self, layer: int, permutation: IntArray) -> None:
        """PlanError unless the permutation keeps each group together at one group's place.

        Args:
            layer: absolute layer index, for the message.
            permutation: int64 `[E]`, the expert that stands at each place.
        """
        length = len(permutation) // self.groups
        origin = permutation.reshape(self.groups, length) // length
        for place, groups in enumerate(origin):
            if len(set(groups.tolist())) > 1:
                first, last = place * length, (place + 1) * length - 1
                raise PlanError(
                    f"layer {layer}: its router chooses {self.chosen} of {self.groups} groups of "
                    f"{length} consecutive experts, and the plan would put experts "
                    f"{sorted(permutation[first : last + 1].tolist())} at the places {first} to "
                    f"{last} of one group. The model would compute something else: only a plan "
                    "whose devices hold whole groups can be baked"
                )


def find_indexed(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    model: PreTrainedModel,
    spec: MoESpec,
) -> tuple[ExpertIndexed, ...]:
    """Every stored tensor beside the experts' own that goes with the order of some layer's experts.

    Args:
        cls, config: what `model` was built from.
        model: the skeleton, on any device.
        spec: its MoE layers.

    Raises:
        UnsupportedModelError: it cannot be told which tensors these are, or how they are indexed.
    """
    base = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    own = {f"{layer.path}.{param.name}" for layer in spec.layers for param in layer.params}
    found: dict[str, ExpertIndexed] = {}
    for grown in _skeletons_with_twice_the_experts(cls, config, spec):
        for name, tensor in grown.items():
            before = base.get(name)
            if before is None:
                raise UnsupportedModelError(
                    f"{spec.model_class}: with more experts the model has the further tensor "
                    f"{name}; how its tensors go with its experts is not understood"
                )
            if name in own or tensor.shape == before.shape:
                continue
            position = _owner(name, spec)
            dim = _grown_dim(name, before.shape, tensor.shape, spec.layers[position])
            found[name] = ExpertIndexed(
                name=name,
                position=position,
                dim=dim,
                size=before.shape[dim],
                stored=name in parameters,
            )
    found.update((one.name, one) for one in _tables(base, spec, known=own | set(found)))
    return tuple(found.values())


def _skeletons_with_twice_the_experts(
    cls: type[PreTrainedModel], config: PreTrainedConfig, spec: MoESpec
) -> Iterator[Mapping[str, torch.Tensor]]:
    """State dicts on the meta device in which, between them, every layer has twice its experts."""
    counts = {layer.num_experts for layer in spec.layers}
    missing = {layer.path: layer.num_experts for layer in spec.layers}
    data = config.to_dict()
    fields = dict.fromkeys(_numbers(data, counts))
    for field in sorted(fields, key=lambda name: not ("expert" in name or "routed" in name)):
        if not missing:
            return
        try:
            grown = type(config).from_dict(_doubled(data, field, counts))
            model, structure = build_structure(cls, grown, None)
        except Exception:  # noqa: BLE001  a number of something else: constructors may say anything
            continue
        numbers = {layer.path: layer.num_experts for layer in structure.of().layers}
        covered = {path for path in missing if numbers.get(path) == 2 * missing[path]}
        if covered and set(numbers) == {layer.path for layer in spec.layers}:
            for path in covered:
                del missing[path]
            yield model.state_dict()
    if missing:
        path, count = next(iter(missing.items()))
        raise UnsupportedModelError(
            f"{path} has {count} experts, and no field of {type(config).__name__} was found to "
            "say so; which tensors go with the order of its experts cannot be told"
        )


def _numbers(place: Any, wanted: set[int], key: str = "") -> Iterator[str]:
    """The field of each wanted number in plain data."""
    if isinstance(place, dict):
        for name, value in place.items():
            yield from _numbers(value, wanted, name if isinstance(name, str) else key)
    elif isinstance(place, (list, tuple)):
        for value in place:
            yield from _numbers(value, wanted, key)
    elif type(place) is int and place in wanted:
        yield key


def _doubled(place: Any, field: str, wanted: set[int], key: str = "") -> Any:
    """A copy of plain data with the wanted numbers of one field doubled, wherever it stands."""
    if isinstance(place, dict):
        return {
            name: _doubled(value, field, wanted, name if isinstance(name, str) else key)
            for name, value in place.items()
        }
    if isinstance(place, (list, tuple)):
        return [_doubled(value, field, wanted, key) for value in place]
    return 2 * place if type(place) is int and key == field and place in wanted else place


def common_parts(names: Iterable[Sequence[str]]) -> list[str]:
    """The parts that all of these names, cut at their dots, begin with."""
    common = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


def _owner(name: str, spec: MoESpec) -> int:
    """Position of the layer that stands nearest to a tensor in the tree of modules."""
    parts = name.split(".")
    shared = [len(common_parts([parts, layer.path.split(".")])) for layer in spec.layers]
    nearest = [at for at, depth in enumerate(shared) if depth == max(shared)]
    if len(nearest) > 1:
        layers = [spec.layers[at].layer for at in nearest]
        raise UnsupportedModelError(
            f"{name} is indexed by expert and belongs to no single layer (as near to layers "
            f"{layers}); a model whose layers share a router cannot be baked"
        )
    return nearest[0]


def _grown_dim(name: str, before: torch.Size, after: torch.Size, layer: MoELayer) -> int:
    dims = [at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    if (
        len(before) != len(after)
        or len(dims) != 1
        or after[dims[0]] - before[dims[0]] != layer.num_experts
    ):
        raise UnsupportedModelError(
            f"{name} has shape {tuple(before)} with {layer.num_experts} experts and "
            f"{tuple(after)} with twice as many; it is not understood how it is indexed by expert"
        )
    return dims[0]


def _tables(
    base: Mapping[str, torch.Tensor], spec: MoESpec, *, known: set[str]
) -> Iterator[ExpertIndexed]:
    """Tensors in the blocks around the experts whose values are experts' numbers."""
    for position, layer in enumerate(spec.layers):
        block = layer.path.rpartition(".")[0] + "."
        for name, tensor in base.items():
            whole = not (tensor.is_floating_point() or tensor.is_complex())
            if not whole or name in known or not name.startswith(block):
                continue
            if _owner(name, spec) != position or tensor.dim() == 0:
                continue
            if tensor.dtype == torch.bool or tensor.dim() != 2 or tensor.shape[1] != layer.top_k:
                raise UnsupportedModelError(
                    f"{name} {tuple(tensor.shape)} holds whole numbers beside the experts of layer "
                    f"{layer.layer}; it is not understood whether they are experts' numbers"
                )
            yield ExpertIndexed(name=name, position=position, dim=None, size=0, stored=True)


def find_group_limits(model: PreTrainedModel, spec: MoESpec) -> tuple[GroupLimit | None, ...]:
    """For each layer how its router limits the choice to groups of experts; None if it does not."""
    modules = dict(model.named_modules())
    limits = []
    for layer in spec.layers:
        block = layer.path.rpartition(".")[0]
        places = [module for path, module in modules.items() if f"{path}.".startswith(f"{block}.")]
        # What a router says of itself goes before what its configuration says.
        found = [limit for place in places if (limit := _limit(place)) is not None]
        if not found:
            config = _limit(modules[layer.path].config)
            found = [] if config is None else [config]
        grouped = [limit for limit in found if limit.groups > 1 and limit.chosen < limit.groups]
        limits.append(grouped[0] if grouped else None)
    return tuple(limits)


def _limit(place: Any) -> GroupLimit | None:
    if getattr(place, "topk_method", None) == "greedy":  # chooses among all experts after all
        return GroupLimit(groups=1, chosen=1)
    chosen = getattr(place, _GROUPS_CHOSEN, None)
    for name in _GROUP_COUNTS:
        groups = getattr(place, name, None)
        if isinstance(groups, int) and isinstance(chosen, int):
            return GroupLimit(groups=groups, chosen=chosen)
    return None
