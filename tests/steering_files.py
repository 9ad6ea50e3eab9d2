"""Values of steering as the real functions make them, from seeded numbers, for tests of pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moe_runtime.steering.cost import ArmName, CostArm, CostRun, SteeredExpert, SteeringCost
from moe_runtime.steering.evaluation import (
    Arm,
    ArmKind,
    Comparison,
    Estimate,
    EvaluationSettings,
    SteeringEvaluation,
)
from moe_runtime.steering.identification import Identification, RankedExpert, TokenClass
from moe_runtime.steering.shift import LayerShift, RoutingShift

MODEL: dict[str, Any] = {"model_id": "made <up>", "fingerprint": "f00d"}
CHOSEN = ((4, 17), (3, 2))


def made_identification(layers: int = 6, experts: int = 32, seed: int = 0) -> Identification:
    """Scores at random, the best ones with intervals; a corner without enough events."""
    rng = np.random.default_rng(seed)
    maps = np.clip(rng.normal(0, 0.3, (3, layers, experts)), -1, 1)
    maps[:, 0, :3] = np.nan
    maps[0, 4, 17], maps[0, 3, 2] = 0.95, 0.9
    maps[1:, 4, 17] = maps[1:, 3, 2] = -0.5
    scores = maps[0] - maps[1] - maps[2]
    order = np.argsort(-np.nan_to_num(scores, nan=-9), axis=None)[:12]
    ranked = []
    for rank, index in enumerate(order.tolist()):
        layer, expert = divmod(index, experts)
        score = float(scores[layer, expert])
        ranked.append(
            RankedExpert(
                layer=layer,
                expert=expert,
                score=score,
                npmi=tuple(maps[:, layer, expert].tolist()),
                joint=(90 - rank, 0, 3),
                uses=1000 + rank,
                tied=1,
                interval=(score - 0.1 - 0.01 * rank, score + 0.08),
                stability=max(0.0, 0.97 - 0.2 * rank),
                ranks=(max(1, rank - 1), rank + 3),
            )
        )
    plain = [_plain(one) for one in (scores, *maps)]
    return Identification(
        tokens=(
            _token("<think>", 1.0, 200),
            _token("</think>", -1.0, 200),
            _token("Alternatively", -1.0, 12),
        ),
        top=2,
        ranked=tuple(ranked),
        layer_ids=tuple(range(layers)),
        experts=(experts,) * layers,
        scores=plain[0],
        npmi=tuple(plain[1:]),
        rows=40_000,
        sequences=200,
        unknown_rows=0,
        prompt=False,
        least_joint=5,
        least_uses=20,
        rankable=layers * experts - 3,
        tied_out=0,
        bootstrap=200,
        redrawn=0,
        level=0.95,
        seed=0,
        **MODEL,
    )


def _plain(scores: np.ndarray) -> tuple[tuple[float | None, ...], ...]:
    return tuple(
        tuple(None if math.isnan(one) else round(one, 4) for one in row) for row in scores.tolist()
    )


def _token(text: str, coefficient: float, count: int) -> TokenClass:
    return TokenClass(
        text=text,
        coefficient=coefficient,
        variants=((5,),),
        occurrences=count,
        sequences=min(count, 200),
    )


def made_arm(
    name: str, kind: ArmKind, beta: float, accuracy: float, *, draw: int = 0, problems: int = 150
) -> Arm:
    """An arm of 4 samples a problem, about so accurate."""
    rng = np.random.default_rng([problems, draw, round(100 * beta), round(1000 * accuracy)])
    drawn = rng.multinomial(
        4, [accuracy, *([0.1 * (1 - accuracy)] * 3), 0.7 * (1 - accuracy)], problems
    )
    right, cut, no_end, no_answer = (tuple(column) for column in drawn[:, :4].T.tolist())
    share = float(np.mean(right)) / 4
    wide = 1.96 * float(np.std(right)) / 4 / math.sqrt(problems)
    thinking = rng.poisson(30 + 3 * math.log2(max(beta, 0.5)), problems).astype(float)
    middle = float(np.median(thinking))
    around = Estimate(value=share, low=share - wide, high=share + wide)
    return Arm(
        name=name,
        kind=kind,
        experts=() if kind in {"unsteered", "prompt", "tip"} else CHOSEN,
        beta=beta,
        draw=draw,
        right=right,
        cut=cut,
        no_end=no_end,
        no_answer=no_answer,
        thinking=tuple(thinking.tolist()),
        accuracy=around,
        accuracy_wilson=around,
        pass_at=((1, around), (4, around)),
        thinking_median=Estimate(value=middle, low=middle - 2, high=middle + 2),
        new_tokens=12_000,
        seconds=20.0,
    )


def made_evaluation(
    betas: Sequence[float] = (2, 4, 8, 16, 32, 64, 128, 256, 512),
    *,
    tasks: str = "validation",
    controls: bool = True,
    problems: int = 150,
) -> SteeringEvaluation:
    """Steering that helps up to beta 16 and then harms; controls that do nothing."""
    arms = [made_arm("unsteered", "unsteered", 1.0, 0.42, problems=problems)]
    for beta in betas:
        accuracy = 0.42 + 0.03 * math.log2(beta) * (1 if beta <= 16 else -0.6) if beta else 0.3
        arms.append(made_arm(f"beta {beta:g}", "steered", beta, accuracy, problems=problems))
    if controls:
        for beta in betas:
            for draw in (1, 2, 3):
                name = f"random {draw}, beta {beta:g}"
                accuracy = 0.42 - 0.01 * abs(math.log2(beta or 1))
                arms.append(made_arm(name, "random", beta, accuracy, draw=draw, problems=problems))
            name = f"frequency, beta {beta:g}"
            arms.append(made_arm(name, "frequency", beta, 0.41, problems=problems))
        arms.append(made_arm("prompt", "prompt", 1.0, 0.43, problems=problems))
        arms.append(made_arm("tip", "tip", 1.0, 0.44, problems=problems))
    compared = [_comparison(arm, arms[0]) for arm in arms[1:]]
    steered = {arm.beta: arm for arm in arms if arm.kind == "steered"}
    specific = [
        replace(_comparison(steered[arm.beta], arm), family="specific")
        for arm in arms
        if arm.kind in {"random", "frequency"}
    ]
    return SteeringEvaluation(
        layer_ids=tuple(range(6)),
        experts=(32,) * 6,
        settings=_settings(tasks),
        problem_ids=tuple(f"p{n}" for n in range(problems)),
        families=tuple(("sum", "chain & such", "story")[n % 3] for n in range(problems)),
        arms=tuple(arms),
        comparisons=tuple(compared + specific),
        versions=(("torch", "2.13"),),
        **MODEL,
    )


def _settings(tasks: str) -> EvaluationSettings:
    return EvaluationSettings(
        tasks=tasks,
        tasks_digest="0" * 64,
        steering="found.steer.json",
        method="multiply",
        renormalise=False,
        thinking_only=False,
        thinking_start="<think>",
        thinking_end="</think>",
        samples=4,
        max_new_tokens=96,
        temperature=0.8,
        top_p=1.0,
        top_k=0,
        seed=1,
        prompt_text="Think carefully.",
        prompt_place="before",
        tip_tokens=("</think>",),
        tip_penalty=3.0,
        tip_span=20,
        confidence=0.95,
        resamples=2000,
    )


def _comparison(arm: Arm, against: Arm) -> Comparison:
    difference = (np.array(arm.right) - np.array(against.right)) / 4
    middle = float(difference.mean())
    wide = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    p = math.erfc(abs(middle) / (wide / 1.96) / math.sqrt(2)) if wide else 1.0
    return Comparison(
        arm=arm.name,
        against=against.name,
        family="steered" if arm.kind == "steered" else "controls",
        difference=Estimate(value=middle, low=middle - wide, high=middle + wide),
        thinking_difference=Estimate(value=1.0, low=-1.0, high=3.0),
        better=int((difference > 0).sum()),
        worse=int((difference < 0).sum()),
        test="sign-flip Monte Carlo",
        p=p,
        p_holm=min(1.0, 3 * p),
    )


def made_cost(budget: str = "25%") -> SteeringCost:
    """Four arms of three rounds; steering costs 1 % and moves the layers after it."""
    speeds: dict[ArmName, float] = {
        "unsteered": 100.0,
        "steered": 99.0,
        "pinned": 103.0,
        "own": 92.0,
    }
    arms = []
    for name, speed in speeds.items():
        rounds = [
            CostRun(
                new_tokens=640,
                seconds=640 / speed + 0.1 * n,
                decode_tokens=632,
                decode_seconds=632 / speed * (1 + 0.004 * n),
                hits=10_000 + 100 * len(name),
                misses=3_000 - 100 * len(name),
                bytes_read=24_576 * (3_000 - 100 * len(name)),
                stall_seconds=1.5,
            )
            for n in range(3)
        ]
        arms.append(CostArm(name=name, rounds=tuple(rounds)))
    moved = (0.0, 0.0, 0.0, 0.0, 0.031, 0.062)
    return SteeringCost(
        steering="found.steer.json",
        method="multiply",
        renormalise=False,
        thinking=("<think>", "</think>"),
        experts=tuple(
            SteeredExpert(layer=layer, expert=expert, beta=16.0, uses=0.12, steered_uses=0.11)
            for layer, expert in CHOSEN
        ),
        budget=budget,
        slots=48,
        all_experts=192,
        policy="lru",
        prompts=8,
        max_new_tokens=80,
        arms=tuple(arms),
        shift=RoutingShift(
            tokens=1234,
            layers=tuple(
                LayerShift(layer=n, changed=one, jaccard=1 - one, total_variation=one / 4)
                for n, one in enumerate(moved)
            ),
        ),
        versions=(("torch", "2.13"),),
        machine=(("processor", "a <fast> one"),),
        **MODEL,
    )
