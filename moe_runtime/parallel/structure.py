"""What coherence needs of a model, found by structure: its decoder layers, their norms and blocks.

Knows modules and one trial call; no links and no plans.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.model_spec import MoESpec
from moe_runtime.parallel.experts_call import handled

__all__ = ["DecoderLayer", "decoder_layers", "first_tensor"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderLayer:
    """One layer of the decoder.

    Args:
        module: the layer.
        position: of its experts among the MoE layers; None for a dense layer.
        norm: the module whose output is the experts' input and whose input is the residual stream;
            None where there is no such module. Then rows that move carry both.
        block: the module around the experts that gives what is added to the residual stream.
        shared: whether the block adds something of its own (shared experts).
    """

    module: nn.Module
    position: int | None = None
    norm: nn.Module | None = None
    block: nn.Module | None = None
    shared: bool = False

    @property
    def lean(self) -> bool:
        """Whether a row that moves needs nothing but its residual stream."""
        return self.norm is not None


def first_tensor(output: Any) -> torch.Tensor:
    """A module's output, or the first of several."""
    found = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(found, torch.Tensor), "layers give tensors"
    return found


def decoder_layers(model: PreTrainedModel, spec: MoESpec) -> list[DecoderLayer]:
    """The decoder's layers in order, from where the experts are and one call without them.

    Raises:
        UnsupportedModelError: an encoder-decoder, or experts that are not all in one list of
            layers, one experts module a layer.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; run decoder-only models")
    places = [re.match(r"(.*?)\.(\d+)\.(.+)$", layer.path) for layer in spec.layers]
    lists = {match[1] for match in places if match}
    numbers = [int(match[2]) for match in places if match]
    if None in places or len(lists) != 1 or len(set(numbers)) != len(spec.layers):
        found = ", ".join(layer.path for layer in spec.layers[:4])
        raise UnsupportedModelError(
            f"{name} has its experts at {found}, not one in each layer of one list; coherent "
            "expert parallelism needs that. Run it vanilla"
        )
    stack = model.get_submodule(lists.pop())
    position = {number: at for at, number in enumerate(numbers)}
    blocks = {int(match[2]): match[3].split(".")[0] for match in places if match}
    trial = _Trial(model, spec)
    with trial.watching({n: module for n, module in enumerate(stack.children()) if n in position}):
        trial.call()
    return [
        trial.described(number, module, position[number], blocks[number])
        if number in position
        else DecoderLayer(module=module)
        for number, module in enumerate(stack.children())
    ]


class _Silent:
    """Answers an experts call with zeros and remembers its input."""

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None

    def experts(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Zeros."""
        del ids, weights
        self.hidden = hidden.detach().clone()
        return torch.zeros_like(hidden)


class _Trial:
    """One call of two tokens with experts that give zeros, and what the layers' parts did."""

    def __init__(self, model: PreTrainedModel, spec: MoESpec) -> None:
        self._model = model
        self._silent = {layer.path: _Silent() for layer in spec.layers}
        self._paths = [layer.path for layer in spec.layers]
        self._seen: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self._out: dict[int, torch.Tensor] = {}

    def watching(self, layers: dict[int, nn.Module]) -> ExitStack:
        """Hooks on these layers and their children, until the stack is closed."""
        stack = ExitStack()
        for number, layer in layers.items():
            handle = layer.register_forward_hook(self._layer_hook(number))
            stack.callback(handle.remove)
            for name, child in layer.named_children():
                handle = child.register_forward_hook(self._child_hook(number, name))
                stack.callback(handle.remove)
        return stack

    def call(self) -> None:
        """The call itself; sends nothing to anybody."""
        device = self._model.device
        size = int(self._model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        ids = torch.tensor([[min(5, size - 1), min(7, size - 1)]], device=device)
        with torch.no_grad(), handled(self._model, self._silent):
            self._model(input_ids=ids, use_cache=False)

    def described(
        self, number: int, module: nn.Module, position: int, block_name: str
    ) -> DecoderLayer:
        """What the call showed of a layer."""
        children = dict(module.named_children())
        plain = DecoderLayer(module=module, position=position)
        hidden, out = self._silent[self._paths[position]].hidden, self._out.get(number)
        if (number, block_name) not in self._seen or hidden is None or out is None:
            return plain
        given, added = self._seen[number, block_name]
        if given.numel() != hidden.numel() or not torch.equal(given.view(hidden.shape), hidden):
            return plain  # the experts see something else than the block does
        for name, child in children.items():
            if name == block_name or (number, name) not in self._seen:
                continue
            before, after = self._seen[number, name]
            if (
                after.shape == given.shape == before.shape == added.shape == out.shape
                and torch.equal(after, given)
                and torch.equal(out, before + added)
            ):
                return DecoderLayer(
                    module=module,
                    position=position,
                    norm=child,
                    block=children[block_name],
                    shared=bool(added.any()),
                )
        return plain

    def _child_hook(self, number: int, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found = output[0] if isinstance(output, tuple | list) else output
            if args and isinstance(args[0], torch.Tensor) and isinstance(found, torch.Tensor):
                self._seen[number, name] = (args[0].detach().clone(), found.detach().clone())

        return hook

    def _layer_hook(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._out[number] = first_tensor(output).detach().clone()

        return hook
