"""What stands in a checkpoint, without loading a weight: structure and its experts' byte ranges.

Does not know budgets nor the runtime.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_runtime.checkpoint import ExpertMap, map_experts
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.loading import build_structure, read_config, resolve_class
from moe_runtime.model_spec import MoESpec
from moe_runtime.safetensors_index import CheckpointFiles, open_checkpoint, resolve_shards

__all__ = ["check_options", "inspect_checkpoint", "open_files"]


def inspect_checkpoint(
    path_or_id: str | os.PathLike[str], *, auto_class: str | None = None, **hf_kwargs: Any
) -> tuple[MoESpec, ExpertMap]:
    """Structure and byte ranges of a checkpoint's experts, without loading a weight.

    Raises:
        As `from_pretrained`.
    """
    options = check_options(hf_kwargs)
    path_or_id = os.fspath(path_or_id)
    config = read_config(path_or_id, options)
    cls = resolve_class(config, auto_class)
    files = open_files(path_or_id, options)
    dtype = options.get("dtype", getattr(config, "dtype", None))
    model, structure = build_structure(cls, config, dtype)
    spec = replace(structure.of(), model_id=path_or_id)
    return spec, map_experts(model, spec, files, structure.keys)


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for transformers that the runtime can pass on.

    Raises:
        UnsupportedModelError: one of them places or changes weights; says which.
    """
    if options.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "quantization_config is not supported: the runtime computes with float experts"
        )
    for name in ("device_map", "gguf_file", "tp_plan", "distributed_config"):
        if options.get(name) is not None:
            raise UnsupportedModelError(
                f"{name} cannot be combined with the runtime, which places the weights itself; "
                "use device= and expert_budget="
            )
    return dict(options)


def open_files(path_or_id: str, options: Mapping[str, Any]) -> CheckpointFiles:
    """A checkpoint's shards, found by the options of transformers and opened.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    chosen = {k: v for k, v in options.items() if k != "variant"}
    shards = resolve_shards(path_or_id, variant=options.get("variant"), **chosen)
    return open_checkpoint(shards)
