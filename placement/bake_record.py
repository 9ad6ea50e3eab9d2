"""`moe_runtime_bake.json`: what was baked into a checkpoint, so that plans and traces made for the
original can be told from those made for it.

Does not know how a checkpoint is baked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from moe_runtime.placement.plan import PathLike

from moe_runtime.core import IntArray
from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.files import write_text

__all__ = ["RECORD_FILE", "BakeRecord"]

RECORD_FILE = "moe_runtime_bake.json"
FORMAT, VERSION = "moe-runtime.bake", 1


@dataclass(frozen=True, kw_only=True)
class BakeRecord:
    """The order in which a baked checkpoint has the original's experts.

    Args:
        model_id, fingerprint: of the original; the fingerprint, of the routing structure, is the
            baked checkpoint's too.
        permutations: for each absolute layer index the expert of the original at each place.
        bakes: what was baked, oldest first: of each plan `model_id`, `devices`, `sha256` (of its
            plain data) and the `moe_runtime` version that baked it.
    """

    model_id: str
    fingerprint: str
    permutations: Mapping[int, tuple[int, ...]]
    bakes: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        for layer, order in self.permutations.items():
            if sorted(order) != list(range(len(order))):
                raise PlanError(f"layer {layer}: {list(order)!r:.80} is no permutation")

    @cached_property
    def layer_ids(self) -> tuple[int, ...]:
        """Absolute index of each MoE layer, in order of execution."""
        return tuple(self.permutations)

    def originals(self, layer: int) -> IntArray:
        """int64 `[E]`: the expert of the original at each place of the baked layer."""
        if layer not in self.permutations:
            raise PlanError(f"no layer {layer} was baked; MoE layers: {list(self.layer_ids)}")
        return np.asarray(self.permutations[layer], dtype=np.int64)

    def places(self, layer: int) -> IntArray:
        """int64 `[E]`: the place in the baked layer of each expert of the original."""
        return np.argsort(self.originals(layer)).astype(np.int64)

    def then(self, permutations: Mapping[int, IntArray], bake: Mapping[str, Any]) -> BakeRecord:
        """The record of this checkpoint baked once more."""
        if tuple(permutations) != self.layer_ids:
            raise PlanError(
                f"the record has layers {list(self.layer_ids)}, the plan {list(permutations)}"
            )
        return BakeRecord(
            model_id=self.model_id,
            fingerprint=self.fingerprint,
            permutations={
                layer: tuple(self.originals(layer)[order].tolist())
                for layer, order in permutations.items()
            },
            bakes=(*self.bakes, bake),
        )

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder: PathLike) -> Path:
        """Write the record into a checkpoint's folder."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": {"id": self.model_id, "fingerprint": self.fingerprint},
            "layers": [
                {"layer": layer, "permutation": list(order)}
                for layer, order in self.permutations.items()
            ],
            "bakes": [dict(bake) for bake in self.bakes],
        }
        return write_text(Path(folder) / RECORD_FILE, json.dumps(data, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: PathLike) -> BakeRecord | None:
        """The record in a checkpoint's folder, None if there is none.

        Raises:
            CheckpointError: it is damaged or of another version; names file and field.
        """
        path = Path(folder) / RECORD_FILE
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
            return cls(
                model_id=str(data["model"]["id"]),
                fingerprint=str(data["model"]["fingerprint"]),
                permutations={
                    int(row["layer"]): tuple(int(expert) for expert in row["permutation"])
                    for row in data["layers"]
                },
                bakes=tuple(dict(bake) for bake in data["bakes"]),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: not a record of baking ({type(error).__name__}: {error}); restore it, or "
                "remove it if the experts are to be numbered anew from this checkpoint"
            ) from error
