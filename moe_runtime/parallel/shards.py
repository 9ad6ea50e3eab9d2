"""One rank's share of a checkpoint: the dense weights, and of each MoE layer its own experts only.

Knows checkpoints and where experts lie in them; knows no links, and not who computes what.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moe_runtime.checkpoint import map_experts
from moe_runtime.device import open_device
from moe_runtime.errors import PlanError
from moe_runtime.expert_tensors import held_tensors, place_placeholders
from moe_runtime.layout import largest_whole_row
from moe_runtime.loading import build_structure, load_without_experts, read_config, resolve_class
from moe_runtime.model_spec import MoELayer, MoESpec, read_spec
from moe_runtime.parallel.fingerprint import checkpoint_fingerprint
from moe_runtime.parallel.held import refuse_modules
from moe_runtime.placement.plan import Plan
from moe_runtime.safetensors_index import CheckpointFiles, open_checkpoint, resolve_shards
from moe_runtime.slots import SlotPool
from moe_runtime.store import Bounce, DiskStore, ParameterStore, Store

__all__ = ["Shard", "ShardSource", "experts_of", "open_source", "shard_of"]

_CHUNK = 4 << 20  # bytes read at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """What one rank holds of a model.

    Args:
        model: every weight but the experts'; in their place stand parameters without data (of a
            model that was in memory: its own).
        spec: MoE layers and experts of the whole model.
        owned: by absolute layer index the experts held, ascending.
        pools: by layer position the slots; slot i holds `owned[layer][i]`.
        bytes_read: from the checkpoint for experts, whole blocks of the disk included.
    """

    model: PreTrainedModel
    spec: MoESpec
    owned: Mapping[int, tuple[int, ...]]
    pools: tuple[SlotPool, ...]
    bytes_read: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts held, without alignment."""
        return _expert_bytes(self.spec, self.owned)

    def slot_of(self, layer: int, expert: int) -> int | None:
        """The slot of an expert in its layer's pool; None if this rank does not hold it."""
        held = self.owned[layer]
        return held.index(expert) if expert in held else None

    def pool(self, layer: int) -> SlotPool:
        """The slots of a layer, by absolute index."""
        return self.pools[self.spec.grid.position[layer]]

    @property
    def tensors(self) -> dict[int, dict[str, torch.Tensor]]:
        """By absolute layer index and parameter name: `[held, ...]`, views of the slots."""
        return {
            layer.layer: {
                param.name: stack for param, stack in zip(layer.params, pool.stacked, strict=True)
            }
            for layer, pool in zip(self.spec.layers, self.pools, strict=True)
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSource:
    """A checkpoint that was looked at; no weight of it is loaded yet.

    Args:
        path_or_id: as given.
        config: its configuration.
        cls: the model's class.
        files: its shards.
        spec: MoE layers and experts.
        options: for `from_pretrained`.
    """

    path_or_id: str
    config: PreTrainedConfig
    cls: type[PreTrainedModel]
    files: CheckpointFiles
    spec: MoESpec
    options: Mapping[str, Any]

    def fingerprint(self) -> str:
        """16 hex digits, by `checkpoint_fingerprint`; the same on ranks with the same files.

        Raises:
            CheckpointError, OSError: a shard cannot be read.
        """
        return checkpoint_fingerprint(self.files, self.spec.fingerprint)

    def expert_bytes(self, owned: Mapping[int, Sequence[int]]) -> int:
        """Bytes that these experts will take."""
        return _expert_bytes(self.spec, owned)

    def load(self, owned: Mapping[int, Sequence[int]], *, device: str = "cpu") -> Shard:
        """Load the dense weights and these experts, and nothing of the other experts.

        Raises:
            CheckpointError: the checkpoint is damaged or incomplete.
            ExpertReadError: an expert could not be read; names it.
        """
        place = open_device(device)
        result, structure = load_without_experts(self.cls, self.path_or_id, dict(self.options))
        model: PreTrainedModel = result
        spec = replace(structure.of(), model_id=self.path_or_id)
        experts = map_experts(
            model,
            spec,
            self.files,
            structure.keys,
            key_mapping=self.options.get("key_mapping"),
        )
        model.to(place.torch_device)  # type: ignore[arg-type]
        chunk = max(_CHUNK, largest_whole_row(spec, experts, by_rows=False))
        store = DiskStore(experts, spec, chunk=chunk)
        try:
            shard = _filled(model, spec, owned, store, Bounce(chunk), place.torch_device)
        finally:
            store.close()
        place_placeholders(model, spec, place.torch_device)
        return shard


def open_source(path_or_id: str | os.PathLike[str], **options: Any) -> ShardSource:
    """Look at a checkpoint: configuration, structure, headers.

    Args:
        options: as `moe_runtime.from_pretrained` passes them on (`dtype`, `revision`, ...).

    Raises:
        UnsupportedModelError: no MoE layer behind transformers' experts interface, or quantised.
        CheckpointError: shards are missing or damaged.
    """
    path_or_id = os.fspath(path_or_id)
    config = read_config(path_or_id, options)
    cls = resolve_class(config, None)
    hub = {name: value for name, value in options.items() if name != "variant"}
    files = open_checkpoint(resolve_shards(path_or_id, variant=options.get("variant"), **hub))
    dtype = options.get("dtype", getattr(config, "dtype", None))
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    _, structure = build_structure(cls, config, dtype)
    spec = replace(structure.of(), model_id=path_or_id)
    refuse_modules(spec)
    return ShardSource(
        path_or_id=path_or_id,
        config=config,
        cls=cls,
        files=files,
        spec=spec,
        options=dict(options),
    )


def shard_of(model: PreTrainedModel, owned: Mapping[int, Sequence[int]]) -> Shard:
    """A rank's share of a model that is in memory: copies of its experts in slots.

    Raises:
        UnsupportedModelError: as `open_source`.
    """
    spec = read_spec(model)
    refuse_modules(spec)
    store = ParameterStore([held_tensors(model, layer) for layer in spec.layers])
    device = next(model.parameters()).device
    return _filled(model, spec, owned, store, None, device)


def experts_of(plan: Plan, rank: int) -> dict[int, tuple[int, ...]]:
    """By absolute layer index the experts that a plan gives a rank, ascending.

    Raises:
        PlanError: the plan has no such device.
    """
    if not 0 <= rank < plan.devices:
        raise PlanError(
            f"rank {rank} has no device in the plan, which has {plan.devices} (0 to "
            f"{plan.devices - 1}); start {plan.devices} ranks or plan for as many as run"
        )
    return {
        layer: tuple(plan.device_experts(position)[rank])
        for position, layer in enumerate(plan.layer_ids)
    }


def _filled(
    model: PreTrainedModel,
    spec: MoESpec,
    owned: Mapping[int, Sequence[int]],
    store: Store,
    bounce: Bounce | None,
    device: torch.device,
) -> Shard:
    """Slots for the experts owned, filled one by one."""
    kept = {layer.layer: tuple(owned[layer.layer]) for layer in spec.layers}
    name = str(device)
    allocate = open_device(name).allocate
    pools, read = [], 0
    for position, layer in enumerate(spec.layers):
        pool = SlotPool(layer.params, len(kept[layer.layer]), allocate)
        for slot, expert in enumerate(kept[layer.layer]):
            read += _fill(store, bounce, position, expert, pool.targets(slot), layer)
        pools.append(pool)
    return Shard(model=model, spec=spec, owned=kept, pools=tuple(pools), bytes_read=read)


def _fill(
    store: Store,
    bounce: Bounce | None,
    position: int,
    expert: int,
    target: tuple[torch.Tensor, ...],
    layer: MoELayer,
) -> int:
    """Bring one expert into its slot; bytes read."""
    held = store.host_tensors(position, expert)
    if held is not None:
        for into, source in zip(target, held, strict=True):
            into.copy_(source)
        return 0
    assert bounce is not None, "what is not in memory is read"
    landing = target
    if target[0].device.type != "cpu":
        landing = tuple(torch.empty(p.shape, dtype=p.dtype) for p in layer.params)
    read = sum(
        store.read(position, expert, piece, landing, bounce)
        for piece in store.pieces(position, expert)
    )
    if landing is not target:
        for into, source in zip(target, landing, strict=True):
            into.copy_(source)
    return read


def _expert_bytes(spec: MoESpec, owned: Mapping[int, Sequence[int]]) -> int:
    return sum(len(owned[layer.layer]) * layer.expert_bytes for layer in spec.layers)
