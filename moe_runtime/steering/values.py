"""`Steering`: which experts are reinforced by how much, and in which way.

Knows no model, no trace and no file form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from moe_runtime.errors import ConfigError

__all__ = ["Beta", "Method", "Steering"]

Method = Literal["multiply", "logit_bias", "force"]
# One factor for all rows of a batch, or one for each row.
Beta: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Steering:
    """What is done to the routers' choices.

    Args:
        betas: `{(layer, expert): beta}`; layers are the model's own absolute indices. One finite
            number of at least 0, or one for each row of the batch. 1 changes nothing (but "force"
            forces all the same), less than 1 suppresses.
        method: "multiply" is the paper's: where the router chose the expert its weight is
            multiplied by beta, after top-k and normalisation. "logit_bias" adds log(beta) to the
            router's logit before top-k. "force" puts the expert among the chosen ones, in the
            place of the one of least weight, and multiplies the weight.
        renormalise: afterwards scale a token's weights to the sum that they had.
        thinking: markers (start, end), as text: only what is between them is steered, the start
            marker's own position included, the end marker's not. None: everything is.

    Raises:
        ConfigError: a beta that is negative or not finite, or an unknown method.
    """

    betas: Mapping[tuple[int, int], Beta]
    method: Method = "multiply"
    renormalise: bool = False
    thinking: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(
                f"steering: unknown method {self.method!r}; there are "
                + ", ".join(repr(name) for name in get_args(Method))
            )
        for (layer, expert), beta in self.betas.items():
            for value in beta if isinstance(beta, tuple) else (beta,):
                if not math.isfinite(value) or value < 0:
                    raise ConfigError(
                        f"steering: beta of expert {expert} in layer {layer} has to be a finite "
                        f"number of at least 0, found {value!r}"
                    )
        object.__setattr__(self, "betas", MappingProxyType(dict(self.betas)))
