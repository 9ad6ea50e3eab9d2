"""What a routing-path network, or the token-id table, does on sequences that were held out.

Knows no training and no file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from moe_runtime.predictors.path_network import PathNetwork
from moe_runtime.predictors.path_recall import PathRecall, RecallSum
from moe_runtime.predictors.path_sequences import PathSequence, Vocabulary
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, FloatArray

__all__ = ["first_rows", "network_recall", "sequence_logits", "table_recall"]


@torch.no_grad()
def network_recall(
    network: PathNetwork,
    sequences: Sequence[PathSequence],
    vocabulary: Vocabulary,
    grid: ExpertGrid,
    top_k: tuple[int, ...],
) -> PathRecall:
    """Recall on what follows each sequence's cut, the rows before being its prompt."""
    network.eval()
    total = RecallSum(grid, top_k)
    for one in sequences:
        if 0 < one.cut() < len(one):
            total.add(sequence_logits(network, vocabulary, one), one.topk_ids[one.cut() :])
    return total.result()


def sequence_logits(
    network: PathNetwork, vocabulary: Vocabulary, one: PathSequence
) -> NDArray[np.float32]:
    """Logits `[n - cut, G]` of what follows the cut of a sequence, given what comes before."""
    rows = torch.from_numpy(vocabulary.rows(one.token_ids))[None]
    cut = one.cut()
    if network.config.encoder_layers:
        prompt = rows[:, max(0, cut - network.config.window) : cut]
        read = network.encode(prompt, torch.tensor([prompt.shape[1]]))
        logits = network(rows[:, cut:], read)[0]
    else:
        logits = network(rows)[0, cut:]
    found: NDArray[np.float32] = logits.detach().numpy()
    return found


def table_recall(
    table: FloatArray,
    sequences: Sequence[PathSequence],
    vocabulary: Vocabulary,
    grid: ExpertGrid,
    top_k: tuple[int, ...],
) -> PathRecall:
    """What the token-id table does on the rows that `network_recall` measures."""
    total = RecallSum(grid, top_k)
    for one in sequences:
        if 0 < (cut := one.cut()) < len(one):
            total.add(table[vocabulary.rows(one.token_ids[cut:])], one.topk_ids[cut:])
    return total.result()


def first_rows(sequences: Sequence[PathSequence], rows: int) -> list[PathSequence]:
    """Sequences from the first on, until so many rows are measured."""
    chosen, have = [], 0
    for one in sequences:
        if have >= rows:
            break
        chosen.append(one)
        have += len(one) - one.cut()
    return chosen
