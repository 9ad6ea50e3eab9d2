"""Owns the file that training resumes from: weights, AdamW's moments, step, elapsed time.

Does not know what is trained. The file is safetensors, replaced as a whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW, facts: dict[str, Any]
) -> None:
    """Writes everything needed to go on; `facts` is JSON, with the number of steps as "step"."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
    os.replace(temporary, path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Puts weights and moments back and gives the facts; ValueError if the shapes differ."""
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        names = {f"weight.{name}" for name, _ in model.named_parameters()}
        stored = {name for name in file.keys() if name.startswith("weight.")}  # noqa: SIM118
        if names != stored:
            raise ValueError(f"{path}: holds another model; remove it, or name another --out")
        for name, parameter in model.named_parameters():
            weight = file.get_tensor(f"weight.{name}")
            if weight.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name} is {tuple(weight.shape)}, the model has "
                    f"{tuple(parameter.shape)}; remove it, or name another --out"
                )
            with torch.no_grad():
                parameter.copy_(weight)
            optimizer.state[parameter] = {
                "step": torch.tensor(float(facts["step"])),
                **{moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS},
            }
    return facts
