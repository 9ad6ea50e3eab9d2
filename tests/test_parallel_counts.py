"""What a run says it sent, against a count made from the routing alone, row by row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.plan import Plan

from moe_runtime.errors import ConfigError
from moe_runtime.model_spec import read_spec
from moe_runtime.parallel.run import ParallelRun
from moe_runtime.parallel.shares import shares_of
from moe_runtime.trace import RoutingTrace
from parallel_models import LENGTHS, on_threads, random_plan, some_prompts, tiny
from tiny import HIDDEN

STEPS, FRAME = 6, 8
KV = 2 * 2 * 8 * 4  # keys and values of one layer: 2 heads of 8 in float32
CALLS = STEPS - 1  # the first token comes from the prefill


def owners(plan: Plan) -> list[list[int]]:
    return [[hosts[0] for hosts in layer.hosts] for layer in plan.layers]


def by_sequence(trace: RoutingTrace) -> dict[int, list[np.ndarray]]:
    """Chosen experts `[layers, k]` of each decode row, heaviest first, by prompt and place."""
    rows: dict[int, list[np.ndarray]] = {}
    for sequence, ids in zip(trace.sequence_ids.tolist(), trace.topk_ids, strict=True):
        rows.setdefault(sequence, []).append(ids.astype(int))
    return rows


def counted_coherent(run: ParallelRun, plan: Plan, ranks: int, top_k: int) -> dict[str, Any]:
    """Walk each row through its experts' ranks; rows begin where they ended."""
    assert run.routing is not None
    counts: Counter[str] = Counter()
    owner = owners(plan)
    moved = HIDDEN * 4 + 1 + top_k * 5
    split_in: set[tuple[int, int]] = set()
    for sequence, rows in by_sequence(run.routing.decode()).items():
        here = sequence * ranks // len(LENGTHS)
        for step, row in enumerate(rows):
            for layer, ids in enumerate(row):
                home = owner[layer][ids[0]]
                needed = {owner[layer][expert] for expert in ids}
                counts["move"] += moved * len((needed | {home}) - {here})
                counts["partial_sums"] += (HIDDEN * 4 + 1) * len(needed - {home})
                counts["stayed"] += home == here
                if needed != {home}:
                    split_in.add((layer, step))
                here = home
    others = ranks - 1
    pairs = ranks * others
    layers = len(owner)
    counts["move"] += FRAME * pairs * layers * CALLS
    counts["partial_sums"] += FRAME * pairs * len(split_in)
    rows_fed = len(LENGTHS) * CALLS
    counts["tokens"] = (4 + 1) * others * rows_fed
    # One call a step; sizes of its groups go ahead: tokens always, keys and values but at the end.
    counts["tokens"] += pairs * (FRAME * CALLS + 8 * (2 * (CALLS - 1) + 1))
    counts["keys_values"] = (KV + 2) * layers * others * len(LENGTHS) * (CALLS - 1)
    return dict(counts) | {"partial_calls": len(split_in)}


@pytest.mark.parametrize("top_k", [1, 4])
def test_a_coherent_run_sends_what_its_routing_says(top_k: int) -> None:
    model, ranks = tiny(top_k), 3
    plan = random_plan(model, ranks, seed=2)
    run, _ = on_threads(
        model, some_prompts(), ranks, plan=plan, max_new_tokens=STEPS, stop_tokens=(), start="ended"
    )
    want = counted_coherent(run, plan, ranks, top_k)
    for kind in ("move", "partial_sums", "tokens", "keys_values"):
        assert run.bytes_of(kind) == want[kind], kind
    assert run.calls_of("partial_sums") == want["partial_calls"]
    assert sum(one.stayed for one in run.stays) == want["stayed"]
    assert run.cross_bytes == sum(
        want[kind] for kind in ("move", "partial_sums", "tokens", "keys_values")
    )
    assert sum(run.sent) == run.cross_bytes
    assert run.kv_row_bytes == KV * len(plan.layers)


@pytest.mark.parametrize("top_k", [1, 4])
def test_a_vanilla_run_sends_what_its_routing_says(top_k: int) -> None:
    model, ranks = tiny(top_k), 3
    plan = random_plan(model, ranks, seed=2)
    run, _ = on_threads(
        model,
        some_prompts(),
        ranks,
        plan=plan,
        mode="vanilla",
        max_new_tokens=STEPS,
        stop_tokens=(),
    )
    assert run.routing is not None
    owner = owners(plan)
    remote = 0
    for sequence, rows in by_sequence(run.routing.decode()).items():
        home = sequence * ranks // len(LENGTHS)
        for row in rows:
            for layer, ids in enumerate(row):
                remote += len({owner[layer][expert] for expert in ids} - {home})
    frames = FRAME * ranks * (ranks - 1) * len(owner) * CALLS
    assert run.bytes_of("dispatch") == remote * (HIDDEN * 4 + top_k * 5) + frames
    assert run.bytes_of("combine") == remote * HIDDEN * 4 + frames
    assert run.keys_values_bytes == 0


def test_with_one_expert_a_token_the_plan_foretells_how_many_rows_move() -> None:
    model = tiny(1)
    run, _ = on_threads(
        model,
        some_prompts(),
        3,
        plan=random_plan(model, 3, seed=2),
        max_new_tokens=STEPS,
        stop_tokens=(),
    )
    later = run.stays[1:]
    moved = sum(one.rows - one.stayed for one in later) / sum(one.rows for one in later)
    assert run.predicted["crossing"] == pytest.approx(moved)
    assert run.predicted["heaviest_crossing"] == pytest.approx(moved)
    assert run.predicted["distinct_ranks"] == 1.0


def test_with_more_experts_a_row_follows_its_heaviest() -> None:
    model = tiny(4)
    run, _ = on_threads(
        model,
        some_prompts(),
        2,
        plan=random_plan(model, 2, seed=2),
        max_new_tokens=STEPS,
        stop_tokens=(),
    )
    later = run.stays[1:]
    moved = sum(one.rows - one.stayed for one in later) / sum(one.rows for one in later)
    assert run.predicted["heaviest_crossing"] == pytest.approx(moved)


def test_rows_start_where_their_token_went_before() -> None:
    model = tiny(1)
    plan = random_plan(model, 3, seed=2)
    stayed = {}
    for start in ("token", "ended"):
        run, _ = on_threads(
            model, some_prompts(), 3, plan=plan, max_new_tokens=16, stop_tokens=(), start=start
        )
        stayed[start] = run.stays[0].stayed / run.stays[0].rows
    assert stayed["token"] > stayed["ended"]


def test_replicated_keys_and_values_are_on_every_rank() -> None:
    model = tiny(1)
    prompts = some_prompts()
    run, _ = on_threads(model, prompts, 2, max_new_tokens=4, stop_tokens=())
    columns = max(LENGTHS) + 2  # of the tokens fed, the last one's are not needed
    assert run.cache_bytes == (KV * 4 * len(prompts) * columns,) * 2


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    run, _ = on_threads(tiny(4), some_prompts(), 2, max_new_tokens=3, stop_tokens=())
    rounded = ParallelRun.load(run.save(tmp_path / "a.json"))
    assert rounded.save(tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()
    assert (rounded.outputs, rounded.traffic, rounded.stays, rounded.check) == (
        run.outputs,
        run.traffic,
        run.stays,
        run.check,
    )
    data = run.to_dict()
    for name, damage, hint in (
        ("format", "moe-runtime.run", "no parallel run"),
        ("version", 2, "this release reads 1"),
        ("traffic", [{"sort": "move"}], "damaged"),
        ("outputs", None, "damaged"),
    ):
        (tmp_path / "c.json").write_text(json.dumps(data | {name: damage}))
        with pytest.raises(ConfigError, match=hint):
            ParallelRun.load(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="readable"):
        ParallelRun.load(tmp_path / "nowhere.json")


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), ranks=st.integers(1, 4), top_k=st.integers(1, 4))
def test_homes_hold_the_heaviest_expert_and_computing_ranks_hold_theirs(
    seed: int, ranks: int, top_k: int
) -> None:
    model_spec = read_spec(MODEL)
    plan = random_plan(MODEL, ranks, seed=seed, replicas=seed % 9)
    share = shares_of(plan, model_spec, ranks).layers[seed % 4]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(7, 16, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(7, top_k, generator=generator).mul(4).round()  # ties
    source = torch.randint(0, ranks, (7,), generator=generator)
    home = share.homes(source, ids, weights)
    computing = share.computing(source, ids, home)
    assert bool(share.held[ids, computing].all())
    for row in range(7):
        heaviest = ids[row][weights[row] == weights[row].max()]
        holders = share.held[heaviest].any(0)
        assert holders[home[row]]
        of_row = share.held[ids[row]].sum(0)
        assert of_row[home[row]] == of_row[holders].max()  # of several the one with most of the k
        at_home = share.held[ids[row], home[row]]
        assert bool((computing[row][at_home] == home[row]).all())
    plain = share.computing(source, ids)
    assert bool(share.held[ids, plain].all())
    own = share.held[ids, source[:, None]]
    assert bool((plain[own] == source[:, None].expand_as(plain)[own]).all())


MODEL = tiny(4)
