"""The token path: what a token did before in the run, drawn to what its sequence did lately."""

from __future__ import annotations

import numpy as np
import pytest
from moe_runtime.predictors import token_path
from moe_runtime.predictors.base import StepRows
from moe_runtime.predictors.token_path import TokenPath

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError

GRID = ExpertGrid(layers=(0, 1), experts=(4, 3))


def step(path: TokenPath, tokens: list[int], sequences: list[int], *, decode: bool = True) -> None:
    path.begin_step(
        StepRows(
            token_ids=np.array(tokens),
            sequence_ids=np.array(sequences),
            positions=np.arange(len(tokens)),
            decode=decode,
        )
    )


def test_counts_of_a_token_are_drawn_to_the_sequences_path() -> None:
    path = TokenPath(GRID, strength=1.0, decay=0.0)
    step(path, [8, 8, 9], [0, 0, 1], decode=False)
    path.observe(0, np.array([[0, 1], [0, 2], [3, 2]]))
    path.observe(1, np.array([[0], [1], [2]]))
    step(path, [8, 7], [1, 0])
    # Token 8 twice: expert 0 twice, 1 and 2 once; sequence 1 was last at 2 and 3, 0 at 0 and 2.
    assert path.predict(0) == pytest.approx(np.array([[2, 1, 2, 1], [3, 0, 3, 0]]) / 3)
    assert path.predict(1) == pytest.approx(np.array([[1, 1, 1], [0, 3, 0]]) / 3)
    path.observe(0, np.array([[1, 0], [2, -1]]))
    step(path, [8, 7], [0, 1])
    assert path.predict(0) == pytest.approx(np.array([[0.75, 0.5, 0.5, 0], [0.5, 0.5, 0.5, 0]]))


def test_without_token_ids_it_is_the_decayed_path() -> None:
    path = TokenPath(GRID, decay=0.0)
    step(path, [-1], [3])
    path.observe(0, np.array([[1, 2]]))
    step(path, [-1], [3])
    assert path.predict(0).tolist() == [[0, 1, 1, 0]]
    path.reset()
    step(path, [-1], [3])
    assert not path.predict(0).any()


def test_a_long_run_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_path, "_KEPT_BYTES", 20 * 4 * (GRID.size + 2))
    path = TokenPath(GRID, decay=0.0)
    for token in range(50):
        step(path, [0, 100 + token], [0, 1])
        path.observe(0, np.array([[0, 1], [2, 3]]))
    assert len(path._counts) == 20
    step(path, [0, 100, 149], [9, 10, 11])
    found = path.predict(0)
    assert found[0].tolist() == pytest.approx([50 / 51, 50 / 51, 0, 0])
    assert not found[1].any()
    assert found[2].tolist() == [0, 0, 0.5, 0.5]


def test_a_bad_strength_is_named() -> None:
    with pytest.raises(ConfigError, match="strength"):
        TokenPath(GRID, strength=0.0)
