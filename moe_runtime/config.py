"""`RuntimeConfig`: every option of the runtime, validated once.

Does not know the model: sizes given as a share are resolved against it in `runtime`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_runtime.core import parse_bytes, parse_share
from moe_runtime.errors import ConfigError

__all__ = ["RuntimeConfig"]


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a model is run.

    Args:
        expert_budget: all that the fast tier spends on experts, staging included: bytes, a text
            like `"8GiB"`, a share of all expert bytes like `"25%"`, or `"auto"` (from free memory).
        host_budget: the same for the pinned host tier, which exists only beside a GPU.
        device: where the model computes: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`.
        policy: name of the eviction policy.
        policy_options: its options, for example `{"counts": [...]}` for `"static"`.
        exact: compute as transformers' eager experts do, bit for bit, instead of fast.
        layout: how weights lie in slots on a CPU: `"native"`, as the model has them; `"rows"`,
            transposed in blocks of rows, so that single tokens decode at memory bandwidth but each
            miss pays for the transposition; `"auto"`, rows if every expert fits, else native. Their
            results differ in the last bits, each is the same at every budget.
        reader_threads: threads that read experts from disk, 1 to 16.
        preload: fill the slots before the first step: True, False, or `"auto"` (only if every
            expert fits).
        plan: what the experts that stay resident are chosen by: the path of a plan file, or the
            model's name in a plan given as an object; None if there is no plan.
        predictor: what routing is predicted by: the path of a predictor file, or the name of a
            predictor given as an object; None for no prediction.
        prediction_options: when predictions are acted on: the arguments of `PlannerRules`, and
            `trial`, whether the runtime finds out by itself if they pay (True).
        max_batch, max_length: sequences, and tokens of each, whose keys and values an automatic
            budget leaves room for. Longer ones still run, as far as memory allows.
        hardware: the profile of this machine, from `moe-runtime hardware`: the path of one,
            `"auto"` for the one that is kept for this machine if there is one, or None.
        host_execution: whether experts that are missing on a GPU are computed on the host where
            they lie: `"auto"`, where the hardware profile says that it is sooner; `"never"`;
            `"always"`. Where an expert is computed changes the last bits of its outputs.
    """

    expert_budget: int | str = "auto"
    host_budget: int | str = "auto"
    device: str = "auto"
    policy: str = "lru"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    layout: str = "auto"
    reader_threads: int = 3
    preload: bool | str = "auto"
    plan: str | None = None
    predictor: str | None = None
    prediction_options: Mapping[str, Any] = field(default_factory=dict)
    max_batch: int = 1
    max_length: int = 4096
    hardware: str | None = "auto"
    host_execution: str = "auto"

    def __post_init__(self) -> None:
        for name in ("expert_budget", "host_budget"):
            value = getattr(self, name)
            if value != "auto" and parse_share(value) is None:
                try:
                    parse_bytes(value)
                except ConfigError as error:
                    raise ConfigError(
                        f"{name}={value!r}: write bytes, '8GiB', '25%' or 'auto' ({error})"
                    ) from None
        if not isinstance(self.reader_threads, int) or not 1 <= self.reader_threads <= 16:
            raise ConfigError(f"reader_threads must be 1 to 16, found {self.reader_threads!r}")
        self._check_room()
        if self.layout not in ("native", "rows", "auto"):
            raise ConfigError(f"layout must be 'native', 'rows' or 'auto', found {self.layout!r}")
        if self.host_execution not in ("auto", "never", "always"):
            raise ConfigError(
                f"host_execution must be 'auto', 'never' or 'always', found {self.host_execution!r}"
            )
        if self.preload not in (True, False, "auto"):
            raise ConfigError(f"preload must be True, False or 'auto', found {self.preload!r}")
        if self.plan is not None and not isinstance(self.plan, str):
            raise ConfigError(f"plan names a plan: a text, found {self.plan!r}")
        if self.predictor is not None and not isinstance(self.predictor, str):
            raise ConfigError(f"predictor names a predictor: a text, found {self.predictor!r}")
        if self.prediction_options and self.predictor is None:
            raise ConfigError(
                f"prediction_options {sorted(self.prediction_options)} need a predictor; give "
                "predictor= too"
            )
        if not isinstance(self.device, str):
            raise ConfigError(
                f"device must be a text like 'cpu' or 'cuda:0', found {self.device!r}"
            )

    def _check_room(self) -> None:
        """What an automatic budget goes by."""
        for name in ("max_batch", "max_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number, 1 or more, found {value!r}")
        if self.hardware is not None and not isinstance(self.hardware, str):
            raise ConfigError(
                f"hardware is the path of a profile, 'auto' or None, found {self.hardware!r}"
            )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> RuntimeConfig:
        """A configuration from plain data; ConfigError names unknown keys."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; known options: {sorted(known)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a run file; of the policy's options only their names."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {
            "policy_options": sorted(self.policy_options),
            "prediction_options": dict(self.prediction_options),
        }
