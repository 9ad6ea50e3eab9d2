"""What a checkpoint says to the plan commands, and whether recordings and plans are of its model.

Does not know what is planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_runtime.errors import BudgetError, PlanError, TraceError
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.recordings import Recording

__all__ = ["ModelFacts", "model_facts", "require_plan_like"]

_READER_THREADS = 3  # what the commands read with unless told otherwise


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a checkpoint says about its experts.

    Args:
        model_id, fingerprint: of the model.
        layer_ids, experts, expert_bytes: absolute index, experts and bytes of one expert of each
            MoE layer.
        staging: bytes that the runtime reads through, in a budget of the memory asked for.
    """

    model_id: str
    fingerprint: str
    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    staging: int

    def require(self, recording: Recording, name: str) -> None:
        """TraceError unless the recording is of this model."""
        theirs = recording.fingerprint
        if theirs and self.fingerprint != theirs:
            raise TraceError(
                f"{name}: recorded of {recording.model_id or 'a model'} with fingerprint {theirs}, "
                f"{self.model_id} has {self.fingerprint}; plan from its own trace"
            )
        if recording.layer_ids != self.layer_ids:
            odd = sorted(set(recording.layer_ids) ^ set(self.layer_ids))
            raise TraceError(
                f"{name}: has MoE layers {list(recording.layer_ids)}, {self.model_id} has "
                f"{list(self.layer_ids)}" + (f"; layer {odd[0]} is in one of them only" * bool(odd))
            )
        for layer, found, has in zip(self.layer_ids, recording.experts, self.experts, strict=True):
            if found != has:
                raise TraceError(
                    f"{name}: layer {layer} has {found} experts, {self.model_id} has {has}"
                )


def model_facts(model: str, memory: int | None = None) -> ModelFacts:
    """Read a checkpoint's structure; no weight is loaded.

    Args:
        memory: bytes of one device, for the runtime's working memory.

    Raises:
        As `inspect_checkpoint`.
        PlanError: the runtime cannot run the model in so little memory; says what it takes.
    """
    import moe_runtime
    from moe_runtime.budget import plan_budget
    from moe_runtime.cli.session import quiet_libraries
    from moe_runtime.layout import largest_whole_row

    quiet_libraries(debug=False)
    spec, experts = moe_runtime.inspect_checkpoint(model)
    floor = largest_whole_row(spec, experts, by_rows=False)
    staging = 0
    if memory is not None:
        try:
            staging = plan_budget(
                spec, memory, "", threads=_READER_THREADS, floor=floor, disk=True
            ).staging
        except BudgetError as error:
            raise PlanError(f"--memory is too little to run {model} in: {error}") from error
    return ModelFacts(
        model_id=spec.model_id,
        fingerprint=spec.fingerprint,
        layer_ids=tuple(layer.layer for layer in spec.layers),
        experts=tuple(layer.num_experts for layer in spec.layers),
        expert_bytes=tuple(layer.expert_bytes for layer in spec.layers),
        staging=staging,
    )


def require_plan_like(plan: Plan, recording: Recording, path: Path, name: str) -> None:
    """PlanError, naming the plan's file, unless the plan fits the recording's model."""
    try:
        plan.require_model(
            layer_ids=recording.layer_ids,
            experts=recording.experts,
            fingerprint=recording.fingerprint,
            name=name,
        )
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
