"""Steering files, `*.steer.json`: written, read, and refused when they do not fit.

Knows the file's form; does not know how experts were found or are reinforced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text
from moe_runtime.model_spec import MoESpec
from moe_runtime.steering import fields
from moe_runtime.steering.identification import Identification
from moe_runtime.steering.values import Beta, Method, Steering

__all__ = ["SteeredModel", "SteeringFile", "read_steering", "write_steering"]

FORMAT, VERSION = "moe-runtime.steering", 1
_AGAIN = "copy the file again, or make it again (moe-runtime steer find)"

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class SteeredModel:
    """The model that a steering is for.

    Args:
        model_id, fingerprint, tokenizer_id: as in its traces; "" if unknown.
        layer_ids: absolute index of each MoE layer, in order of execution; () if unknown.
        experts: routed experts of each of these layers.
    """

    model_id: str = ""
    fingerprint: str = ""
    tokenizer_id: str = ""
    layer_ids: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.layer_ids) != len(self.experts):
            raise ConfigError(
                f"a steered model needs an expert count for each layer: {len(self.layer_ids)} "
                f"layers, {len(self.experts)} counts"
            )

    @classmethod
    def of(cls, source: MoESpec | Identification) -> SteeredModel:
        """Of a model's structure, or of the model whose traces an identification counted."""
        if isinstance(source, MoESpec):
            return cls(
                model_id=source.model_id,
                fingerprint=source.fingerprint,
                layer_ids=source.grid.layers,
                experts=source.grid.experts,
            )
        return cls(
            model_id=source.model_id,
            fingerprint=source.fingerprint,
            tokenizer_id=source.tokenizer_id,
            layer_ids=source.layer_ids,
            experts=source.experts,
        )

    def require(self, steering: Steering, name: str) -> None:
        """ConfigError unless the model has all experts of a steering, where its layers are known.

        Args:
            name: of the steering, for the message.
        """
        counts = dict(zip(self.layer_ids, self.experts, strict=True))
        for layer, expert in steering.betas:
            if counts and layer not in counts:
                raise ConfigError(
                    f"{name}: layer {layer} has no routed experts; the MoE layers of "
                    f"{self.model_id or 'the model'} are {list(counts)}"
                )
            if counts and not 0 <= expert < counts[layer]:
                raise ConfigError(
                    f"{name}: no expert {expert} in layer {layer}; it has {counts[layer]}, "
                    "numbered from 0"
                )


@dataclass(frozen=True, kw_only=True)
class SteeringFile:
    """What a steering file holds.

    Args:
        steering: what is done to the routers' choices.
        model: for which model.
        identification: how the experts were found; None if they were given.
        path: of the file, for messages.
    """

    steering: Steering
    model: SteeredModel
    identification: Identification | None = None
    path: Path | None = None

    def check(self, spec: MoESpec) -> None:
        """ConfigError unless the file is for this model: its fingerprint, where the file has one,
        and its layers and experts.
        """
        name = str(self.path or "the steering")
        theirs = self.model.fingerprint
        if theirs and theirs != spec.fingerprint:
            raise ConfigError(
                f"{name}: made for {self.model.model_id or 'a model'} with fingerprint {theirs}, "
                f"the model at hand ({spec.model_id or spec.model_class}) has "
                f"{spec.fingerprint}; find experts in traces of this model"
            )
        SteeredModel.of(spec).require(self.steering, name)


def write_steering(
    path: PathLike,
    steering: Steering,
    *,
    model: SteeredModel | MoESpec | None = None,
    identification: Identification | None = None,
) -> Path:
    """Write a steering file (`*.steer.json` by custom), whole or not at all.

    Args:
        path: of the file.
        steering: what it says.
        model: for which model; the identification's if not given.
        identification: how the experts were found.

    Returns:
        The path written.

    Raises:
        ConfigError: neither a model nor an identification, or an expert that the model lacks.
    """
    if isinstance(model, MoESpec):
        model = SteeredModel.of(model)
    if model is None:
        if identification is None:
            raise ConfigError(
                f"{path}: a steering file says for which model it is; give model= (its MoESpec or "
                "a SteeredModel) or identification="
            )
        model = SteeredModel.of(identification)
    model.require(steering, str(path))
    data = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "id": model.model_id,
            "fingerprint": model.fingerprint,
            "tokenizer_id": model.tokenizer_id,
            "layer_ids": list(model.layer_ids),
            "experts": list(model.experts),
        },
        "steering": {
            "method": steering.method,
            "renormalise": steering.renormalise,
            "thinking": None if steering.thinking is None else list(steering.thinking),
            "experts": [
                {
                    "layer": layer,
                    "expert": expert,
                    "beta": list(beta) if isinstance(beta, tuple) else beta,
                }
                for (layer, expert), beta in steering.betas.items()
            ],
        },
        "identification": None if identification is None else identification.to_dict(),
    }
    return write_text(path, json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


def read_steering(path: PathLike) -> SteeringFile:
    """Read a steering file; `.check(spec)` then says whether it is for a model.

    Raises:
        ConfigError: no such file, no steering file, another version, or damaged; names the file,
            the field and the remedy.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such steering file; check the path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON text ({error}); {_AGAIN}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ConfigError(
            f"{path}: field 'format' is {found!r:.80}, not {FORMAT!r}; this is no steering file"
        )
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise ConfigError(
            f"{path}: field 'version' is {data.get('version')!r:.80}, this release reads "
            f"{VERSION}; read it with the release that wrote it, or make it again"
        )
    try:
        model = _model(fields.section(data, "model"))
        steering = _steering(fields.section(data, "steering"))
        told = data.get("identification")
        found = None if told is None else Identification.from_dict(told)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {_AGAIN}") from error
    model.require(steering, str(path))
    return SteeringFile(steering=steering, model=model, identification=found, path=path)


def _model(data: Mapping[str, Any]) -> SteeredModel:
    return SteeredModel(
        model_id=fields.text(data, "id"),
        fingerprint=fields.text(data, "fingerprint"),
        tokenizer_id=fields.text(data, "tokenizer_id"),
        layer_ids=fields.whole_list(data, "layer_ids"),
        experts=fields.whole_list(data, "experts"),
    )


def _steering(data: Mapping[str, Any]) -> Steering:
    betas: dict[tuple[int, int], Beta] = {}
    for item in fields.objects(data, "experts"):
        name = fields.whole(item, "layer"), fields.whole(item, "expert")
        if name in betas:
            raise ConfigError(f"field 'experts' has expert {name[1]} of layer {name[0]} twice")
        beta = item.get("beta")
        betas[name] = (
            tuple(fields.finite(one, "beta") for one in beta)
            if isinstance(beta, list)
            else fields.finite(beta, "beta")
        )
    thinking = data.get("thinking")
    if thinking is not None and not (
        isinstance(thinking, list)
        and len(thinking) == 2
        and all(isinstance(one, str) for one in thinking)
    ):
        raise ConfigError(f"field 'thinking' has to be null or two texts, found {thinking!r:.80}")
    return Steering(
        betas=betas,
        method=cast(Method, fields.text(data, "method")),
        renormalise=fields.flag(data, "renormalise"),
        thinking=None if thinking is None else (thinking[0], thinking[1]),
    )
