"""Runner: accelerate's disk offload of the experts, the rest in memory, through `device_map`.

Does not know the harness. Option `offload_folder`: where transformers writes what it offloads.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peers.protocol import Opened, Task, serve
from peers.run_transformers import stepper


def open_offloaded(task: Task) -> Opened:
    torch.set_num_threads(task.threads)
    config = AutoConfig.from_pretrained(task.checkpoint)
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    placed["lm_head"] = "cpu"
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for part in ("self_attn", "mlp.gate", "input_layernorm", "post_attention_layernorm"):
            placed[prefix + part] = "cpu"
        placed[prefix + "mlp.experts"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        task.checkpoint,
        dtype=torch.bfloat16,
        device_map=placed,
        offload_folder=task.options["offload_folder"],
        experts_implementation=task.options["experts"],
    ).eval()
    return Opened(step=stepper(model), packages=("torch", "transformers", "accelerate"))


if __name__ == "__main__":
    serve(open_offloaded)
