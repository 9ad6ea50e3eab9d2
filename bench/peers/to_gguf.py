"""Owns writing the benchmark checkpoint as BF16 GGUF (architecture qwen3moe), for the peers.

Does not know other architectures. Needs numpy and the `gguf` package only; holds one layer's
stacked projection in memory at a time.

    python -m peers.to_gguf CHECKPOINT OUT.gguf
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

BF16 = gguf.GGMLQuantizationType.BF16
F32 = gguf.GGMLQuantizationType.F32
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
KEPT_IN_F32 = ("norm.weight", "ffn_gate_inp.weight")  # as the format's users expect


class Checkpoint:
    """Tensors of a sharded bf16 safetensors checkpoint as uint16 views of the mapped files."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self._where: dict[str, tuple[Path, int, list[int]]] = {}
        for name in sorted(set(index["weight_map"].values())):
            with (folder / name).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{key} is {entry['dtype']}: only BF16 is converted")
                begin = 8 + length + entry["data_offsets"][0]
                self._where[key] = (folder / name, begin, entry["shape"])

    def __getitem__(self, name: str) -> NDArray[np.uint16]:
        path, begin, shape = self._where[name]
        return np.memmap(path, dtype="<u2", mode="r", offset=begin, shape=tuple(shape))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name][2])


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One GGUF tensor and the checkpoint tensors that it stacks along a new first axis."""

    name: str
    sources: tuple[str, ...]
    stacked: bool

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        return F32 if self.name.endswith(KEPT_IN_F32) else BF16

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        one = checkpoint.shape(self.sources[0])
        return (len(self.sources), *one) if self.stacked else one

    def read(self, checkpoint: Checkpoint) -> NDArray[Any]:
        parts = [checkpoint[source] for source in self.sources]
        bits = np.stack(parts) if self.stacked else np.ascontiguousarray(parts[0])
        if self.kind == F32:
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits


def pieces(config: dict[str, Any]) -> Iterator[Piece]:
    def single(name: str, source: str) -> Piece:
        return Piece(name=name + ".weight", sources=(source + ".weight",), stacked=False)

    yield single("token_embd", "model.embed_tokens")
    for layer in range(config["num_hidden_layers"]):
        block, module = f"blk.{layer}.", f"model.layers.{layer}."
        for source, name in ATTENTION.items():
            yield single(block + name, module + source)
        for projection, name in EXPERTS.items():
            sources = tuple(
                f"{module}mlp.experts.{e}.{projection}.weight" for e in range(config["num_experts"])
            )
            yield Piece(name=f"{block}{name}.weight", sources=sources, stacked=True)
    yield single("output_norm", "model.norm")
    yield single("output", "lm_head")


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("routing benchmark")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    special = {entry["content"] for entry in content["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: int(vocab[token]))
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def convert(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3_moe":
        raise ValueError(f"model_type {config['model_type']}: only qwen3_moe is converted")
    checkpoint = Checkpoint(folder)
    temporary = out.with_name(out.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "qwen3moe")
    add_metadata(writer, config)
    add_tokenizer(writer, folder, config)
    plan = list(pieces(config))
    for piece in plan:
        shape = piece.shape(checkpoint)
        width = 4 if piece.kind == F32 else 2
        size = int(np.prod(shape)) * width
        dtype = np.dtype(np.float32 if piece.kind == F32 else np.float16)
        writer.add_tensor_info(piece.name, shape, dtype, size, raw_dtype=piece.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece in plan:
        writer.write_tensor_data(piece.read(checkpoint))
    writer.close()
    os.replace(temporary, out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
