"""The forward call under way: phase, real and padding rows, whose tokens they are.

Read off the arguments of the model's own forward by a hook; knows no experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Step", "begin_step"]


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
    """

    rows: int = 0
    batch: int = 0
    past: int = 0
    decode: bool = False
    real: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    places: torch.Tensor | None = None
    sequence_ids: tuple[int, ...] | None = None

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
