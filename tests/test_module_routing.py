"""Readings of a call's tensors: which experts they say are used, by how many rows, how strongly."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.module_routing import Reading, readings


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Distinct experts `[T, K]` of each token, the number of experts, and weights `[T, K]`."""
    experts = draw(st.integers(3, 9))
    top_k = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 6))
    rows = [draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weights = torch.rand(tokens, top_k, generator=generator) + 0.01
    return torch.tensor(rows), experts, weights.sort(dim=1, descending=True).values


def first(tensors: list[torch.Tensor], tokens: int, experts: int, top_k: int) -> Reading:
    return next(readings(tensors, tokens=tokens, experts=experts, top_k=top_k))


def rows_of(chosen: torch.Tensor) -> dict[int, int]:
    experts, counts = chosen.unique(return_counts=True)
    return dict(zip(experts.tolist(), counts.tolist(), strict=True))


@given(routings())
def test_masks_indices_and_scores_of_one_routing_say_the_same(
    routing: tuple[torch.Tensor, int, torch.Tensor],
) -> None:
    chosen, experts, weights = routing
    tokens, top_k = chosen.shape
    one_hot = torch.nn.functional.one_hot(chosen, experts)
    scores = torch.zeros(tokens, experts).scatter(1, chosen, weights)
    forms = [
        [one_hot, weights],
        [one_hot.bool(), scores],
        [one_hot.sum(1), scores],
        [scores],
    ]
    if int(chosen.max()) > 1 or top_k != experts:
        forms.append([chosen, weights])
    for tensors in forms:
        reading = first(tensors, tokens, experts, top_k)
        assert reading.counts() == rows_of(chosen)
        assert list(reading.counts()) == sorted(reading.counts())
        access = reading.access(5, reading.counts())
        assert access.position == 5
        assert access.tokens.sum() == chosen.numel()
        index, found = reading.top_k([one for one in tensors if one.is_floating_point()])
        assert index.shape == (tokens, top_k)
        kept = torch.zeros(tokens, experts).scatter(1, index, found)
        if tensors[0] is one_hot and top_k > 1:
            continue  # a mask by choice does not say whose weight is whose
        assert torch.allclose(kept, scores)
        assert bool((found.diff(dim=1) <= 0).all())


@given(routings(), st.data())
def test_tokens_that_overflow_have_no_expert(
    routing: tuple[torch.Tensor, int, torch.Tensor], data: st.DataObject
) -> None:
    chosen, experts, _ = routing
    tokens = len(chosen)
    mask = torch.nn.functional.one_hot(chosen[:, :1], experts)
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    mask[gone] = 0
    reading = first([mask, torch.full((tokens, 1), 0.5)], tokens, experts, 1)
    assert reading.counts() == rows_of(chosen[~gone, 0])
    index, weights = reading.top_k([torch.full((tokens, 1), 0.5)])
    assert index[:, 0].tolist() == torch.where(gone, experts, chosen[:, 0]).tolist()
    assert weights[:, 0].tolist() == torch.where(gone, 0.0, 0.5).tolist()


def test_a_mask_may_be_indices_after_all() -> None:
    """As NLLB-MoE's experts read it in transformers 5: every token at experts 0 and 1."""
    mask = torch.eye(4, dtype=torch.int64)
    found = list(readings([mask, torch.full((4, 4), 0.25)], tokens=4, experts=4, top_k=1))
    assert [reading.name for reading in found] == ["mask 0", "indices 0", "scores 1"]
    assert found[1].counts() == {0: 12, 1: 4}
    index, weights = found[1].top_k([torch.full((4, 4), 0.25)])
    assert index.tolist() == [[0, 1, 4, 4]] * 4
    assert weights.tolist() == [[0.75, 0.25, 0.0, 0.0]] * 4


def test_what_is_no_routing_is_not_read() -> None:
    hidden = torch.randn(4, 7)
    lengths = torch.tensor([3, 9, 1, 12])
    assert not list(readings([hidden, lengths, torch.tensor(True)], tokens=4, experts=5, top_k=1))
    assert not list(readings([torch.full((4, 5), 2)], tokens=3, experts=5, top_k=1))
