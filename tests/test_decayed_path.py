"""The decayed path: a mean of a sequence's own choices, whoever runs beside it."""

from __future__ import annotations

import numpy as np
import pytest
from moe_runtime.predictors.base import StepRows
from moe_runtime.predictors.decayed_path import DecayedPath

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError

GRID = ExpertGrid(layers=(1, 3), experts=(4, 3))


def rows(sequences: list[int], positions: list[int], *, decode: bool) -> StepRows:
    return StepRows(
        token_ids=np.full(len(sequences), -1),
        sequence_ids=np.array(sequences),
        positions=np.array(positions),
        decode=decode,
    )


def test_a_token_weighs_less_with_each_that_follows() -> None:
    path = DecayedPath(GRID, decay=0.5)
    path.begin_step(rows([7], [0], decode=False))
    path.observe(0, np.array([[0, 1]]))
    path.begin_step(rows([7], [1], decode=True))
    assert path.predict(0).tolist() == [[1, 1, 0, 0]]
    assert path.predict(1).tolist() == [[0, 0, 0]]
    path.observe(0, np.array([[1, 3]]))
    path.begin_step(rows([7], [2], decode=True))
    assert path.predict(0).tolist() == [[0.5, 1, 0, 0.5]]


def test_a_prompt_counts_as_its_tokens_one_by_one() -> None:
    rng = np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(4), (6, 1)), axis=1)[:, :2]
    whole, single = DecayedPath(GRID, decay=0.6), DecayedPath(GRID, decay=0.6)
    whole.begin_step(rows([5] * 6, list(range(6)), decode=False))
    whole.observe(0, chosen)
    for position in range(6):
        single.begin_step(rows([5], [position], decode=position > 0))
        single.observe(0, chosen[position : position + 1])
    following = rows([5], [6], decode=True)
    whole.begin_step(following)
    single.begin_step(following)
    # A prompt's mean is of its tokens alone; one by one the first token stands for those before.
    weights = 0.4 * 0.6 ** np.arange(6)[::-1]
    hot = np.zeros((6, 4))
    np.put_along_axis(hot, chosen, 1.0, axis=1)
    assert whole.predict(0)[0] == pytest.approx(weights @ hot / weights.sum(), abs=1e-6)
    weights[0] /= 0.4
    assert single.predict(0)[0] == pytest.approx(weights @ hot, abs=1e-6)


def test_sequences_do_not_mix() -> None:
    path = DecayedPath(GRID)
    path.begin_step(rows([2, 2, 9], [0, 1, 0], decode=False))
    path.observe(0, np.array([[0], [0], [3]]))
    path.observe(1, np.array([[2], [2], [-1]]))  # no expert for the last
    path.begin_step(rows([9, 2], [1, 2], decode=True))
    assert path.predict(0).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert path.predict(1).tolist() == [[0, 0, 0], [0, 0, 1]]
    path.reset()
    path.begin_step(rows([9, 2], [1, 2], decode=True))
    assert not path.predict(0).any()


def test_a_bad_decay_is_named() -> None:
    with pytest.raises(ConfigError, match="decay"):
        DecayedPath(GRID, decay=1.0)
