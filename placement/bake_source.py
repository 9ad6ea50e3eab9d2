"""A checkpoint opened for baking: its structure, where its bytes lie, what lies beside them.

Reads headers and configurations, no weights. Does not know plans.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.placement.bake_record import RECORD_FILE
from moe_runtime.placement.plan import PathLike
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from moe_runtime.checkpoint import ExpertMap, map_experts
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.loading import build_structure, read_config, resolve_class
from moe_runtime.model_spec import MoESpec
from moe_runtime.safetensors_index import (
    HUB_OPTIONS,
    CheckpointFiles,
    open_checkpoint,
    resolve_shards,
)

__all__ = ["BakeSource", "open_source", "other_files", "relative_name"]

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
    apart = [layer.path for layer in spec.layers if layer.modules]
    if apart:
        raise UnsupportedModelError(
            f"{path_or_id}: the experts of {apart[0]} are modules of their own, whose order "
            "cannot be baked; only experts behind transformers' experts interface can be"
        )
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


def other_files(source: BakeSource) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Files beside the shards to copy, by name, and those with other weights, to leave behind."""
    shards = {relative_name(source, path) for path in source.files.paths}
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


def relative_name(source: BakeSource, path: str) -> str:
    """A shard's name in the checkpoint's folder."""
    return Path(os.path.relpath(path, source.folder)).as_posix()
