"""How far a baked model's logits are from the original's, and the original's from its own.

Its own: computed in another way, as the yardstick. Runs models on a few random tokens; does not
know how a checkpoint is baked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from moe_runtime.placement.bake_source import BakeSource

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.memory import free_memory

__all__ = ["Agreement", "check_in_budget", "check_plain", "compare", "fitting_dtypes", "logits"]

_ROWS, _LENGTH = 4, 16
# Half of the tokens may be further off than this, or than ten times the yardstick, and the function
# is taken for another one. A few tokens may be: where two experts are all but equally likely, the
# last bit decides which is taken, and that shows in everything after.
_LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_YARDSTICKS = 10
_ROOM = 1.4  # what loading takes beside the weights

# Given a folder and whether to compute in the other of two ways, a model.
Loader = Callable[[str, bool], Any]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Logits compared over some tokens.

    Args:
        dtype: what was computed in.
        tokens: how many were compared.
        difference: the largest difference of a logit, over the largest logit.
        median_difference: the median over the tokens of each token's largest difference, over the
            largest logit.
        same_choice: share of the tokens with the same likeliest next token.
        yardstick: what the original model was compared with in the same way; "" if nothing.
        yardstick_difference, yardstick_median, yardstick_same_choice: what that gave.
    """

    dtype: str
    tokens: int
    difference: float
    median_difference: float
    same_choice: float
    yardstick: str = ""
    yardstick_difference: float = 0.0
    yardstick_median: float = 0.0
    yardstick_same_choice: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def require(self) -> None:
        """CheckpointError if the two models do not compute the same function."""
        limit = max(
            _LIMITS.get(getattr(torch, self.dtype), 0.1), _YARDSTICKS * self.yardstick_median
        )
        # Written so that a NaN fails too.
        if not self.median_difference <= limit:
            raise CheckpointError(
                f"the baked model computes something else: in {self.dtype} the logits of half of "
                f"{self.tokens} random tokens are off by {self.median_difference:.1e} of the "
                f"largest and more (limit {limit:.1e}). Nothing was kept; please report the model"
            )


def compare(
    expected: torch.Tensor,
    found: torch.Tensor,
    other: torch.Tensor | None = None,
    *,
    dtype: torch.dtype,
    yardstick: str = "",
) -> Agreement:
    """Logits `[tokens, vocabulary]` of the original, of the baked model, and for the yardstick."""
    largest, median, same = _distance(expected, found)
    plain = Agreement(
        dtype=str(dtype).removeprefix("torch."),
        tokens=len(expected),
        difference=largest,
        median_difference=median,
        same_choice=same,
    )
    if other is None:
        return plain
    largest, median, same = _distance(expected, other)
    return replace(
        plain,
        yardstick=yardstick,
        yardstick_difference=largest,
        yardstick_median=median,
        yardstick_same_choice=same,
    )


def _distance(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float, float]:
    each = (found - expected).abs().amax(dim=1) / expected.abs().max()
    same = (found.argmax(dim=1) == expected.argmax(dim=1)).float().mean()
    return float(each.max()), float(each.median()), float(same)


def logits(model: Any) -> torch.Tensor:
    """float32 `[tokens, vocabulary]` of four rows of random tokens, the same for every model.

    The tokens are from the lower half of the vocabulary: marks of images and the like stand high.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 8, vocabulary // 2, (_ROWS, _LENGTH), generator=generator)
    ids = ids.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found.float().flatten(0, 1).cpu()


def _of_original(model: Any) -> torch.Tensor:
    """`logits` of the model as it was; UnsupportedModelError if even that does not run."""
    try:
        return logits(model)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on tokens alone ({type(error).__name__}: {error})"
        ) from error


def fitting_dtypes(source: BakeSource) -> tuple[torch.dtype, ...]:
    """Of float32 and the checkpoint's own dtype, those in which the whole model fits in memory."""
    spec = source.spec
    stored = spec.layers[0].params[0].dtype
    elements = (spec.total_expert_bytes + spec.dense_bytes) / stored.itemsize
    free = free_memory(torch.device("cpu"))
    wanted = dict.fromkeys((torch.float32, stored))
    return tuple(dtype for dtype in wanted if _ROOM * elements * dtype.itemsize < free)


def check_plain(source: BakeSource, baked: Path, dtype: torch.dtype) -> Agreement:
    """Compare in plain transformers on the CPU, one model in memory at a time.

    The experts are computed eagerly; the yardstick is the original with grouped products.

    Raises:
        UnsupportedModelError: the original does not run on tokens alone.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "experts_implementation": "eager",
        "variant": source.variant,
    }
    model = type(source.model).from_pretrained(source.folder, **options).eval()
    expected = _of_original(model)
    other = None
    try:
        model.set_experts_implementation("grouped_mm")
        other = logits(model)
    except (RuntimeError, ValueError, NotImplementedError):
        pass  # not every release has grouped products on a CPU for every size
    del model
    found = logits(type(source.model).from_pretrained(baked, **options).eval())
    return compare(expected, found, other, dtype=dtype, yardstick="eager against grouped_mm")


def check_in_budget(source: BakeSource, baked: Path, load: Loader) -> Agreement:
    """Compare models that `load` makes of a folder, one at a time.

    Args:
        load: given the folder and whether to compute exactly as eager experts do (for the
            yardstick), a model whose experts need not fit in memory.

    Raises:
        UnsupportedModelError: the original does not run on tokens alone.
    """
    expected = _of_original(load(str(source.folder), False))
    other = logits(load(str(source.folder), True))
    found = logits(load(str(baked), False))
    return compare(
        expected,
        found,
        other,
        dtype=source.spec.layers[0].params[0].dtype,
        yardstick="the runtime's own experts against eager",
    )
