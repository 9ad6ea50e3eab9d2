"""Options that say how a plan is to be run, for predicted step times, and their reading.

Does not know how times are predicted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import typer

from moe_runtime.errors import PlanError
from moe_runtime.placement.links import Link, Links
from moe_runtime.placement.messages import MessageSizes
from moe_runtime.placement.recordings import Recording
from moe_runtime.placement.step_time import Compute
from moe_runtime.placement.timed_plan import PROMPT_TOKENS, Serving
from moe_runtime.placement.topology import Topology

__all__ = [
    "BatchOption",
    "ComputeOption",
    "LinkOption",
    "NodeLinkOption",
    "PromptTokensOption",
    "ServingOptions",
    "WidthsOption",
    "serving_of",
]

LinkOption = Annotated[
    str | None,
    typer.Option(
        "--link",
        metavar="RATE[,LATENCY]",
        help="Between devices, for step times: 1Gbit,0.2ms or 25GB,20us.",
    ),
]
NodeLinkOption = Annotated[
    str | None,
    typer.Option("--node-link", metavar="RATE[,LATENCY]", help="Between nodes; else --link."),
]
BatchOption = Annotated[
    int, typer.Option("--batch", min=1, help="Sequences a decode step, for step times.")
]
PromptTokensOption = Annotated[
    int,
    typer.Option(
        "--prompt-tokens", min=1, help="Tokens of each sequence's prompt, for the time of prefill."
    ),
]
WidthsOption = Annotated[
    str | None,
    typer.Option(
        "--widths",
        metavar="H,KV,LAYERS,BYTES",
        help="Without --model, for step times: hidden width, numbers of one token's key and value "
        "in a layer, decoder layers, bytes of a number: 2048,1024,48,2.",
    ),
]
ComputeOption = Annotated[
    float,
    typer.Option("--compute-ms", min=0.0, help="Computing of a step in either mode, if known."),
]


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """The options as the command line took them."""

    link: str | None
    node_link: str | None
    batch: int
    widths: str | None
    compute_ms: float
    model: str | None
    prompt_tokens: int = PROMPT_TOKENS

    @property
    def given(self) -> bool:
        """Whether step times are asked for."""
        return self.link is not None


@dataclass(frozen=True, kw_only=True)
class _Widths:
    hidden: int
    keys_values: int
    layers: int
    itemsize: int


def serving_of(options: ServingOptions, topology: Topology, recording: Recording) -> Serving:
    """How the plan is to be run.

    Raises:
        PlanError: no link, and a topology that implies none; a text that is no link.
        typer.BadParameter: widths missing or malformed.
    """
    widths = _widths(options, recording)
    if options.link is not None:
        far = None if options.node_link is None else Link.parse(options.node_link)
        links = Links(near=Link.parse(options.link), far=far)
    elif options.node_link is not None:
        raise typer.BadParameter("--node-link needs --link, which joins the devices of a node")
    else:
        links = Links.of_topology(topology, widths.hidden * widths.itemsize)
    top_k = max(recording.top_k)
    if not top_k:
        raise PlanError(
            "the counts do not say how many experts a token has, which step times need; record a "
            "trace (moe-runtime trace)"
        )
    return Serving(
        rows=options.batch,
        sizes=MessageSizes.of(
            hidden=widths.hidden,
            keys_values=widths.keys_values,
            layers=widths.layers,
            itemsize=widths.itemsize,
            top_k=top_k,
            experts=max(recording.experts),
            rows=options.batch,
        ),
        links=links,
        prompt_tokens=options.prompt_tokens,
        compute=Compute(step=options.compute_ms * 1e-3),
    )


def _widths(options: ServingOptions, recording: Recording) -> _Widths:
    if options.widths is not None:
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){3}", options.widths):
            raise typer.BadParameter(
                f"--widths {options.widths!r}: write four whole numbers H,KV,LAYERS,BYTES, such as "
                "2048,1024,48,2"
            )
        hidden, keys_values, layers, itemsize = map(int, options.widths.split(","))
        found = _Widths(hidden=hidden, keys_values=keys_values, layers=layers, itemsize=itemsize)
    elif options.model is not None:
        found = _widths_of_model(options.model)
    else:
        raise typer.BadParameter(
            "step times need the model's widths: give --model, or --widths H,KV,LAYERS,BYTES"
        )
    last = max(recording.layer_ids)
    if found.layers <= last:
        raise PlanError(
            f"the recording has a MoE layer {last}, the widths speak of {found.layers} decoder "
            "layers; correct --widths"
        )
    return found


def _widths_of_model(model: str) -> _Widths:
    """Out of the checkpoint's configuration; no weight is read."""
    import torch
    from transformers import AutoConfig

    from moe_runtime.kv_cache import kv_bytes

    config = AutoConfig.from_pretrained(model)
    text = config.get_text_config(decoder=True)
    dtype = getattr(text, "dtype", None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    layers = int(text.num_hidden_layers)
    return _Widths(
        hidden=int(text.hidden_size),
        keys_values=kv_bytes(config, batch=1, length=1) // (layers * itemsize),
        layers=layers,
        itemsize=itemsize,
    )
