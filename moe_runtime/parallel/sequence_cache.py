"""Keys and values of all sequences on every rank; a step's rows see those of their sequences.

Knows transformers' cache classes; no ranks, no links.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.sequence_caches import check_cache

__all__ = ["Added", "SequenceCache"]

_Form = tuple[tuple[int, int], tuple[int, int]]  # heads and width of keys and of values


@dataclass(frozen=True, kw_only=True, eq=False)
class Added:
    """Keys and values of one form that rows have added, a row for each layer and sequence.

    Args:
        form: heads and width, of keys and of values.
        layers: of the cache, that have this form.
        layer, sequence: int64 `[n]`.
        numbers: `[n, length, key numbers + value numbers]`.
    """

    form: _Form
    layers: tuple[int, ...]
    layer: torch.Tensor
    sequence: torch.Tensor
    numbers: torch.Tensor


class SequenceCache(DynamicCache):
    """A dynamic cache that keeps what a call adds apart until it is known for all sequences.

    Args:
        model: a decoder-only model whose layers keep keys and values.

    Attributes:
        rows: int64 `[n]`, the sequence of each row of the coming layer; None: all, in order.
        count: how many of the rows are real; those after them are computed in vain. None: all.

    Raises:
        UnsupportedModelError: a layer whose past is no keys and values of each token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        check_cache(self, type(model).__name__)
        self.rows: torch.Tensor | None = None
        self.count: int | None = None
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the rows attend to; what they add is kept until `commit`."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(key_states.shape[0], device=key_states.device)
        count = len(rows) if self.count is None else self.count
        self._pending[layer_idx] = (rows[:count], key_states[:count], value_states[:count])
        layer: Any = self.layers[layer_idx]
        if not layer.is_initialized or not layer.keys.numel():
            return key_states, value_states
        keys, values = layer.keys, layer.values
        if self.rows is not None:
            keys, values = keys[rows], values[rows]
        if keys.shape[0] != key_states.shape[0]:
            raise UnsupportedModelError(
                f"layer {layer_idx} adds keys of {key_states.shape[0]} rows where "
                f"{keys.shape[0]} are held: its attention does not take rows as they come. Run it "
                "vanilla"
            )
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def take(self) -> list[Added]:
        """What rows have added since the last `take`, by form; the same forms on all ranks."""
        by_form: dict[_Form, list[int]] = {}
        for at, (_, key, value) in sorted(self._pending.items()):
            form = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
            by_form.setdefault(form, []).append(at)
        found = []
        for form, layers in sorted(by_form.items()):
            chosen = [self._pending[at] for at in layers]
            counts = torch.tensor([len(rows) for rows, _, _ in chosen])
            numbers = [
                torch.cat([one.transpose(1, 2).flatten(2) for one in pair], 2)
                for _, *pair in chosen
            ]
            sequence = torch.cat([rows for rows, _, _ in chosen])
            layer = torch.repeat_interleave(torch.tensor(layers), counts)
            found.append(
                Added(
                    form=form,
                    layers=tuple(layers),
                    layer=layer.to(sequence.device),
                    sequence=sequence,
                    numbers=torch.cat(numbers),
                )
            )
        self._pending.clear()
        return found

    def commit(self, added: Added) -> None:
        """Add to every sequence: each (layer, sequence) of the form once, in any order."""
        sequences = len(added.sequence) // len(added.layers)
        order = torch.argsort(added.layer * sequences + added.sequence)
        numbers = added.numbers[order].unflatten(0, (len(added.layers), sequences))
        (key_heads, key_width), (heads, width) = added.form
        split = [key_heads * key_width, heads * width]
        for at, part in zip(added.layers, numbers, strict=True):
            keys, values = part.split(split, 2)
            self.layers[at].update(
                keys.unflatten(2, (key_heads, key_width)).transpose(1, 2).contiguous(),
                values.unflatten(2, (heads, width)).transpose(1, 2).contiguous(),
            )

    def keep(self, rows: torch.Tensor) -> None:
        """Let all sequences go but these, in this order."""
        for layer in self.layers:
            one: Any = layer
            if one.is_initialized and one.keys.numel():
                one.keys, one.values = one.keys[rows], one.values[rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        layers: list[Any] = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
