"""What all exporters share: what an engine knows, physical slots, reading and writing files.

Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from moe_runtime.placement.plan import Plan

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError
from moe_runtime.files import write_text

__all__ = [
    "Advice",
    "Exporter",
    "Extras",
    "Hosts",
    "Target",
    "compare",
    "hosts_of_slots",
    "read_data",
    "slot_rows",
    "tier_note",
    "whole_rows",
    "write_data",
]

# Absolute layer index -> for each expert the devices that hold it, ascending.
Hosts: TypeAlias = Mapping[int, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Extras:
    """What some engines need beside the plan.

    Args:
        hidden_layers: number of all hidden layers of the model, dense ones included.
        counts: int64 `[L, E]`, tokens of each expert, the plan's layers in its order.
    """

    hidden_layers: int | None = None
    counts: IntArray | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an engine knows of the model and of itself when it reads a file.

    Args:
        layer_ids: absolute index of each MoE layer, in order of execution.
        experts: routed experts of each MoE layer.
        devices: ranks of expert parallelism.
        hidden_layers: number of all hidden layers; 0 where the engine does not look.
    """

    layer_ids: tuple[int, ...]
    experts: int
    devices: int
    hidden_layers: int = 0

    @classmethod
    def of(cls, plan: Plan, extras: Extras, *, whole_model: bool = False) -> Target:
        """The target that a plan is for.

        Args:
            whole_model: the engine counts all hidden layers, so their number is needed.

        Raises:
            PlanError: layers with different numbers of experts, or hidden layers that are unknown
                or too few.
        """
        if len(set(plan.experts)) != 1:
            raise PlanError(
                f"layers have different numbers of experts ({sorted(set(plan.experts))}); this "
                "engine knows one number for all layers"
            )
        hidden = extras.hidden_layers or 0
        if whole_model and not hidden:
            raise PlanError(
                "the file needs a row for every hidden layer, dense ones included: give "
                "--num-hidden-layers, or --model to read it from its config"
            )
        if whole_model and hidden <= max(plan.layer_ids):
            raise PlanError(
                f"the plan has layer {max(plan.layer_ids)}, but the model has {hidden} hidden "
                "layers; check --num-hidden-layers"
            )
        return cls(
            layer_ids=plan.layer_ids,
            experts=plan.experts[0],
            devices=plan.devices,
            hidden_layers=hidden,
        )


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the user has to do with a file.

    Args:
        flags: options of the engine, ready to copy.
        notes: what the engine ignores or refuses without saying so.
    """

    flags: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """One file form of one engine.

    Args:
        name: what `--to` takes.
        engine, version: whose rules are followed.
        suffixes: names that the engine accepts.
        write: plan, path, extras: writes the file.
        check: plan, path, extras: PlanError unless the engine accepts the file and it means the
            plan.
        advise: plan, path: what to do with it.
    """

    name: str
    engine: str
    version: str
    suffixes: tuple[str, ...]
    write: Callable[[Plan, Path, Extras], None]
    check: Callable[[Plan, Path, Extras], None]
    advise: Callable[[Plan, Path], Advice]


# -- physical slots --------------------------------------------------------------------------------


def slot_rows(plan: Plan) -> list[list[int]]:
    """Expert in each physical slot, a list for each MoE layer; equally many slots in all.

    Raises:
        PlanError: devices or layers with different numbers of slots.
    """
    rows = [plan.physical_to_logical(position) for position in range(len(plan.layers))]
    for layer, row in zip(plan.layer_ids, rows, strict=True):
        if len(row) != len(rows[0]):
            raise PlanError(
                f"layer {layer} has {len(row)} slots, layer {plan.layer_ids[0]} has "
                f"{len(rows[0])}; engines want the same number in every layer (plan with the same "
                "number of replicas in all)"
            )
    return rows


def hosts_of_slots(row: Sequence[int], target: Target, where: str) -> tuple[tuple[int, ...], ...]:
    """Devices of each expert, slots dealt out evenly over the devices in order.

    Raises:
        PlanError: slots that cannot be dealt out, unknown experts, or experts without a slot.
    """
    if not row or len(row) % target.devices:
        raise PlanError(
            f"{where}: {len(row)} slots cannot be dealt out evenly to {target.devices} devices"
        )
    hosts: list[set[int]] = [set() for _ in range(target.experts)]
    room = len(row) // target.devices
    for slot, expert in enumerate(row):
        if not 0 <= expert < target.experts:
            raise PlanError(
                f"{where}, slot {slot}: expert {expert} is outside 0..{target.experts - 1}"
            )
        hosts[expert].add(slot // room)
    for expert, devices in enumerate(hosts):
        if not devices:
            raise PlanError(f"{where}: expert {expert} has no slot; each needs one at least")
    return tuple(tuple(sorted(devices)) for devices in hosts)


def compare(found: Hosts, plan: Plan) -> None:
    """PlanError at the first expert that is not where the plan has it."""
    for layer in plan.layers:
        for expert, (theirs, ours) in enumerate(zip(found[layer.layer], layer.hosts, strict=True)):
            if theirs != ours:
                raise PlanError(
                    f"layer {layer.layer} expert {expert} is on devices {list(theirs)}, the plan "
                    f"has it on {list(ours)}; export the plan again"
                )


def tier_note(plan: Plan) -> tuple[str, ...]:
    """A note where the plan keeps experts off their devices, which these engines cannot."""
    elsewhere = sum(tier != "device" for layer in plan.layers for tier in layer.tiers)
    if not elsewhere:
        return ()
    return (
        (
            f"the plan keeps {elsewhere} experts in host memory or on disk; the engine knows no "
            "tiers and holds every expert on its devices"
        ),
    )


# -- files -----------------------------------------------------------------------------------------


def whole_rows(value: Any, name: str, shape: tuple[int | None, ...]) -> IntArray:
    """An int64 array of a file's lists or tensor; lists of other things are refused.

    Args:
        value: nested lists of whole numbers, or an array of an integer type.
        name: of the field, for errors.
        shape: length of each dimension, None where any will do.
    """
    if isinstance(value, list):
        _only_whole_numbers(value, name, len(shape))
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise PlanError(f"{name}: its lists have different lengths; all must be equal") from None
    if array.size and array.dtype.kind not in "iu":
        raise PlanError(f"{name}: must hold whole numbers, found {array.dtype}")
    wanted = "[" + ", ".join("any" if length is None else str(length) for length in shape) + "]"
    if array.ndim != len(shape) or any(
        length is not None and length != found
        for length, found in zip(shape, array.shape, strict=True)
    ):
        raise PlanError(f"{name}: must have shape {wanted}, found {list(array.shape)}")
    return array.astype(np.int64)


def _only_whole_numbers(value: list[Any], name: str, depth: int) -> None:
    for item in value:
        if depth > 1 and isinstance(item, list):
            _only_whole_numbers(item, name, depth - 1)
        elif type(item) is not int or abs(item) >= 2**62:
            raise PlanError(f"{name}: must hold whole numbers in lists, found {item!r:.60}")


def read_data(path: Path) -> Any:
    """What a `.json` or `.pt` file holds; tensors of a `.pt` file as numpy arrays.

    Raises:
        PlanError: no such file, or one that cannot be read without running what it says.
    """
    if path.suffix != ".pt":
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot be read ({error.strerror}); check the path") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a JSON file ({error})") from error
    import torch

    try:
        # The engine's own form is a pickle of tensors; weights_only lets nothing else in.
        data = torch.load(path, weights_only=True, map_location="cpu")  # noqa: TID251
        if isinstance(data, dict):
            return {
                key: value.detach().numpy() if isinstance(value, torch.Tensor) else value
                for key, value in data.items()
            }
        return data.detach().numpy() if isinstance(data, torch.Tensor) else data
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror or error}); check the path") from error
    except MemoryError:
        raise
    except Exception as error:
        raise PlanError(
            f"not a .pt file of plain tensors ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def write_data(path: Path, data: Mapping[str, IntArray]) -> None:
    """Write arrays as a `.json` or `.pt` file, as the name says."""
    if path.suffix != ".pt":
        text = json.dumps({name: array.tolist() for name, array in data.items()})
        write_text(path, text + "\n")
        return
    import torch

    torch.save({name: torch.from_numpy(array.copy()) for name, array in data.items()}, path)
