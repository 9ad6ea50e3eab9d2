"""Gate lookahead: the coming layers' routers, applied to the hidden state that is there already.

Knows hidden states and router weights; knows no past of the run but popularity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from moe_runtime.predictors.base import Probabilities
from moe_runtime.predictors.calibration import calibration_of
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.fitted import Constants, FittedPredictor, positive
from moe_runtime.predictors.frequency import popularity, take_popularity
from moe_runtime.predictors.hidden_states import Recording, Router, record_hidden, routers_of
from moe_runtime.predictors.history import multi_hot
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.rates import Rates
from moe_runtime.predictors.replay import chosen_experts
from numpy.typing import NDArray
from torch import nn

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.model_spec import MoESpec, read_spec
from moe_runtime.trace import RoutingTrace

__all__ = ["GateLookaheadPredictor"]

REACH = 4
STRENGTH = 256.0  # what fitted popularity weighs, in tokens of the run
STEPS, BATCH = 240, 512
LEARNING_RATE = 0.1  # of the router's root mean square weight
CHECK_EVERY = 20


class GateLookaheadPredictor(FittedPredictor):
    """A linear map for each layer and distance, begun at the coming router's own weights.

    Hidden states change little from layer to layer (the residual stream), so the router of a layer
    says much about a layer's choice when given the state of one before (Eliseev and Mazur, 2023);
    the correction learns what changes. Without a hidden state it is popularity.
    """

    name: ClassVar[str] = "gate lookahead"
    kind: ClassVar[str] = "gate-lookahead"
    needs_hidden: ClassVar[bool] = True
    candidates: ClassVar[tuple[dict[str, Any], ...]] = ({"strength": STRENGTH},)
    reach: ClassVar[int] = REACH

    def __init__(
        self,
        origin: Origin,
        constants: Constants,
        shares: Sequence[NDArray[Any]],
        gates: dict[tuple[int, int], Router],
    ) -> None:
        super().__init__(origin, constants)
        self._popularity = Rates(shares, [positive(constants, "strength")] * len(shares))
        self._gates = gates  # by position of the coming layer and distance
        self._hidden: dict[int, torch.Tensor] = {}

    @classmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """Traces hold no hidden states: PredictorError. See `fit_model`."""
        del origin, trace, constants
        raise PredictorError(
            "gate lookahead is fitted to a live model, not to traces; call "
            "GateLookaheadPredictor.fit_model(model, texts)"
        )

    @classmethod
    def fit_model(
        cls,
        model: nn.Module,
        inputs: Sequence[torch.Tensor],
        *,
        max_rows: int = 8192,
        steps: int = STEPS,
        seed: int = 0,
    ) -> Self:
        """Fitted to a live model, plain or running inside a budget.

        Of the texts a fifth is held out: it decides when each map is best, and calibrates it. With
        `steps` 0 the maps are the routers themselves.

        Args:
            model: a causal language model, evaluating.
            inputs: token ids `[length]` of each text, without padding; two texts at least.
            max_rows: tokens after which no further text is begun.
            steps: of Adam, for each layer and distance.
            seed: of the batches.

        Raises:
            PredictorError: too little text, or no router to be found beside the experts.
            UnsupportedModelError: no MoE layers.
        """
        if len(inputs) < 2:
            raise PredictorError(
                f"gate lookahead needs two texts at least, one to hold out; found {len(inputs)}"
            )
        spec: MoESpec = read_spec(model)  # type: ignore[arg-type]
        recording = record_hidden(model, spec, inputs, max_rows)
        routers = routers_of(model, spec, recording.hidden[0].shape[1])
        trace = recording.trace
        origin = Origin.of([trace])
        held = trace.sequence_ids % 5 == 1
        if not held.any():
            held = trace.sequence_ids == trace.sequence_ids[-1]
        gates = _fit_gates(recording, routers, held, steps, seed)
        shares = popularity(origin, trace)
        found = cls(origin, cls.candidates[0], shares, gates)
        seen = {}
        for (position, distance), gate in gates.items():
            scores = _apply(gate, recording.hidden[position - distance][torch.from_numpy(held)])
            hot = multi_hot(chosen_experts(trace, position)[held], origin.experts[position])
            seen[position, distance] = (scores.ravel(), hot.ravel())
        found.calibration = calibration_of(seen, len(origin.layer_ids), REACH)
        return found

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """See `Predictor`. PredictorError if the hidden states are not the model's."""
        super().observe(position, topk_ids)
        self._hidden.clear()
        if hidden is None:
            return
        gate = next((g for (at, d), g in self._gates.items() if at - d == position), None)
        if gate is not None and tuple(hidden.shape) != (len(topk_ids), gate.weight.shape[1]):
            raise PredictorError(
                f"layer {self.grid.layers[position]}: hidden states of shape {tuple(hidden.shape)} "
                f"for {len(topk_ids)} rows of size {gate.weight.shape[1]}; the predictor was made "
                "for another model"
            )
        self._hidden[position] = hidden.detach().to("cpu", torch.float32, copy=True)

    def learn(self, position: int, topk_ids: IntArray) -> None:
        """See `FittedPredictor`."""
        chosen = topk_ids[topk_ids >= 0]
        hits = np.bincount(chosen, minlength=self.grid.experts[position])
        self._popularity.count(position, hits, len(topk_ids))

    def forget(self) -> None:
        """See `FittedPredictor`."""
        self._popularity.reset()
        self._hidden.clear()

    def predict(self, position: int) -> Probabilities:
        """See `Predictor`."""
        if self._gate(position) is None:  # popularity is no score that the maps were fitted to
            return self.score(position).astype(np.float32)
        return super().predict(position)

    def score(self, position: int) -> NDArray[Any]:
        """See `FittedPredictor`."""
        gate = self._gate(position)
        if gate is not None:
            return _apply(gate, self._hidden[self.history.newest])
        return np.repeat(self._popularity.of(position)[None], len(self.history.rows), axis=0)

    def _gate(self, position: int) -> Router | None:
        """The map from the newest layer, None if its hidden state or the map is not there."""
        newest = self.history.newest
        known = newest >= 0 and newest in self._hidden
        return self._gates.get((position, position - newest)) if known else None

    def begin_step(self, rows: Any) -> None:
        """See `Predictor`."""
        super().begin_step(rows)
        self._hidden.clear()

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """See `FittedPredictor`. Maps are kept in half precision."""
        arrays = {"popularity": np.concatenate(self._popularity.prior).astype(np.float32)}
        for (position, distance), gate in self._gates.items():
            arrays[f"gate.{position}.{distance}.weight"] = gate.weight.numpy().astype(np.float16)
            arrays[f"gate.{position}.{distance}.bias"] = gate.bias.numpy()
        return arrays

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        gates = {}
        for position in range(1, len(origin.layer_ids)):
            for distance in range(1, min(REACH, position) + 1):
                name, experts = f"gate.{position}.{distance}", origin.experts[position]
                weight = take_array(arrays, f"{name}.weight", (experts, None), np.float16)
                bias = take_array(arrays, f"{name}.bias", (experts,), np.float32)
                gates[position, distance] = Router(
                    weight=torch.from_numpy(weight.astype(np.float32)),
                    bias=torch.from_numpy(bias.copy()),
                )
        return cls(origin, constants, take_popularity(origin, arrays), gates)


def _apply(gate: Router, hidden: torch.Tensor) -> NDArray[Any]:
    """float32 `[T, E]`."""
    with torch.no_grad():
        scores: NDArray[Any] = torch.sigmoid(hidden @ gate.weight.T + gate.bias).numpy()
    return scores


def _fit_gates(
    recording: Recording, routers: Sequence[Router], held: NDArray[np.bool_], steps: int, seed: int
) -> dict[tuple[int, int], Router]:
    """A map for each layer and distance that reaches it."""
    gates = {}
    trace = recording.trace
    own, other = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~held, held))
    for position in range(1, len(routers)):
        hot = torch.from_numpy(multi_hot(chosen_experts(trace, position), trace.experts[position]))
        for distance in range(1, min(REACH, position) + 1):
            states = recording.hidden[position - distance]
            generator = torch.Generator().manual_seed(seed + 100 * position + distance)
            gates[position, distance] = _fit_gate(
                routers[position],
                (states[own], hot[own]),
                (states[other], hot[other]),
                steps,
                generator,
            )
    return gates


def _fit_gate(
    router: Router,
    known: tuple[torch.Tensor, torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    steps: int,
    generator: torch.Generator,
) -> Router:
    """Adam on the log loss from the router's weights; of all checks the one best on held rows."""
    weight = router.weight.clone().requires_grad_()
    # Routers choose by rank, so their scores have no level: begin where the mean is right.
    with torch.no_grad():
        level = torch.logit(known[1].mean().clamp(1e-4, 1 - 1e-4))
        bias = router.bias - (known[0] @ router.weight.T + router.bias).mean() + level
    bias.requires_grad_()
    rate = LEARNING_RATE * float(router.weight.pow(2).mean().sqrt().clamp_min(1e-8))
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": rate}, {"params": [bias], "lr": LEARNING_RATE}]
    )
    loss_of = nn.functional.binary_cross_entropy_with_logits

    def held_loss() -> float:
        with torch.no_grad():
            return float(loss_of(held[0] @ weight.T + bias, held[1]))

    best, least = (weight.detach().clone(), bias.detach().clone()), held_loss()
    for step in range(1, steps + 1):
        rows = torch.randint(len(known[0]), (min(BATCH, len(known[0])),), generator=generator)
        optimizer.zero_grad()
        loss_of(known[0][rows] @ weight.T + bias, known[1][rows]).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            loss = held_loss()
            if loss < least:
                best, least = (weight.detach().clone(), bias.detach().clone()), loss
    return Router(weight=best[0], bias=best[1])
