"""Identification: as a naive count, blind to order and numbering, honest about small counts."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marked_traces import (
    END,
    MARKERS,
    START,
    naive_ends,
    naive_npmi,
    random_trace,
    rows_in_order,
)
from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.steering import Identification, identify
from moe_runtime.steering.markers import Marker, occurrences
from moe_runtime.steering.npmi import Tally, npmi
from moe_runtime.trace import UNUSED, RoutingTrace
from moe_runtime.trace_writer import TraceWriter

START_MARKER, END_MARKER, PAIR_MARKER = MARKERS
seeds = st.integers(0, 2**32)
few = settings(max_examples=25)


def found(trace: Any, tokens: Any = MARKERS, top: int = 1, **options: Any) -> Identification:
    """Identified with everything ranked that has an event."""
    return identify(
        trace, tokens, top, **{"least_joint": 1, "least_uses": 1, "bootstrap": 0, **options}
    )


def without_names(one: Identification) -> Identification:
    return replace(one, traces=())


def shuffled(trace: RoutingTrace, seed: int) -> RoutingTrace:
    order = np.random.default_rng(seed).permutation(len(trace))
    return replace(trace, **{name: column[order] for name, column in trace.columns().items()})


# -- nPMI ------------------------------------------------------------------------------------------


@given(st.integers(1, 10**9), st.data())
def test_npmi_is_between_its_ends(rows: int, data: st.DataObject) -> None:
    marked, uses = data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))
    least = max(0, marked + uses - rows)
    joint = data.draw(st.integers(least, min(marked, uses)))
    value = float(npmi(joint, marked, uses, rows))
    assert -1 <= value <= 1
    assert value == float(npmi(joint, uses, marked, rows))  # neither event comes first
    if 0 < joint < rows:
        above = joint * rows - marked * uses
        assert np.sign(round(value, 9)) in {0, np.sign(above)}


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        ((5, 5, 5, 100), 1.0),  # only together
        ((1, 10, 10, 100), 0.0),  # independent
        ((0, 10, 10, 100), -1.0),  # never together
        ((0, 0, 0, 100), -1.0),  # an event that never comes is never together with anything
        ((7, 7, 7, 7), 1.0),  # always both: the limit
        ((5, 10, 5, 100), np.log2(10) / np.log2(20)),
    ],
)
def test_npmi_of_known_counts(counts: tuple[int, int, int, int], value: float) -> None:
    assert float(npmi(*counts)) == pytest.approx(value, abs=1e-12)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 10))
def test_smoothing_keeps_independence_and_takes_the_cliff_away(
    marked: int, uses: int, rows: int, added: float
) -> None:
    rows = 10 * rows + marked * uses
    # joint / marked = uses / rows: independent with and without the added rows.
    assert abs(float(npmi(marked * uses / rows, marked, uses, rows, smoothing=added))) < 1e-9
    none, once = npmi([0, 1], [marked] * 2, [uses] * 2, [rows] * 2, smoothing=added)
    assert -1 < none < once <= 1
    # More rows added, less said: what never came together is nearer to 0.
    assert none <= float(npmi(0, marked, uses, rows, smoothing=2 * added))


def test_smoothing_is_as_counting_the_added_rows() -> None:
    # 4 of 20 rows are marked; 5 rows added that choose the expert as all do, in 8 of 20.
    assert float(npmi(3, 4, 8, 20, smoothing=5)) == float(npmi(3 + 2, 4 + 5, 8 + 2, 20 + 5))
    one = found(random_trace(17), smoothing=5.0)
    assert one.smoothing == 5.0
    assert min(value for expert in one.ranked for value in expert.npmi) > -1


# -- counting --------------------------------------------------------------------------------------


@few
@given(seeds, st.booleans())
def test_equals_a_naive_count(seed: int, prompt: bool) -> None:
    trace = shuffled(random_trace(seed, sequences=3, length=20, unknown=0.05), seed)
    markers = {m: w for m, w in MARKERS.items() if naive_ends(trace, m)}
    rows = trace.phase == 1
    if not prompt:  # some markers stand in the prompt alone
        markers = {m: w for m, w in markers.items() if rows[list(naive_ends(trace, m))].any()}
    one = found(trace, markers, prompt=prompt)
    tables = [naive_npmi(trace, marker, prompt=prompt) for marker in markers]
    for number, (table, told) in enumerate(zip(tables, one.tokens, strict=True)):
        expected = np.full_like(one.npmi_map(number), np.nan)
        for layer, line in enumerate(table):
            expected[layer, : len(line)] = line
        np.testing.assert_allclose(one.npmi_map(number), expected, atol=1e-6)
        ends = {r for r in naive_ends(trace, list(markers)[number]) if prompt or rows[r]}
        assert told.occurrences == len(ends)
        assert told.sequences == len({int(trace.sequence_ids[row]) for row in ends})
    for expert in one.ranked:
        at = trace.layer_ids.index(expert.layer)
        values = [table[at][expert.expert] for table in tables]
        np.testing.assert_allclose(expert.npmi, values, atol=1e-12)
        assert expert.score == pytest.approx(
            sum(w * v for w, v in zip(markers.values(), values, strict=True)), abs=1e-12
        )
    scores = [expert.score for expert in one.ranked]
    assert scores == sorted(scores, reverse=True)


@few
@given(seeds)
def test_order_and_numbering_do_not_matter(seed: int) -> None:
    trace = random_trace(seed)
    names = np.random.default_rng(seed).permutation(1000)[: trace.sequence_ids.max() + 1]
    renumbered = replace(trace, sequence_ids=names[trace.sequence_ids].astype(np.int32))
    assert found(shuffled(trace, seed)) == found(trace)
    assert found(renumbered) == found(trace)
    # The bootstrap draws sequences, and shuffled rows leave them as they are.
    assert found(shuffled(trace, seed), bootstrap=5) == found(trace, bootstrap=5)


@few
@given(seeds, st.integers(1, 40))
def test_recordings_add_up_whatever_their_numbering(seed: int, block: int) -> None:
    trace = random_trace(seed)
    first, rest = trace.select(sequences=[0, 1]), trace.select(sequences=[2, 3, 4, 5])
    rest = replace(rest, sequence_ids=rest.sequence_ids - 2)  # numbers that come again
    with pytest.MonkeyPatch.context() as patch:
        # By name: the package has the function of the module's name.
        module = importlib.import_module("moe_runtime.steering.identify")
        patch.setattr(module, "_BLOCK_ROWS", block)
        both = found([first, rest], bootstrap=5)
    assert without_names(both) == without_names(found(trace, bootstrap=5))


def test_files_and_parts_are_read_as_the_trace_in_memory(tmp_path: Path) -> None:
    trace = random_trace(3)
    with TraceWriter(tmp_path / "a.trace", rows_per_part=50) as writer:
        for start in range(0, len(trace), 25):
            writer.append(trace[start : start + 25])
        writer.flush()
        parts = without_names(found(tmp_path / "a.trace", bootstrap=20))
    whole = without_names(found(tmp_path / "a.trace.safetensors", bootstrap=20))
    assert parts == whole == without_names(found(trace, bootstrap=20))


def test_an_expert_named_twice_in_a_row_is_used_once() -> None:
    trace = random_trace(4, unused=0.0)
    twice = trace.topk_ids.copy()
    twice[:, :, 2] = twice[:, :, 0]
    once = twice.copy()
    once[:, :, 2] = UNUSED
    assert found(replace(trace, topk_ids=twice)) == found(replace(trace, topk_ids=once))


def test_counting_leaves_the_trace_as_it_is() -> None:
    trace = random_trace(4, layers=1, sequences=1)
    ids = trace.topk_ids.copy()
    ids[:, :, 1] = ids[:, :, 0]
    trace = replace(trace, topk_ids=ids)
    found(trace)
    np.testing.assert_array_equal(trace.topk_ids, ids)


# -- the bootstrap ---------------------------------------------------------------------------------


def drawn(trace: RoutingTrace, times: np.ndarray[Any, Any]) -> RoutingTrace:
    """The trace with each sequence as often as it was drawn, every copy a sequence of its own."""
    parts, number = [], 0
    for sequence, rows in enumerate(rows_in_order(trace)):
        for _ in range(times[sequence]):
            part = trace.select(rows=np.array(rows))
            parts.append(replace(part, sequence_ids=np.full(len(rows), number, np.int32)))
            number += 1
    return RoutingTrace.concat(parts)


@few
@given(seeds)
def test_a_replicate_is_a_count_of_the_sequences_drawn(seed: int) -> None:
    trace = random_trace(seed, sequences=4)
    draws = np.random.default_rng(seed).multinomial(4, [0.25] * 4, size=3).astype(np.uint16)
    ends = [occurrences(m, trace.token_ids, trace.sequence_ids, trace.positions) for m in MARKERS]
    marked = np.stack([np.isin(np.arange(len(trace)), rows) for rows in ends])
    tally = Tally(trace.grid, len(MARKERS), draws)
    for rows in np.array_split(np.arange(len(trace)), 7):
        tally.add(trace.topk_ids[rows], trace.sequence_ids[rows].astype(np.int64), marked[:, rows])
    for number, times in enumerate(draws):
        again = drawn(trace, times)
        for place, marker in enumerate(MARKERS):
            expected = np.concatenate(naive_npmi(again, marker))
            value = tally.replicate(number)[0][place]
            known = ~np.isnan(expected)
            np.testing.assert_allclose(value[known], expected[known], atol=1e-12)


def test_the_seed_decides_the_bootstrap() -> None:
    trace = random_trace(5)
    first, again = found(trace, bootstrap=30), found(trace, bootstrap=30)
    other = found(trace, bootstrap=30, seed=1)
    assert first == again
    assert [one.interval for one in first.ranked] != [one.interval for one in other.ranked]
    assert [one.score for one in first.ranked] == [one.score for one in other.ranked]


def test_what_the_bootstrap_says_fits_together() -> None:
    one = found(random_trace(6, sequences=12), bootstrap=100, top=2)
    assert one.bootstrap == 100
    assert sum(expert.stability or 0 for expert in one.ranked) <= 2 + 1e-9
    for expert in one.ranked:
        assert expert.interval is not None
        assert expert.ranks is not None
        assert expert.interval[0] <= expert.interval[1]
        assert 1 <= expert.ranks[0] <= expert.ranks[1] <= one.rankable


def test_a_replicate_without_a_marker_is_drawn_again() -> None:
    trace = random_trace(7, sequences=5)
    tokens = trace.token_ids.copy()
    tokens[(tokens == END) & (trace.sequence_ids > 0)] = 9  # in one sequence of five
    one = found(replace(trace, token_ids=tokens), bootstrap=200)
    assert one.redrawn > 30  # a third of all draws lack it
    assert found(trace, bootstrap=200).redrawn == 0


def test_one_sequence_has_no_intervals() -> None:
    one = found(random_trace(8, sequences=1), bootstrap=50)
    assert one.bootstrap == 0
    assert all(expert.interval is None and expert.stability is None for expert in one.ranked)


# -- ranking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_expert_is_found(seed: int) -> None:
    trace = random_trace(seed, sequences=40, layers=4, unused=0.0)
    layer, expert = 2, 1
    ids = trace.topk_ids.copy()
    for token, chosen in ((START, True), (END, False)):
        at = np.flatnonzero(trace.token_ids == token)
        has = (ids[at, layer] == expert).any(axis=1)
        if chosen:
            ids[at[~has], layer, 0] = expert
        else:
            ids[at, layer] = np.where(ids[at, layer] == expert, UNUSED, ids[at, layer])
    one = identify(
        replace(trace, topk_ids=ids), {START_MARKER: 1.0, END_MARKER: -1.0}, 1, bootstrap=100
    )
    assert one.chosen == ((trace.layer_ids[layer], expert),)
    assert one.ranked[0].stability is not None
    assert one.ranked[0].stability > 0.95
    assert one.ranked[0].joint == (40, 0)


def made(chosen: list[list[list[int]]], tokens: list[int], **changes: Any) -> RoutingTrace:
    """One sequence; `chosen[row][layer]` lists experts of 6."""
    rows, layers = len(tokens), len(chosen[0])
    ids = np.full((rows, layers, 2), UNUSED, np.uint16)
    for row, line in enumerate(chosen):
        for layer, experts in enumerate(line):
            ids[row, layer, : len(experts)] = experts
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=np.zeros(ids.shape, np.float16),
        token_ids=np.array(tokens, np.int32),
        sequence_ids=np.zeros(rows, np.int32),
        positions=np.arange(rows, dtype=np.int32),
        phase=np.zeros(rows, np.uint8),
        step_ids=np.arange(rows, dtype=np.int32),
        layer_ids=tuple(range(10, 10 + layers)),
        experts=(6,) * layers,
        **changes,
    )


def test_ties_go_by_joint_count_then_layer_then_number() -> None:
    # Experts 1 and 2 of both layers: at every start and nowhere else, so all have nPMI 1.
    trace = made([[[1, 2], [1, 2]]] * 3 + [[[0], [0]]] * 5, [START] * 3 + [9] * 5)
    one = found(trace, {START_MARKER: 1.0}, 3)
    assert one.chosen == ((10, 1), (10, 2), (11, 1))
    assert [expert.tied for expert in one.ranked[:4]] == [4, 4, 4, 4]
    assert one.tied_out == 1
    # Two scores of exactly 1 from different counts: the one seen more often is first.
    fewer = made(
        [[[1], [3]]] * 2 + [[[], [3]]] * 2 + [[[0], [0]]] * 4, [START] * 2 + [START] * 2 + [9] * 4
    )
    assert found(fewer, {START_MARKER: 1.0}, 1).chosen == ((11, 3),)
    assert found(fewer, {START_MARKER: 1.0}, 1).ranked[0].tied == 2


def test_experts_with_few_events_are_not_ranked() -> None:
    trace = random_trace(9, sequences=8)
    one = found(trace, least_joint=4, least_uses=60)
    assert 0 < one.rankable < sum(trace.experts)
    ranked = {(expert.layer, expert.expert) for expert in one.ranked}
    everything = {(expert.layer, expert.expert): expert for expert in found(trace, top=20).ranked}
    for name, expert in everything.items():
        enough = expert.joint[0] >= 4 and expert.uses >= 60
        assert (name in ranked) == enough
        score = one.score_map()[trace.layer_ids.index(name[0]), name[1]]
        assert np.isnan(score) != enough
    with pytest.raises(TraceError, match=r"0 experts have 1000 rows with the markers.*lower"):
        found(trace, least_joint=1000)


def test_an_expert_that_never_met_a_marker_is_not_chosen() -> None:
    # By the bare formula expert 5 has -(1 - 1 - 1) = 1, more than expert 0 with its 0.
    trace = made([[[0, 1]], [[0, 1]], [[0, 1]], [[0, 5]], [[0, 5]]], [START, END, 5, 9, 9])
    one = identify(trace, MARKERS, 1, least_joint=1, least_uses=1, bootstrap=0)
    assert (10, 5) not in {(expert.layer, expert.expert) for expert in one.ranked}


def test_a_layer_that_no_marker_reached_is_not_ranked() -> None:
    trace = made([[[1], []], [[2], []], [[3], [4]], [[3], [4]]], [START, END, 9, 9])
    one = found(trace, {START_MARKER: 1.0, END_MARKER: -1.0}, 1)
    assert {expert.layer for expert in one.ranked} == {10}
    assert np.isnan(one.npmi_map(0)[1]).all()


def test_negative_coefficients_alone_rank_by_avoidance_of_the_markers() -> None:
    one = found(random_trace(10), {END_MARKER: -2.0}, 1)
    assert all(expert.joint[0] >= 1 for expert in one.ranked)
    assert one.ranked[0].score == -2.0 * one.ranked[0].npmi[0]


# -- rows that count -------------------------------------------------------------------------------


def test_the_prompt_is_counted_or_not() -> None:
    trace = random_trace(11)  # the start marker is in the prompt, the others are not
    with_prompt = found(trace)
    assert with_prompt.prompt
    assert with_prompt.rows == len(trace)
    without = found(trace, {END_MARKER: 1.0}, prompt=False)
    assert not without.prompt
    assert without.rows == int((trace.phase == 1).sum())
    alone = found(trace.decode(), {END_MARKER: 1.0})
    assert without.ranked == alone.ranked
    with pytest.raises(TraceError, match=r"'start' does not occur.*but 6 times in prompts"):
        found(trace, prompt=False)
    with pytest.raises(TraceError, match="none of 180 rows is of decoding"):
        found(replace(trace, phase=np.zeros(len(trace), np.uint8)), prompt=False)


def test_a_marker_that_begins_in_the_prompt_counts_where_it_ends() -> None:
    trace = random_trace(12)
    phase = (trace.positions >= 4).astype(np.uint8)  # between the two tokens of the pair
    one = found(replace(trace, phase=phase), {PAIR_MARKER: 1.0}, prompt=False)
    assert one.tokens[0].occurrences >= 6


def test_rows_of_unknown_tokens_are_left_out_and_told() -> None:
    trace = random_trace(13, unknown=0.2)
    one = found(trace)
    assert one.unknown_rows == int((trace.token_ids < 0).sum()) > 0
    assert one.rows + one.unknown_rows == len(trace)


# -- bad input -------------------------------------------------------------------------------------


def test_refusals_say_what_to_do() -> None:
    trace = random_trace(14)
    unknown = replace(trace, token_ids=np.full(len(trace), -1, np.int32))
    with pytest.raises(TraceError, match=r"no token ids.*record the model"):
        found(unknown)
    with pytest.raises(TraceError, match="has no rows"):
        found(trace[:0])
    with pytest.raises(TraceError, match="no recordings"):
        found([])
    with pytest.raises(TraceError, match="fingerprint beef, the model at hand has cafe"):
        found(trace, fingerprint="cafe")
    found(trace, fingerprint="beef")
    other = replace(trace, fingerprint="cafe")
    with pytest.raises(TraceError, match=r"number 2.*fingerprint cafe.*one with beef"):
        found([trace, other])
    fewer = replace(random_trace(14, layers=2), fingerprint="")
    with pytest.raises(TraceError, match="put together traces of one model"):
        found([trace, fewer])
    with pytest.raises(TraceError, match=r"'gone' does not occur in the 180 rows"):
        found(trace, {Marker(text="gone", variants=((77,),)): 1.0})
    with pytest.raises(ConfigError, match="'<think>' is a text; give the model's tokenizer"):
        identify(trace)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tokens": {}}, "no markers"),
        ({"tokens": {START_MARKER: 0.0}}, "coefficient of marker 'start'.*found 0.0"),
        ({"tokens": {START_MARKER: np.nan}}, "finite number"),
        ({"top": 0}, "top has to be 1 or more"),
        ({"least_joint": 0}, "least_joint has to be 1"),
        ({"bootstrap": -1}, "bootstrap cannot be negative"),
        ({"smoothing": -1.0}, "smoothing is a number of at least 0, found -1.0"),
        ({"smoothing": np.nan}, "smoothing is a number"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        found(random_trace(15), **options)


def test_progress_ends_at_all_rows() -> None:
    told: list[tuple[int, int]] = []
    trace = random_trace(16)
    found([trace, trace], progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * len(trace), 2 * len(trace))
    assert told == sorted(told)


def test_the_tally_of_nothing_is_empty() -> None:
    tally = Tally(ExpertGrid(layers=(3,), experts=(4,)), 1)
    tally.add(np.zeros((0, 1, 2), np.uint16), np.zeros(0, np.int64), np.zeros((1, 0), np.bool_))
    assert not tally.uses.any()
    assert (tally.npmi() == -1).all()
