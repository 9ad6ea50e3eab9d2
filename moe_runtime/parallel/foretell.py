"""What is foretold of the very tokens that a run had: the share of rows that move, ranks, and what
prefill sends and takes on the links.

Knows plans and traces; no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moe_runtime.model_spec import MoESpec
from moe_runtime.parallel.shares import Shares
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.cost import crossing_of
from moe_runtime.placement.links import Links
from moe_runtime.placement.messages import MessageSizes
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.prefill_traffic import recorded_prefill, replay_prefill
from moe_runtime.placement.step_time import step_time
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = ["foretell", "foretell_prefill", "links_of", "sizes_of"]


def foretell(plan: Plan, shares: Shares, decode: RoutingTrace) -> dict[str, Any]:
    """The plan's own figures on a run's decode rows.

    Returns:
        `crossing`: the share of pairs of consecutive MoE layers on different devices that
        `moe-runtime plan` reports. With one expert a token and no replicas it is exactly the share
        of rows that a coherent run moves after its first MoE layer. With more it is not: the plan
        counts every pair of a token's experts, a row follows its heaviest.
        `heaviest_crossing`: the same of each token's heaviest expert alone; None with replicas.
        `distinct_ranks`: mean ranks that a token needs in a layer.
    """
    if not len(decode):
        return {}
    crossing = crossing_of(plan.matrices(), affinity_of(decode, within=False))
    ids = decode.topk_ids.astype(np.int64)
    weights = np.where(ids == UNUSED, -1.0, decode.topk_weights)
    heavy = np.take_along_axis(ids, weights.argmax(2)[..., None], 2)[..., 0]
    owner = [share.held.numpy().argmax(1) for share in shares.layers]
    homes = np.stack([owner[at][heavy[:, at]] for at in range(len(owner))], 1)
    moves = homes[:, 1:] != homes[:, :-1]
    distinct = []
    for at, ranks in enumerate(owner):
        used = np.where(ids[:, at] == UNUSED, -1, ranks[np.minimum(ids[:, at], len(ranks) - 1)])
        distinct.append(np.mean([len(set(row[row >= 0].tolist())) for row in used]))
    return {
        "crossing": float(crossing),
        "heaviest_crossing": None if plan.has_replicas or not moves.size else float(moves.mean()),
        "distinct_ranks": None if plan.has_replicas else float(np.mean(distinct)),
    }


def sizes_of(
    spec: MoESpec, *, hidden: int, itemsize: int, weight: int, kv_row_bytes: int
) -> MessageSizes:
    """Bytes of prefill's messages.

    Args:
        hidden, itemsize: numbers of a hidden state, and bytes of one.
        weight: bytes of a router's weight.
        kv_row_bytes: of one token's keys and values, all layers together, as layers may differ.
    """
    sizes = MessageSizes.of(
        hidden=hidden,
        keys_values=0,
        layers=1,
        top_k=max(layer.top_k for layer in spec.layers),
        itemsize=itemsize,
        weight=weight,
        experts=max(layer.num_experts for layer in spec.layers),
    )
    return replace(sizes, kept=kv_row_bytes)


def links_of(plan: Plan) -> Links | None:
    """The links that a plan's step times were predicted for; None if it has none.

    Raises:
        PlanError: the plan's field is damaged.
    """
    timed = plan.metrics.get("step_time")
    known = timed.get("links") if isinstance(timed, Mapping) else None
    return Links.from_dict(known) if isinstance(known, Mapping) else None


def foretell_prefill(
    plan: Plan,
    prefill: RoutingTrace,
    sizes: MessageSizes,
    mode: str,
    links: Links | None,
    *,
    steps_follow: bool,
    forms: int,
) -> dict[str, Any]:
    """What prefill sends for these tokens, to the byte, and how long links take for it.

    Args:
        prefill: the run's rows of prompts.
        links: None where nothing is known of them.
        steps_follow: whether a prompt may get more than one new token.
        forms: of keys and values.

    Returns:
        `bytes` by kind, all ranks together; `frame_bytes` beside them; `cross_bytes`, both
        together; `calls`; and with links `seconds` of all calls, computing left out, of them
        `latency_seconds`, and `links`.
    """
    if not len(prefill):
        return {}
    calls = recorded_prefill(prefill)
    sent = replay_prefill(
        plan.matrices(),
        plan.topology,
        prefill,
        calls,
        sizes,
        mode,
        steps_follow=steps_follow,
        forms=forms,
    )
    totals = {kind: sum(layers) for kind, layers in sent.totals().items()}
    frames = totals.pop("frames") + totals.pop("end_frames")
    found: dict[str, Any] = {
        "bytes": {f"prefill.{kind}": nbytes for kind, nbytes in totals.items()},
        "frame_bytes": frames,
        "cross_bytes": sum(totals.values()) + frames,
        "calls": int(sent.present.sum()),
    }
    if links is not None:
        time = step_time(sent, links, plan.topology)
        found |= {
            "seconds": time.seconds * calls.count,
            "latency_seconds": time.latency_seconds * calls.count,
            "links": links.to_dict(),
        }
    return found
