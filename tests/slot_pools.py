"""Random experts in slots, tokens and their routing, for tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_runtime.kernels import ExpertForm, Gate


@dataclass(frozen=True, kw_only=True)
class SlotCase:
    """One layer's call: what `slot_experts` takes. Sizes are T, K, S slots, D and I."""

    hidden: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    pool: tuple[torch.Tensor, ...]
    form: ExpertForm

    def to(self, device: str) -> SlotCase:
        return SlotCase(
            hidden=self.hidden.to(device),
            slots=self.slots.to(device),
            weights=self.weights.to(device),
            pool=tuple(stack.to(device) for stack in self.pool),
            form=self.form,
        )


def slot_case(
    *,
    tokens: int = 3,
    choices: int = 2,
    slots: int = 5,
    hidden: int = 40,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    gate: Gate | None = None,
    transposed: bool = False,
    bias: bool = False,
    absent: float = 0.2,
    seed: int = 0,
) -> SlotCase:
    """Experts that keep a token's scale; a share of the pairs is absent."""
    gate = Gate() if gate is None else gate
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    outer = 2 * width if gate.gated else width
    up, down = normal(slots, outer, hidden) / hidden**0.5, normal(slots, hidden, width) / width**0.5
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    pool = [up, down, *([normal(slots, outer), normal(slots, hidden)] if bias else [])]
    chosen = torch.stack(
        [torch.randperm(slots, generator=generator)[:choices] for _ in range(tokens)]
    )
    chosen[torch.rand(tokens, choices, generator=generator) < absent] = -1
    return SlotCase(
        hidden=normal(tokens, hidden).to(dtype),
        slots=chosen,
        weights=torch.rand(tokens, choices, generator=generator),
        pool=tuple(stack.to(dtype) for stack in pool),
        form=ExpertForm(
            up=0,
            down=1,
            up_bias=2 if bias else None,
            down_bias=3 if bias else None,
            transposed=transposed,
            activation=gate,
            gate=gate,
        ),
    )
