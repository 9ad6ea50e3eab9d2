"""`PagedParameter`: the place of an expert tensor `[experts, ...]` that is not in memory.

Has shape, dtype and device, so that counts, footprints, `.to()` and deep copies go on as usual,
but no data: computing with it is an error that says so. Knows nothing of caches and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_runtime.errors import AttachError

__all__ = ["PagedParameter"]

_STRUCTURAL = ("detach", "alias", "clone", "_to_copy")


class PagedParameter(nn.Parameter):
    """A parameter whose weights are paged by the runtime.

    Args:
        shape: `[experts, ...]`.
        path: where it stands in the model, for the error text.
    """

    path: str

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, path: str
    ) -> PagedParameter:
        result: PagedParameter = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        result.path = path
        return result

    def __init__(self, *arguments: Any) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PagedParameter({self.path}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedParameter:
        return type(self)(self.shape, self.dtype, self.device, self.path)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AttachError(f"{self.path} is paged and cannot be pickled: use save_pretrained")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        source = next((a for a in args if isinstance(a, PagedParameter)), None)
        if source is not None and func.overloadpacket.__name__ in _STRUCTURAL:
            options = kwargs or {}
            return cls(
                source.shape,
                options.get("dtype") or source.dtype,
                options.get("device") or source.device,
                source.path,
            )
        path = "an expert tensor" if source is None else source.path
        raise AttachError(
            f"{path} is paged by moe_runtime and is never whole in memory "
            f"({func.overloadpacket.__name__} asked for it); moe_runtime.detach(model) loads it"
        )
