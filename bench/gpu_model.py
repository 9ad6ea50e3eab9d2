"""Owns the model of the end-to-end GPU measurement: random weights, experts in pinned host memory.

Knows transformers' Qwen3-MoE; not the runtime, nor what is measured. There is no checkpoint: each
layer's two expert tensors are filled from one random block, every expert from another offset of it,
and every model that is made afterwards is a new shell of Parameters over the same memory.
"""

from __future__ import annotations

import mmap
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

__all__ = ["DRY_MODEL", "QWEN3_30B_A3B", "HostModel", "ModelShape"]

SEED = 6
_RESERVE = 12 << 30  # host memory that is left to everything else
_HUGE = 2 << 20


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Qwen3-MoE; weights are bf16."""

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * 2

    @property
    def layer_bytes(self) -> int:
        return self.experts * self.expert_bytes

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            intermediate_size=self.width * self.top_k, moe_intermediate_size=self.width,
            num_experts=self.experts, num_experts_per_tok=self.top_k, decoder_sparse_step=1,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, norm_topk_prob=True, tie_word_embeddings=False,
            max_position_embeddings=4096, dtype=torch.bfloat16,
        )  # fmt: skip


QWEN3_30B_A3B = ModelShape(
    name="Qwen3-30B-A3B", layers=48, experts=128, top_k=8, hidden=2048, width=768,
    heads=32, kv_heads=4, head_dim=128, vocabulary=151_936,
)  # fmt: skip
DRY_MODEL = ModelShape(
    name="dry run", layers=2, experts=8, top_k=2, hidden=32, width=16,
    heads=2, kv_heads=1, head_dim=16, vocabulary=64,
)  # fmt: skip


@dataclass(eq=False)
class HostModel:
    """The weights, and models made of them.

    Args:
        device: where everything but the experts lies.
        most_seconds: after so long no more host memory is made: further layers use that of the
            first ones again. The same holds where memory is short.

    Attributes:
        experts: for each layer its `gate_up_proj` and `down_proj` in host memory.
        made: how it was done, for the result file.
    """

    shape: ModelShape
    device: torch.device
    most_seconds: float = 120.0
    experts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, began = self.shape, time.perf_counter()
        self._memory: list[mmap.mmap] = []
        self._ways: set[str] = set()
        draw = torch.Generator().manual_seed(SEED)
        sizes = ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
        blocks = [_random_block(rows * columns, columns, draw) for rows, columns in sizes]
        distinct = 0
        for layer in range(shape.layers):
            late = time.perf_counter() - began > self.most_seconds
            short = psutil.virtual_memory().available < shape.layer_bytes + _RESERVE
            if layer and (late or (short and self.device.type == "cuda")):
                break
            both = [self._host((shape.experts, *size)) for size in sizes]
            for stack, block in zip(both, blocks, strict=True):
                _fill(stack, block, first=layer * shape.experts)
            self.experts.append((both[0], both[1]))
            distinct += 1
            if layer % 8 == 7:
                seconds = time.perf_counter() - began
                print(f"experts of {layer + 1} layers made: {seconds:.0f} s", file=sys.stderr)
        self.experts += [self.experts[i % distinct] for i in range(shape.layers - distinct)]
        self._make_dense()
        self.made = {
            "seconds": round(time.perf_counter() - began, 2),
            "host_memory": sorted(self._ways),
            "expert_bytes": shape.layers * shape.layer_bytes,
            "layers_with_memory_of_their_own": distinct,
            "how": f"bf16 normal, standard deviation fan-in^-0.5; each expert a piece of one block "
            f"of random numbers, at another offset; seed {SEED}",
            "dense_bytes": sum(one.numel() * one.element_size() for one in self.dense.values()),
        }

    def _host(self, size: tuple[int, ...]) -> torch.Tensor:
        """Page-locked bf16 memory, of no more bytes than asked for.

        PyTorch's own pinned allocator would round 0.8 GB up to a power of two.
        """
        count = 1
        for one in size:
            count *= one
        nbytes = 2 * count
        memory = mmap.mmap(-1, -(-nbytes // _HUGE) * _HUGE)
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, AttributeError):
            self._ways.add("small pages")
        flat = torch.frombuffer(memory, dtype=torch.bfloat16, count=count)
        if self.device.type != "cuda":
            self._ways.add("pageable")
            return flat.view(size)
        flat.zero_()  # all pages at once and by all threads, before they are locked one by one
        try:
            error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), len(memory), 0))
        except Exception as caught:  # noqa: BLE001  whatever it is, there is another way
            error = -1
            print(f"cudaHostRegister: {caught}", file=sys.stderr)
        if error == 0:
            self._memory.append(memory)  # stays registered until the process ends
            self._ways.add("mapped and registered")
            return flat.view(size)
        self._ways.add(f"PyTorch's pinned memory (cudaHostRegister gave {error})")
        return torch.empty(size, dtype=torch.bfloat16, pin_memory=True)

    def _make_dense(self) -> None:
        draw = torch.Generator(self.device).manual_seed(SEED)
        for name, parameter in _shell(self.shape).named_parameters():
            if ".mlp.experts." in name:
                continue
            made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=self.device)
            if parameter.dim() == 1:
                made.fill_(1)
            else:
                deviation = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
                made.normal_(0, deviation, generator=draw)
            self.dense[name] = made

    def model(self, *, resident_layers: int = 0) -> Qwen3MoeForCausalLM:
        """A new model over these weights.

        Args:
            resident_layers: so many layers have their experts copied to the device.
        """
        model = _shell(self.shape)
        for name, tensor in self.dense.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
        for layer, both in enumerate(self.experts):
            experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
            for leaf, tensor in zip(("gate_up_proj", "down_proj"), both, strict=True):
                held = tensor.to(self.device) if layer < resident_layers else tensor
                setattr(experts, leaf, nn.Parameter(held, requires_grad=False))
        rotary = model.model.rotary_emb
        with torch.device(self.device):
            model.model.rotary_emb = type(rotary)(model.config)
        left = [name for name, one in _tensors(model) if one.is_meta]
        assert not left, f"{left[0]} has no memory"
        return model.eval()


def _shell(shape: ModelShape) -> Qwen3MoeForCausalLM:
    """The model without memory."""
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(shape.config())


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _random_block(count: int, fan_in: int, draw: torch.Generator) -> torch.Tensor:
    """Random bf16 of four times an expert's tensor, small enough to be read fast."""
    block = torch.empty(4 * count, dtype=torch.float32).normal_(0, fan_in**-0.5, generator=draw)
    return block.to(torch.bfloat16)


def _fill(stack: torch.Tensor, block: torch.Tensor, *, first: int) -> None:
    """Write experts `first`, `first + 1`, ... into `stack [experts, ...]`, each another piece."""
    count = stack[0].numel()
    places = block.numel() - count
    for at, expert in enumerate(stack):
        # A large odd stride: neighbours and layers start far apart, none at the same place.
        offset = (first + at) * 1_000_003 % places
        expert.view(-1).copy_(block[offset : offset + count])
