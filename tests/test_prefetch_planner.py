"""When a load ahead of need is begun: never without spare link, and by its chance where it does
not fit."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.prefetch_planner import _worth_beginning


@given(chance=st.floats(0, 1), nbytes=st.integers(1, 10**9))
def test_no_spare_link_no_load(chance: float, nbytes: int) -> None:
    assert not _worth_beginning(chance, 0.0, nbytes)
    assert not _worth_beginning(chance, -1.0, nbytes)


@given(chance=st.floats(0, 1), nbytes=st.integers(1, 10**9), more=st.floats(1, 10))
def test_what_fits_is_free(chance: float, nbytes: int, more: float) -> None:
    assert _worth_beginning(chance, nbytes * more, nbytes)


@given(chance=st.floats(0.01, 0.99), part=st.floats(0.01, 0.99))
def test_what_does_not_fit_is_begun_where_it_gains_in_the_mean(chance: float, part: float) -> None:
    draw = random.Random(0)
    gained = sum(part if draw.random() < chance else part - 1 for _ in range(4000)) / 4000
    if abs(gained) > 0.05:
        assert _worth_beginning(chance, part * 1000, 1000) == (gained > 0)
