"""What steering is compared with: an evaluation's arms, and which experts a control takes.

Knows experts by name and how often they are used; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import ConfigError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.steering.evaluation import UNSTEERED, ArmKind
from moe_runtime.steering.values import Steering

__all__ = [
    "ArmPlan",
    "ControlKind",
    "Controls",
    "PromptPlace",
    "matched_experts",
    "plan_arms",
    "random_experts",
    "with_prompt",
]

ControlKind = Literal["random", "frequency", "prompt", "tip"]
PromptPlace = Literal["start", "end", "before-last-line"]
Experts = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Which controls run, and their constants.

    Args:
        kinds: "random": as many other experts of the same layers, steered in the same way;
            "frequency": of the same layers, those that are used most nearly as often; "prompt":
            nothing is steered, a text is added to the prompt; "tip": the thought-switching penalty
            (Wang et al. 2025, arXiv 2501.18585; its published setting is a penalty of 3 for 600
            tokens).
        draws: of random experts, each an arm for every beta.
        prompt_text, prompt_place: of "prompt". The text becomes a line of its own before the
            prompt, after it, or before its last line.
        tip_tokens: texts whose first token is made less likely; () for the end marker of thinking,
            which is how RICE compares with it. Each also counts as the begin of a new thought.
        tip_penalty, tip_span: by how many logits, for how many tokens after a thought began.

    Raises:
        ConfigError: an unknown kind or place, or a number that is not possible.
    """

    kinds: tuple[ControlKind, ...] = ()
    draws: int = 3
    prompt_text: str = "Think carefully."
    prompt_place: PromptPlace = "end"
    tip_tokens: tuple[str, ...] = ()
    tip_penalty: float = 3.0
    tip_span: int = 600

    def __post_init__(self) -> None:
        for name, found, known in (
            *(("control", kind, get_args(ControlKind)) for kind in self.kinds),
            ("place of the control's prompt text", self.prompt_place, get_args(PromptPlace)),
        ):
            if found not in known:
                raise ConfigError(f"unknown {name} {found!r}; known: {', '.join(known)}")
        if self.draws < 1 or self.tip_span < 1 or not np.isfinite(self.tip_penalty):
            raise ConfigError(
                "draws and tip_span have to be 1 or more and tip_penalty finite, found "
                f"{self.draws}, {self.tip_span} and {self.tip_penalty}"
            )
        if "prompt" in self.kinds and not self.prompt_text.strip():
            raise ConfigError("the control 'prompt' needs a text; give prompt_text")


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """One arm that is to run; see `Arm`. `steering` is None where nothing is steered."""

    name: str
    kind: ArmKind
    steering: Steering | None = None
    beta: float = 1.0
    draw: int = 0

    @property
    def experts(self) -> Experts:
        """What is steered."""
        return () if self.steering is None else tuple(self.steering.betas)


def plan_arms(
    steering: Steering,
    betas: Sequence[float],
    controls: Controls,
    *,
    grid: ExpertGrid,
    seed: int,
    counts: RoutingCounts | None = None,
) -> tuple[ArmPlan, ...]:
    """The arms: unsteered, the experts at each beta, then controls, those of experts at each beta.

    Args:
        steering: whose experts, method and markers are meant; its betas are replaced.
        betas: each at least 0; 1 is the unsteered arm, which is there in any case.
        grid: of the model.
        seed: of random experts.
        counts: how often each expert is used, for the control "frequency".

    Raises:
        ConfigError: no expert, an impossible beta, too few experts in a layer for a control, or no
            counts where they are needed.
    """
    experts = tuple(steering.betas)
    if not experts:
        raise ConfigError("the steering names no expert; there is nothing to evaluate")
    for layer, expert in experts:
        grid.index(layer, expert)
    wanted = [float(beta) for beta in dict.fromkeys(betas) if beta != 1]

    def arm(kind: ArmKind, name: str, beta: float, chosen: Experts, draw: int = 0) -> ArmPlan:
        steered = replace(steering, betas=dict.fromkeys(chosen, beta))
        name = f"{name}beta {beta:g}"
        return ArmPlan(name=name, kind=kind, steering=steered, beta=beta, draw=draw)

    arms = [ArmPlan(name=UNSTEERED, kind="unsteered")]
    arms += [arm("steered", "", beta, experts) for beta in wanted]
    if "random" in controls.kinds:
        for draw in range(1, controls.draws + 1):
            chosen = random_experts(experts, grid, seed=seed, draw=draw)
            arms += [arm("random", f"random {draw}, ", beta, chosen, draw) for beta in wanted]
    if "frequency" in controls.kinds:
        if counts is None:
            raise ConfigError(
                "the control 'frequency' needs to know how often experts are used; give a trace "
                "of the texts in which the experts were found (--trace)"
            )
        chosen = matched_experts(experts, counts, grid)
        arms += [arm("frequency", "frequency, ", beta, chosen) for beta in wanted]
    arms += [ArmPlan(name=kind, kind=kind) for kind in controls.kinds if kind in {"prompt", "tip"}]
    return tuple(arms)


def random_experts(experts: Experts, grid: ExpertGrid, *, seed: int, draw: int) -> Experts:
    """For each expert another one of its layer, evenly drawn; none twice and none of `experts`.

    Raises:
        ConfigError: a layer has too few other experts.
    """
    rng = np.random.default_rng([seed, draw])
    chosen: list[tuple[int, int]] = []
    for layer, _ in experts:
        others = _others(layer, [*experts, *chosen], grid)
        chosen.append((layer, int(rng.choice(others))))
    return tuple(chosen)


def matched_experts(experts: Experts, counts: RoutingCounts, grid: ExpertGrid) -> Experts:
    """For each expert the one of its layer that is used most nearly as often, in their order.

    None is taken twice and none of `experts`; of equally near ones the one with the lower number.

    Raises:
        ConfigError: the counts are of other layers, or a layer has too few other experts.
    """
    if (counts.layer_ids, counts.experts) != (grid.layers, grid.experts):
        raise ConfigError(
            f"the trace has layers {counts.layer_ids} with {counts.experts} experts, the model "
            f"{grid.layers} with {grid.experts}; give a trace of this model"
        )
    chosen: list[tuple[int, int]] = []
    for layer, expert in experts:
        uses = counts.counts[grid.position[layer]]
        others = _others(layer, [*experts, *chosen], grid)
        chosen.append((layer, min(others, key=lambda one: abs(uses[one] - uses[expert]))))
    return tuple(chosen)


def _others(layer: int, taken: Sequence[tuple[int, int]], grid: ExpertGrid) -> list[int]:
    count = grid.experts[grid.position[layer]]
    others = [one for one in range(count) if (layer, one) not in taken]
    if not others:
        raise ConfigError(
            f"layer {layer} has {count} experts, too few for a control beside those steered; "
            "leave the controls 'random' and 'frequency' out"
        )
    return others


def with_prompt(prompt: str, controls: Controls) -> str:
    """A prompt with the control's text in its place."""
    text = controls.prompt_text.strip()
    if controls.prompt_place == "start":
        return f"{text}\n{prompt}"
    if controls.prompt_place == "end":
        return f"{prompt}\n{text}"
    before, line, last = prompt.rpartition("\n")
    return f"{before}{line}{text}\n{last}"
