"""What `steer` is asked for: one value of all the forms it takes, checked against the model.

Knows steering values and files, and a model's structure; no hooks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from moe_runtime.errors import ConfigError, UnsupportedModelError
from moe_runtime.model_spec import MoELayer, MoESpec
from moe_runtime.steering.files import read_steering
from moe_runtime.steering.values import Beta, Method, Steering

__all__ = ["SteeringLike", "batch_size", "by_layer", "require_possible", "resolve"]

# Betas may also be given as a list or an array, a number for each row of the batch.
SteeringLike: TypeAlias = (
    Steering | str | os.PathLike[str] | Mapping[tuple[int, int], Beta | Sequence[float]]
)


def resolve(
    given: SteeringLike,
    spec: MoESpec,
    method: Method | None,
    renormalise: bool | None,
    thinking: tuple[str, str] | None,
) -> Steering:
    """One value of the forms that `steer` takes."""
    if isinstance(given, Steering):
        found = given
    elif isinstance(given, str | os.PathLike):
        file = read_steering(given)
        file.check(spec)
        found = file.steering
    elif isinstance(given, Mapping):
        found = Steering(betas={_name(name): _beta(name, beta) for name, beta in given.items()})
    else:
        raise ConfigError(
            "steer takes {(layer, expert): beta}, a Steering or a steering file's path, found "
            f"{type(given).__name__}"
        )
    changes: dict[str, Any] = {"method": method, "renormalise": renormalise, "thinking": thinking}
    return replace(found, **{name: one for name, one in changes.items() if one is not None})


def _name(name: Any) -> tuple[int, int]:
    try:
        layer, expert = name
        return int(layer), int(expert)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"steer: {name!r:.80} names no expert; write {{(layer, expert): beta}}"
        ) from error


def _beta(name: Any, beta: Any) -> Beta:
    try:
        if isinstance(beta, Sequence) or bool(getattr(beta, "ndim", 0)):
            return tuple(float(one) for one in beta)
        return float(beta)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"steer: the beta of {name!r:.80} has to be a number, or one for each row of the "
            f"batch, found {beta!r:.80}"
        ) from error


def require_possible(steering: Steering, spec: MoESpec) -> None:
    """Whether a model can be steered so.

    Raises:
        ConfigError: it lacks an expert, or the options exclude each other.
        UnsupportedModelError: the method does not work with its kind of experts.
    """
    _require_experts(steering, spec)
    if steering.method == "logit_bias" and steering.renormalise:
        raise ConfigError(
            "steer: renormalise keeps the sum of a token's weights, but method='logit_bias' acts "
            "before there are any; leave one of them out"
        )
    for layer, betas in by_layer(steering, spec):
        if layer.modules and (steering.method == "force" or steering.renormalise):
            option = "renormalise" if steering.renormalise else "method='force'"
            raise UnsupportedModelError(
                f"steer: {option} does not work with {layer.path} ({layer.class_name}), whose "
                "experts are modules of their own; method='multiply' and 'logit_bias' do"
            )
        if steering.method == "force" and len(betas) > layer.top_k:
            raise ConfigError(
                f"steer: {len(betas)} experts are to be forced in layer {layer.layer}, but a token "
                f"has {layer.top_k}; force fewer"
            )


def _require_experts(steering: Steering, spec: MoESpec) -> None:
    """ConfigError unless the model has all the experts."""
    name = spec.model_id or spec.model_class
    counts = dict(zip(spec.grid.layers, spec.grid.experts, strict=True))
    for layer, expert in steering.betas:
        if layer not in counts:
            raise ConfigError(
                f"steer: layer {layer} of {name} has no routed experts; those with experts are "
                f"{_ranges(spec.grid.layers)}"
            )
        if not 0 <= expert < counts[layer]:
            raise ConfigError(
                f"steer: layer {layer} of {name} has {counts[layer]} experts, numbered from 0; "
                f"found expert {expert}"
            )


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7` for 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def batch_size(steering: Steering) -> int | None:
    """Rows that betas are given for; None if no beta differs between rows.

    Raises:
        ConfigError: they are given for several numbers of rows.
    """
    sizes = {
        len(beta): (layer, expert)
        for (layer, expert), beta in steering.betas.items()
        if isinstance(beta, tuple)
    }
    if len(sizes) > 1 or 0 in sizes:
        found = ", ".join(f"{size} for {name}" for size, name in sorted(sizes.items()))
        raise ConfigError(
            f"steer: betas for the rows of a batch have to be as many for every expert, and at "
            f"least one; found {found}"
        )
    return next(iter(sizes), None)


def by_layer(steering: Steering, spec: MoESpec) -> Iterator[tuple[MoELayer, dict[int, Beta]]]:
    """The layers in which something is to be done, with the betas of their experts."""
    for layer in spec.layers:
        betas = {e: beta for (at, e), beta in steering.betas.items() if at == layer.layer}
        flat = [b for beta in betas.values() for b in (beta if isinstance(beta, tuple) else [beta])]
        if betas and (steering.method == "force" or any(beta != 1 for beta in flat)):
            yield layer, betas
