"""Where vanilla's prompts live: the best assignment, the same tokens, and fewer rows sent."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_runtime.placement.plan import Plan

from moe_runtime.errors import ConfigError
from moe_runtime.parallel import ParallelOptions
from moe_runtime.parallel.homes import settled
from moe_runtime.trace import RoutingTrace
from parallel_models import alone, on_threads, random_plan, some_prompts, tiny

STEPS = 6


@given(
    uses=st.integers(1, 6).flatmap(
        lambda prompts: st.lists(
            st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=prompts, max_size=prompts
        )
    )
)
def test_no_assignment_with_as_many_prompts_a_rank_has_more_uses_at_home(
    uses: list[list[int]],
) -> None:
    table = np.array(uses)
    homes = [at * 3 // len(uses) for at in range(len(uses))]
    found = settled(table, homes, 3)
    assert sorted(found) == sorted(homes)

    def worth(answer: tuple[int, ...]) -> tuple[int, int]:
        at_home = sum(int(row[rank]) for row, rank in zip(table, answer, strict=True))
        return at_home, sum(a == b for a, b in zip(answer, homes, strict=True))

    assert worth(tuple(found)) == max(worth(one) for one in permutations(homes))


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 0), (2, 0), (3, 6)])
def test_settled_prompts_have_the_tokens_of_one_process(
    top_k: int, ranks: int, replicas: int
) -> None:
    model, prompts = tiny(top_k), some_prompts((5, 9, 3, 7, 7, 2, 4))
    want, _ = alone(model, prompts, STEPS)
    plan = random_plan(model, ranks, seed=ranks, replicas=replicas)
    for batch_size in (None, 2):
        run, _ = on_threads(
            model,
            prompts,
            ranks,
            plan=plan,
            mode="vanilla",
            homes="prefill",
            batch_size=batch_size,
            max_new_tokens=STEPS,
            stop_tokens=(),
        )
        assert run.outputs == want


def test_drawn_tokens_do_not_hang_on_homes() -> None:
    model, prompts = tiny(4), some_prompts()
    runs = [
        on_threads(
            model,
            prompts,
            2,
            plan=random_plan(model, 2, seed=5),
            mode="vanilla",
            homes=homes,
            temperature=1.0,
            seed=9,
            max_new_tokens=STEPS,
            stop_tokens=(),
        )[0]
        for homes in ("order", "prefill")
    ]
    assert runs[0].outputs == runs[1].outputs


def needed_ranks(trace: RoutingTrace, plan: Plan, row: int) -> list[set[int]]:
    """Of each layer the ranks that a recorded row has experts on."""
    return [
        {layer.hosts[expert][0] for expert in ids.tolist()}
        for layer, ids in zip(plan.layers, trace.topk_ids[row].astype(int), strict=True)
    ]


@pytest.mark.parametrize("top_k", [1, 4])
def test_prompts_live_where_their_prefill_was_routed_and_take_keys_and_values_along(
    top_k: int,
) -> None:
    model, prompts, ranks = tiny(top_k), some_prompts((5, 9, 3, 7, 7, 2)), 3
    plan = random_plan(model, ranks, seed=1)
    run, _ = on_threads(
        model, prompts, ranks, plan=plan, mode="vanilla", homes="prefill", max_new_tokens=STEPS,
        stop_tokens=(),
    )  # fmt: skip
    assert run.routing is not None
    before, uses = run.routing.prefill(), np.zeros((len(prompts), ranks), dtype=np.int64)
    for row, prompt in enumerate(before.sequence_ids.tolist()):
        for needed in needed_ranks(before, plan, row):
            uses[prompt, sorted(needed)] += 1
    homes = [at * ranks // len(prompts) for at in range(len(prompts))]
    after = settled(uses, homes, ranks)
    moved = [at for at in range(len(prompts)) if after[at] != homes[at]]
    assert moved, "a plan that moves nothing shows nothing"
    sent = next(one for one in run.traffic if one.kind == "prefill.keys_values")
    assert (sent.calls, sent.rows) == (1, sum(len(prompts[at]) for at in moved))
    assert sent.bytes == sent.rows * len(plan.layers) * 2 * 2 * 8 * 4  # 2 heads of 8, float32
    decode = run.routing.decode()
    away = sum(
        len(needed - {after[prompt]})
        for row, prompt in enumerate(decode.sequence_ids.tolist())
        for needed in needed_ranks(decode, plan, row)
    )
    assert sum(one.rows for one in run.decode_traffic if one.kind == "dispatch") == away


def test_an_unknown_way_to_choose_homes_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown homes 'best'; known: order, prefill"):
        ParallelOptions(homes="best")
