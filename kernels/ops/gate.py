"""`Gate`: what an expert does between its two products, as a value that a kernel can be built from.

Recognised by what a module's function computes, never by its class. Knows no weights and no slots.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

__all__ = ["CLAMPS", "FUNCTIONS", "Gate", "recognise"]

_log = logging.getLogger(__name__)

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
CLAMPS = ("none", "before", "after")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The activation of one expert, row by row.

    With a gate: `function(gate) * (up + shift)`, else `function(row)`.

    Args:
        function: one of `FUNCTIONS`; silu is `x * sigmoid(alpha * x)`.
        gated: rows `[n, 2I]` hold gate and up, and `[n, I]` comes out; else width stays.
        interleaved: gate and up alternate; else all of gate comes first.
        clamp: where the gate is cut at `limit` from above: nowhere, before the function, or after
            it. Up is then cut at `limit` from both sides.
        limit: the largest value, with a clamp.
        alpha: the slope inside silu's sigmoid.
        shift: what is added to up.
    """

    function: str = "silu"
    gated: bool = True
    interleaved: bool = False
    clamp: str = "none"
    limit: float = 0.0
    alpha: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"function={self.function!r}: known are {', '.join(FUNCTIONS)}")
        if self.clamp not in CLAMPS:
            raise ValueError(f"clamp={self.clamp!r}: known are {', '.join(CLAMPS)}")
        if not self.gated and (self.interleaved or self.clamp != "none" or self.shift):
            raise ValueError(f"{self}: only a gated expert interleaves, clamps or shifts")

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, 2I] -> [n, I]`, or `[n, I] -> [n, I]` without a gate, in the dtype of the rows."""
        if not self.gated:
            return self._function(rows)
        gate, up = (rows[..., ::2], rows[..., 1::2]) if self.interleaved else rows.chunk(2, -1)
        if self.clamp == "before":
            gate = gate.clamp(max=self.limit)
        gate = self._function(gate)
        if self.clamp == "after":
            gate = gate.clamp(max=self.limit)
        if self.clamp != "none":
            up = up.clamp(min=-self.limit, max=self.limit)
        return gate * (up + self.shift if self.shift else up)

    def _function(self, rows: torch.Tensor) -> torch.Tensor:
        if self.function == "silu":
            return (
                functional.silu(rows) if self.alpha == 1 else rows * (self.alpha * rows).sigmoid()
            )
        if self.function in ("gelu", "gelu_tanh"):
            return functional.gelu(rows, approximate=("none", "tanh")[self.function != "gelu"])
        if self.function == "identity":
            return rows
        positive = rows.relu()
        return positive if self.function == "relu" else positive * positive


# Values of gate and up that tell the candidates apart: small ones, where functions differ, and
# large ones of both signs, which clamps cut.
_SMALL = (-5.0, -2.3, -1.0, -0.4, -0.05, 0.0, 0.07, 0.5, 1.1, 2.7, 6.0)
_LARGE = (-20000.0, -300.0, -40.0, 45.0, 310.0, 30000.0)
_QUICK_GELU = 1.702


def recognise(
    activation: Callable[[torch.Tensor], torch.Tensor], *, gated: bool, constants: Sequence[float]
) -> Gate | None:
    """The gate that computes the same as a module's function, found by trying it.

    Args:
        activation: row by row, as `ExpertForm.activation`.
        constants: numbers that the module holds: limits and slopes are looked for among them.

    Returns:
        None if no gate agrees in float32 to 1e-5 everywhere, or the function cannot be tried. The
        first time for each kind of function, the log says so.
    """
    rows = _probe(constants, gated=gated)
    try:
        with torch.no_grad():
            wanted = activation(rows.clone())
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        _say_unknown(getattr(activation, "__qualname__", repr(activation)), str(error))
        return None
    if isinstance(wanted, torch.Tensor) and wanted.device.type == "cpu":
        for gate in _candidates(gated=gated, constants=constants):
            found = gate(rows)
            if found.shape == wanted.shape and torch.allclose(
                found, wanted.float(), rtol=1e-5, atol=1e-5
            ):
                return gate
    _say_unknown(getattr(activation, "__qualname__", repr(activation)), "no known gate agrees")
    return None


def _probe(constants: Sequence[float], *, gated: bool) -> torch.Tensor:
    beyond = [sign * 1.5 * float(value) for value in constants for sign in (-1, 1)]
    values = torch.tensor([*_SMALL, *_LARGE, *beyond])
    if not gated:
        return values.unsqueeze(0)
    # Every value of gate with every value of up, once for each of both arrangements.
    pairs = torch.cartesian_prod(values, values)
    return torch.stack([pairs.t().reshape(-1), pairs.reshape(-1)])


def _candidates(*, gated: bool, constants: Sequence[float]) -> Iterator[Gate]:
    numbers = sorted({float(value) for value in constants})
    slopes = sorted({1.0, _QUICK_GELU, *(value for value in numbers if value > 0)})
    functions = [("silu", slope) for slope in slopes]
    functions += [(name, 1.0) for name in FUNCTIONS if name != "silu"]
    if not gated:
        for name, slope in functions:
            yield Gate(function=name, alpha=slope, gated=False)
        return
    cuts = [("none", 0.0)]
    cuts += [(clamp, limit) for clamp in CLAMPS[1:] for limit in numbers if limit > 0]
    for (clamp, limit), shift, interleaved in itertools.product(cuts, (0.0, 1.0), (False, True)):
        for name, slope in functions:
            yield Gate(
                function=name, alpha=slope, interleaved=interleaved, clamp=clamp, limit=limit,
                shift=shift,
            )  # fmt: skip


@cache
def _say_unknown(name: str, reason: str) -> None:
    _log.warning(
        "the activation %s is computed by the model's own code between the products, not inside a "
        "Triton kernel: %s", name, reason,
    )  # fmt: skip
