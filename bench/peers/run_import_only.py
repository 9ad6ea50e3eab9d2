"""Runner: imports what ours imports, touches the model's class, and loads nothing.

Does not know the harness. Its group's peak is what any limit must leave for the libraries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peers.protocol import write_json

if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    config = AutoConfig.from_pretrained(task["checkpoint"])
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    torch.set_num_threads(task["threads"])
    write_json(Path(task["out"]), {"model_class": str(model_class)})
