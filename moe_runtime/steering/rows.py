"""Which rows of the forward call under way are steered, and by which row's beta.

Hooks into the modules whose calls have tokens of their own; knows no experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_runtime.errors import AttachError, ConfigError
from moe_runtime.steering.spans import ThinkingSpans
from moe_runtime.steps import Step, begin_step

__all__ = ["CallRows"]


class CallRows:
    """The rows of the present forward call. One for a block of steering; one call at a time.

    Args:
        batch: the rows that betas are given for; None if they are the same for all.
        new_spans: makes the spans to keep to, for each stack of layers; None to steer everything.
        runtime_step: the step as the attached runtime has read it, if there is one.

    Attributes:
        batch: as given.
        active: which rows of the experts' input are steered: None for all, False for none, bool
            `[rows]` for some.
        owner: int64 `[rows]`, the batch's row of each; None unless betas differ between rows.
    """

    def __init__(
        self,
        *,
        batch: int | None,
        new_spans: Callable[[], ThinkingSpans] | None,
        runtime_step: Callable[[], Step | None],
    ) -> None:
        self.active: torch.Tensor | bool | None = None if new_spans is None else False
        self.owner: torch.Tensor | None = None
        self.batch = batch
        self._new_spans = new_spans
        self._runtime_step = runtime_step
        self._spans: dict[int, ThinkingSpans] = {}
        self._last_spans: ThinkingSpans | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Positions inside thinking spans so far, of each row of the last call."""
        return self._last_spans.counts if self._last_spans is not None else ()

    @property
    def only_padding(self) -> bool:
        """Whether rows are treated alike but for padding."""
        return self.batch is None and self._new_spans is None

    def install(self, modules: list[nn.Module]) -> list[RemovableHandle]:
        """Hook into the modules of `steps.step_modules`."""
        return [one.register_forward_pre_hook(self._begin, with_kwargs=True) for one in modules]

    def steered(self, rows: int, path: str) -> torch.Tensor | bool | None:
        """`active` for an experts module of the call whose input has so many rows.

        Raises:
            AttachError: these are not the rows of the call, and rows are not all treated alike.
        """
        known = self.active if self.owner is None else self.owner
        if not isinstance(known, torch.Tensor):
            if self.batch is None:
                return self.active
            found = "no forward call of the model was seen"
        elif len(known) == rows:
            return self.active
        elif self.only_padding:
            return None  # which of them are padding cannot be told
        else:
            found = f"the model's call has {len(known)}"
        raise AttachError(
            f"{path} is called with {rows} rows, {found}: which row belongs to which sequence "
            "cannot be told; run the model itself inside moe_runtime.steer"
        )

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # as in `experts_hook`
            self._uncompiled(module, args, kwargs)
        else:
            self._read(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._read(module, args, kwargs)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.only_padding:
            ids = kwargs.get("input_ids")
            if ids is not None and ids.numel() == 1:  # a decode step of one sequence: no padding
                self.active = None
                return
        step = self._runtime_step() or begin_step(kwargs, args)
        if self.batch is not None:
            self._assign(step, self.batch)
        self.active = step.real
        if self._new_spans is not None:
            self.active = self._thinking(id(module), step, self._new_spans)

    def _assign(self, step: Step, batch: int) -> None:
        if step.batch != batch:
            raise ConfigError(
                f"betas are given for a batch of {batch} rows, the forward call has {step.batch}"
                " (generate makes a row of each beam and of each of num_return_sequences)"
            )
        self.owner = torch.arange(batch).repeat_interleave(step.rows // batch)

    def _thinking(
        self, stack: int, step: Step, new_spans: Callable[[], ThinkingSpans]
    ) -> torch.Tensor | bool | None:
        if step.token_ids is None:
            raise AttachError(
                "thinking spans are found by token ids, but this call has none (inputs_embeds); "
                "call the model with input_ids, or steer without thinking="
            )
        if stack not in self._spans:
            self._spans[stack] = new_spans()
        spans = self._last_spans = self._spans[stack]
        shape = (step.batch, step.rows // step.batch)
        inside = spans.advance(
            step.token_ids.reshape(shape).cpu(),
            past=step.past,
            real=None if step.real is None else step.real.reshape(shape),
            names=step.sequence_ids,
        )
        if isinstance(inside, torch.Tensor):
            return inside.reshape(-1)
        return None if inside else False
