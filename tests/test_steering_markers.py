"""Markers: how a text becomes tokens, where it ends in a recording, what is near it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import moe_runtime
from marked_traces import naive_ends, random_trace
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.steering import identify
from moe_runtime.steering.markers import Marker, marker_of, near_tokens, occurrences


@pytest.fixture(scope="module")
def bundled() -> Any:
    return AutoTokenizer.from_pretrained(moe_runtime.bundled_model())


def words(*known: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, for which all others are unknown."""
    vocabulary = {word: at for at, word in enumerate(["[UNK]", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_a_single_token_is_one_variant(bundled: Any) -> None:
    assert marker_of(bundled, "<think>").variants == ((3,),)
    assert marker_of(bundled, "</think>").variants == ((4,),)


@pytest.mark.parametrize("text", ["Alternatively", "Answer:", "the", "wait, no"])
@pytest.mark.parametrize("before", ["", " ", "\n", "So ", "one two.\n"])
def test_a_marker_is_found_in_running_text(bundled: Any, text: str, before: str) -> None:
    ids = bundled.encode(before + text + " x", add_special_tokens=False)
    zeros = np.zeros(len(ids), np.int32)
    places = np.arange(len(ids), dtype=np.int32)
    rows = occurrences(marker_of(bundled, text), np.array(ids, np.int32), zeros, places)
    # It ends where the text up to the marker's end does.
    end = len(bundled.encode(before + text, add_special_tokens=False)) - 1
    assert rows.tolist() == [end]


def test_near_tokens_are_suggested(bundled: Any) -> None:
    assert near_tokens(bundled, "<thinking>")[:2] == ("<think>", "</think>")
    assert near_tokens(bundled, "<thinking>", among=[4, 5, 6]) == ("</think>",)
    assert near_tokens(bundled, "~~~~~~~~~~~~~~~~~~~~~~~~~") == ()


def test_a_text_without_tokens_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'begni' is not in the tokenizer's.*'begin'"):
        marker_of(words("begin", "end"), "begni")
    assert marker_of(words("begin", "end"), "begin").variants == ((1,),)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_marker_is_refused(bundled: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="a marker needs a text"):
        marker_of(bundled, text)


def test_a_marker_that_never_comes_names_near_ones(bundled: Any) -> None:
    trace = random_trace(0, token_ids=np.full(180, 3, np.int32))
    with pytest.raises(TraceError, match=r"'<thinking>' does not.*near it that do: '<think>'"):
        identify(trace, {"<thinking>": 1.0}, tokenizer=bundled)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(
        TraceError, match=r"token id 11, the tokenizer has 2 tokens.*some/tokenizer"
    ):
        identify(random_trace(0), {"begin": 1.0}, tokenizer=words("begin"))


@given(st.integers(0, 2**32), st.data())
def test_occurrences_equal_a_naive_search(seed: int, data: st.DataObject) -> None:
    """In any order of rows, over any sequences, variants of any length."""
    random = np.random.default_rng(seed)
    trace = random_trace(0, sequences=2, length=12)
    trace = trace.select(rows=np.sort(random.permutation(24)))
    tokens = random.integers(0, 2, 24).astype(np.int32)
    ids = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
    variants = tuple(data.draw(st.lists(ids, min_size=1, max_size=3, unique=True)))
    marker = Marker(text="m", variants=variants)
    order = random.permutation(24)
    columns = {name: column[order] for name, column in trace.columns().items()}
    columns["token_ids"] = tokens
    shuffled = type(trace)(**columns, **trace.description())
    rows = occurrences(marker, tokens, shuffled.sequence_ids, shuffled.positions)
    assert rows.tolist() == sorted(naive_ends(shuffled, marker))


def test_tokens_apart_are_no_marker() -> None:
    pair = Marker(text="pair", variants=((3, 4),))
    tokens = np.array([3, 4, 3, 4, 3, 4], np.int32)
    sequences = np.array([0, 0, 0, 1, 2, 2], np.int32)
    positions = np.array([0, 1, 2, 3, 5, 7], np.int32)
    assert occurrences(pair, tokens, sequences, positions).tolist() == [1]


def test_a_marker_needs_tokens() -> None:
    with pytest.raises(ConfigError, match="'x' has no tokens"):
        Marker(text="x", variants=((),))
