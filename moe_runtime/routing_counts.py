"""`RoutingCounts`: how often each expert was chosen, where no single token is known; as a file too.

Knows nothing of models or of other engines' recordings; it holds numbers and checks them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_runtime.core import ExpertGrid, FloatArray
from moe_runtime.errors import TraceError
from moe_runtime.files import replacing
from moe_runtime.trace import UNUSED, PathLike, RoutingTrace

__all__ = ["RoutingCounts"]

FORMAT, VERSION = "moe-runtime.counts", 1


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingCounts:
    """Uses of every expert of L MoE layers, summed over a recording.

    They say how popular experts are and what load a placement gives each device. What needs to
    know which experts one token chose together (affinity, co-activation, distinct devices) cannot
    be worked out from them.

    Args:
        counts: for each layer float64 `[E]`, (token, choice) pairs routed to each expert; finite,
            0 or more.
        layer_ids: absolute Hugging Face index of each of the L layers, in order of execution.
        experts: routed experts of each layer; the counts' lengths if not given.
        top_k: experts chosen per token in each layer; 0 where unknown, everywhere if not given.
        tokens: how many tokens were counted; 0 if unknown.
        model_id, fingerprint: what was recorded; "" if unknown.
        source: which recorder the counts are from, in words.

    Raises:
        TraceError: on construction, if numbers do not fit; the message names layer and expert.
    """

    counts: tuple[FloatArray, ...]
    layer_ids: tuple[int, ...]
    experts: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()
    tokens: int = 0
    model_id: str = ""
    fingerprint: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        layers = len(self.layer_ids)
        object.__setattr__(self, "counts", tuple(self.counts))
        object.__setattr__(self, "experts", tuple(self.experts) or tuple(map(len, self.counts)))
        object.__setattr__(self, "top_k", tuple(self.top_k) or (0,) * layers)
        if not layers:
            raise TraceError("counts need one MoE layer at least, found none")
        for name in ("counts", "experts", "top_k"):
            if len(getattr(self, name)) != layers:
                raise TraceError(
                    f"{name} names {len(getattr(self, name))} layers, but layer_ids has {layers}"
                )
        if len(set(self.layer_ids)) != layers or min(self.layer_ids) < 0:
            raise TraceError(f"layer_ids must be distinct and 0 or more, found {self.layer_ids}")
        if self.tokens < 0:
            raise TraceError(f"tokens must be 0 (unknown) or more, found {self.tokens}")
        for position in range(layers):
            _check_layer(self, position)

    # -- what it is ------------------------------------------------------------------------------

    @cached_property
    def grid(self) -> ExpertGrid:
        """The dense numbering of the experts of these layers."""
        return ExpertGrid(layers=self.layer_ids, experts=self.experts)

    @property
    def uses(self) -> float:
        """(token, choice) pairs over all layers."""
        return float(sum(layer.sum() for layer in self.counts))

    def shares(self, position: int) -> FloatArray:
        """Float64 `[E]`: the share of the layer's uses that each expert has; 0 if it has none."""
        counts = self.counts[position]
        total = counts.sum()
        return counts / total if total > 0 else np.zeros_like(counts)

    def description(self) -> dict[str, Any]:
        """The fields that say what was counted, by name: what `total` compares."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in {"counts", "tokens", "source"}
        }

    @classmethod
    def from_trace(cls, trace: RoutingTrace, *, source: str = "trace") -> RoutingCounts:
        """The uses of each expert in a trace."""
        counts = []
        for position, experts in enumerate(trace.experts):
            # bincount wants int64: a layer at a time keeps the copy small.
            chosen = trace.topk_ids[:, position].ravel()
            found = np.bincount(chosen[chosen != UNUSED], minlength=experts)
            counts.append(found.astype(np.float64))
        return cls(
            counts=tuple(counts),
            layer_ids=trace.layer_ids,
            experts=trace.experts,
            top_k=trace.top_k,
            tokens=len(trace),
            model_id=trace.model_id,
            fingerprint=trace.fingerprint,
            source=source,
        )

    @classmethod
    def total(cls, parts: Sequence[RoutingCounts]) -> RoutingCounts:
        """The sum of several recordings of one model; tokens are known if all parts know theirs.

        Raises:
            TraceError: no parts, or parts of different models or layers.
        """
        if not parts:
            raise TraceError("nothing to sum: give one recording at least")
        first = parts[0]
        for number, part in enumerate(parts):
            for name, value in part.description().items():
                expected = first.description()[name]
                if value != expected:
                    raise TraceError(
                        f"counts {number} have another {name} than the first: {value!r} instead "
                        f"of {expected!r}; put together recordings of one model only"
                    )
        known = all(part.tokens for part in parts)
        return replace(
            first,
            counts=tuple(
                np.sum([part.counts[position] for part in parts], axis=0)
                for position in range(len(first.layer_ids))
            ),
            tokens=sum(part.tokens for part in parts) if known else 0,
            source=", ".join(dict.fromkeys(part.source for part in parts if part.source)),
        )

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: PathLike) -> Path:
        """Write one file (`*.counts.safetensors` by custom), whole or not at all.

        Returns:
            The path written.
        """
        header = {"format": FORMAT, "version": str(VERSION), "tokens": str(self.tokens)}
        for name, value in self.description().items():
            header[name] = value if isinstance(value, str) else json.dumps(value)
        header["source"] = self.source
        with replacing(path) as temporary:
            save_file({"counts": np.concatenate(self.counts)}, temporary, metadata=header)
        return Path(path)

    @classmethod
    def load(cls, path: PathLike) -> RoutingCounts:
        """Read a file.

        Raises:
            TraceError: nothing there, or a damaged file; names the file, the field and the remedy.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                _check_header(header)
                if "counts" not in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                    raise TraceError("tensor 'counts' is missing; import the recording again")
                return cls(**_described(header, file.get_tensor("counts")))
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error
        except FileNotFoundError as error:
            raise TraceError(f"{path}: no such file of counts; check the path") from error
        except (SafetensorError, OSError) as error:
            raise TraceError(
                f"{path}: not a complete safetensors file ({error}); copy or import it again"
            ) from error


def _check_layer(counts: RoutingCounts, position: int) -> None:
    """Type, length and numbers of one layer's counts."""
    layer, values = counts.layer_ids[position], counts.counts[position]
    experts, k = counts.experts[position], counts.top_k[position]
    if not 1 <= experts < UNUSED:
        raise TraceError(f"experts of layer {layer} must be 1 to {UNUSED - 1}, found {experts}")
    if not isinstance(values, np.ndarray) or values.dtype != np.float64:
        found = getattr(values, "dtype", type(values).__name__)
        raise TraceError(f"counts of layer {layer} must be an array of float64, found {found}")
    if values.shape != (experts,):
        raise TraceError(
            f"counts of layer {layer} must have shape [E] with E = {experts}, found {values.shape}"
        )
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        expert = int(np.argmax(wrong))
        raise TraceError(
            f"counts of layer {layer} expert {expert} must be finite and 0 or more, found "
            f"{values[expert]}"
        )
    if not 0 <= k <= experts:
        raise TraceError(f"top_k of layer {layer} must be 0 to {experts} experts, found {k}")


def _check_header(header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise TraceError(
            f"header field 'format' is {header.get('format')!r}, not {FORMAT!r}; this is no file "
            "of counts"
        )
    if header.get("version") != str(VERSION):
        raise TraceError(
            f"header field 'version' is {header.get('version')!r}, this release reads {VERSION}; "
            "read it with the release that wrote it, or import the recording again"
        )


def _described(header: dict[str, str], values: Any) -> dict[str, Any]:
    """The arguments of `RoutingCounts` from a file's header and its tensor."""
    result: dict[str, Any] = {}
    for name, kind in (("layer_ids", list), ("experts", list), ("top_k", list), ("tokens", int)):
        try:
            value = json.loads(header[name])
            items = value if isinstance(value, list) else [value]
            if not isinstance(value, kind) or any(type(item) is not int for item in items):
                raise ValueError(f"{header[name]!r:.80}")
        except (KeyError, ValueError, RecursionError) as error:
            raise TraceError(
                f"header field {name!r} is missing or damaged ({error}); import the recording again"
            ) from error
        result[name] = tuple(value) if isinstance(value, list) else value
    for name in ("model_id", "fingerprint", "source"):
        if name not in header:
            raise TraceError(f"header field {name!r} is missing; import the recording again")
        result[name] = header[name]
    experts = result["experts"]
    if any(not 1 <= count < UNUSED for count in experts) or values.shape != (sum(experts),):
        raise TraceError(
            f"tensor 'counts' has shape {values.shape}, but 'experts' has {len(experts)} layers of "
            f"{sum(experts)} experts in all; import the recording again"
        )
    if values.dtype != np.float64:
        raise TraceError(f"tensor 'counts' must be float64, found {values.dtype}")
    stops = np.cumsum(experts, dtype=np.int64)[:-1]
    result["counts"] = tuple(np.split(values, stops))
    return result
