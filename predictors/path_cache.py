"""Keys and values of the sequences that a routing-path network is reading.

Knows columns and slots, not what is computed with them.
"""

from __future__ import annotations

import torch
from moe_runtime.predictors.path_config import PathConfig

__all__ = ["CHUNK", "PathCache"]

CHUNK = 64  # tokens of one sequence that are computed at once where a cache is filled


class PathCache:
    """Keys and values of sequences that go on: a ring of columns for each slot.

    Args:
        slots: sequences that there is room for.

    Attributes:
        positions: int64 `[slots, C]`, place of the token in each column; far below 0 if none.
    """

    NOWHERE = -(1 << 40)

    def __init__(self, config: PathConfig, slots: int) -> None:
        # A chunk is written before it attends, so it must not overwrite what its first token sees.
        self.columns = config.window + CHUNK - 1
        shape = (config.decoder_layers, slots, config.heads, self.columns, config.d_kv)
        self.keys = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self.positions = torch.full((slots, self.columns), self.NOWHERE)

    def __len__(self) -> int:
        """Number of slots."""
        return len(self.positions)

    def grow(self, slots: int) -> None:
        """Make room for so many sequences; what is there stays. Mutates."""
        more = slots - len(self)
        if more > 0:
            shape = list(self.keys.shape)
            shape[1] = more
            self.keys = torch.cat([self.keys, torch.zeros(shape)], dim=1)
            self.values = torch.cat([self.values, torch.zeros(shape)], dim=1)
            empty = torch.full((more, self.columns), self.NOWHERE)
            self.positions = torch.cat([self.positions, empty])

    def cut(self, slot: int, position: int) -> None:
        """Forget a sequence's tokens from this place on. Mutates."""
        row = self.positions[slot]
        row[row >= position] = self.NOWHERE
