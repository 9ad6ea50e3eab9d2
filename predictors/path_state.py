"""The file that a training goes on from: weights, AdamW's moments, the best weights, how far it is.

Does not know what is trained. safetensors, whole or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_runtime.errors import ConfigError
from moe_runtime.files import replacing

__all__ = ["load_state", "save_state"]

FORMAT = "moe-runtime.training"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    facts: dict[str, Any],
) -> None:
    """Write everything that is needed to go on; `facts` is JSON, steps are in "step"."""
    tensors = {f"best.{name}": weight for name, weight in best.items()}
    for name, parameter in network.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        for moment in MOMENTS:
            if optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "facts": json.dumps(facts)})


def load_state(
    path: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put weights and moments back; gives the best weights and the facts.

    Raises:
        ConfigError: a damaged file, or one of another network; names file and tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ConfigError(f"{path}: no state of a training; train without --resume")
            facts: dict[str, Any] = json.loads(header["facts"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path}: not a whole training state ({error}); train without --resume"
        ) from error
    best = {}
    for name, parameter in network.named_parameters():
        for kind in ("weight", "best", *MOMENTS):
            found = stored.get(f"{kind}.{name}")
            if found is None or found.shape != parameter.shape:
                shape = "missing" if found is None else tuple(found.shape)
                raise ConfigError(
                    f"{path}: {kind}.{name} is {shape}, the network has "
                    f"{tuple(parameter.shape)}; train without --resume"
                )
        with torch.no_grad():
            parameter.copy_(stored[f"weight.{name}"])
        best[name] = stored[f"best.{name}"]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(facts["step"])),
            **{moment: stored[f"{moment}.{name}"] for moment in MOMENTS},
        }
    return best, facts
