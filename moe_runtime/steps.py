"""The forward call under way: phase, real and padding rows, whose tokens they are.

Read off the arguments of the model's own forward by a hook; knows no experts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["SequenceNumbers", "Step", "begin_step", "is_calling", "step_modules"]


@dataclass(eq=False)
class Step:
    """One forward call of the model.

    Attributes:
        rows: rows of the experts' input (batch x length), 0 if it cannot be told.
        past: tokens already in the key/value cache before this call.
        batch: sequences.
        decode: one new token for each sequence, after earlier ones.
        real: bool `[rows]`, False for padding; None if every row is real.
        token_ids: int64 `[rows]`, None if the call had embeddings instead.
        places: int64 `[rows]`, place of each row in its sequence, padding not counted; None if
            there is no padding.
        sequence_ids: number of each sequence of the batch, where the caller gave them
            (`Runtime.sequences`); else None.
        ended: whether the call has ended well; None if nobody will tell.
    """

    rows: int = 0
    batch: int = 0
    past: int = 0
    decode: bool = False
    real: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    places: torch.Tensor | None = None
    sequence_ids: tuple[int, ...] | None = None
    ended: bool | None = None

    @property
    def tokens(self) -> int:
        """Rows that are no padding."""
        return self.rows if self.real is None else int(self.real.sum())

    def positions(self) -> torch.Tensor:
        """int64 `[rows]`: place of each row in its sequence, padding not counted."""
        if self.places is not None:
            return self.places
        length = self.rows // max(self.batch, 1)
        return torch.arange(self.past, self.past + length).repeat(self.batch)


def step_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose calls are forward calls of their own.

    The model; of an encoder-decoder model its encoder and its decoder, which have tokens of their
    own, and of which `generate` calls the encoder past the model's forward.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [model]
    stacks = [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
    apart = len({id(stack) for stack in (model, *stacks)}) == 3
    return stacks if apart else [model]


class SequenceNumbers:
    """Numbers the sequences of a run, from 0: new ones when a call starts with an empty cache.

    Later calls are taken to go on with the same sequences in the same order, unless they say whose
    rows they have (`Step.sequence_ids`).
    """

    def __init__(self) -> None:
        self._next = self._first = 0
        self._named: dict[int, int] = {}

    def of(self, step: Step) -> list[int]:
        """The number of each sequence of a call's batch. Mutates."""
        if step.sequence_ids is not None:
            for given in step.sequence_ids:
                if not step.past or given not in self._named:
                    self._named[given] = self._next
                    self._next += 1
            return [self._named[given] for given in step.sequence_ids]
        batch = max(step.batch, 1)
        if not step.past:
            self._first = self._next
            self._next += batch
        return list(range(self._first, self._first + batch))


def is_calling(thread: int, hooks_of: object) -> bool:
    """Whether a thread is inside a call of a module that has forward hooks of this object."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and any(
            getattr(hook, "__self__", None) is hooks_of
            for hook in module._forward_pre_hooks.values()
        ):
            return True
        frame = frame.f_back
    return False


def begin_step(arguments: Mapping[str, Any], positional: tuple[Any, ...]) -> Step:
    """Read a forward call's arguments. Anything unusual leaves fields at "cannot be told"."""
    ids = arguments.get("input_ids")
    if ids is None and positional and isinstance(positional[0], torch.Tensor):
        ids = positional[0]
    source = ids if ids is not None else arguments.get("inputs_embeds")
    if not isinstance(source, torch.Tensor) or source.dim() < 2:
        return Step()
    batch, length = int(source.shape[0]), int(source.shape[1])
    step = Step(rows=batch * length, batch=batch, past=_past_length(arguments))
    step.decode = length == 1 and step.past > 0
    if isinstance(ids, torch.Tensor) and ids.dim() == 2:
        step.token_ids = ids.reshape(-1)
    columns = _real_columns(arguments.get("attention_mask"), batch, length, step.past)
    if columns is not None and not bool(columns.all()):
        columns = columns.to("cpu")
        places = columns.cumsum(1)[:, -length:] - 1
        step.places = places.clamp_min(0).reshape(-1)
        real = columns[:, -length:].reshape(-1)
        step.real = None if bool(real.all()) else real
    return step


def _past_length(arguments: Mapping[str, Any]) -> int:
    cache = arguments.get("past_key_values")
    measure = getattr(cache, "get_seq_length", None)
    if measure is None:
        return 0
    try:
        return int(measure())
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return 0


def _real_columns(mask: Any, batch: int, length: int, past: int) -> torch.Tensor | None:
    """Bool `[batch, columns]`, False for padding; the call's rows are the last `length` columns."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor) or mask.shape[0] != batch:
        return None
    if mask.dim() == 2 and mask.shape[1] >= length:
        # The mask spans the cache too. A static cache's may be longer than what is filled.
        return mask[:, : max(past + length, length)] != 0
    if mask.dim() == 4 and past == 0 and mask.shape[-2] == length and mask.shape[-1] >= length:
        # A mask made ahead: a column is real if any row attends to it. Where a backend lets
        # padding rows attend to everything, only each row's own column tells.
        square = mask[:, 0, :, :length]
        seen = square if square.dtype == torch.bool else square == 0
        own = seen.diagonal(dim1=1, dim2=2)
        return own if bool(seen[:, 0].all(1).any()) and length > 1 else seen.any(dim=1)
    return None
