"""A second trained MoE of another shape than the bundled one, for predictors to be measured on.

An OLMoE of 4 layers x 16 experts, top-2, hidden size 96, with the bundled model's tokenizer and
texts; its weights are not kept in the repository. Run:

    python bench/second_model.py --english FOLDER_OF_TXT --out bench/work/second --minutes 10
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM

import moe_runtime
from bundled_model.data import Corpus, Mixture, read_english, read_python
from bundled_model.evaluate import held_out_losses
from bundled_model.model import CONTEXT, losses
from bundled_model.tokenizer import BEGIN, END, PAD, as_transformers, id_of
from bundled_model.train import Settings, make_optimizer

SAY = Console(stderr=True, highlight=False)
MIXTURE = Mixture(hard_until=0)


def bundled_tokenizer() -> Tokenizer:
    """The bundled model's tokenizer, as the training code takes it."""
    return Tokenizer.from_file(str(Path(moe_runtime.bundled_model()) / "tokenizer.json"))


def build(tokenizer: Tokenizer, seed: int) -> Any:
    """The model with random weights, float32, the same for the same seed."""
    config = OlmoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=id_of(tokenizer, BEGIN),
        eos_token_id=id_of(tokenizer, END),
        pad_token_id=id_of(tokenizer, PAD),
    )
    torch.manual_seed(seed)
    return OlmoeForCausalLM._from_config(config, experts_implementation="grouped_mm")


def train(corpus: Corpus, tokenizer: Tokenizer, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Trains for the minutes of the settings; the model and facts about its training."""
    model = build(tokenizer, settings.seed)
    optimizer = make_optimizer(model, settings)
    began, step = time.monotonic(), 0
    while (done := settings.progress(step, time.monotonic() - began)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, done)
        batch = corpus.batch(settings.mixture, settings.seed, step)
        entropy, balance = losses(
            model, torch.from_numpy(batch.ids), torch.from_numpy(batch.labels)
        )
        (entropy + settings.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            SAY.print(f"step {step}, {done:.0%}, loss {entropy.item():.3f}")
    model.eval()
    facts = {
        "steps": step,
        "seconds": round(time.monotonic() - began, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_loss": {
            name: round(loss, 3)
            for name, loss in held_out_losses(model, corpus, rows=8, context=256).items()
        },
    }
    return model, facts


def main(
    english: Annotated[Path, typer.Option(help="Folder of the addresses' .txt.")],
    out: Annotated[Path, typer.Option()] = Path("bench/work/second"),
    minutes: Annotated[float, typer.Option()] = 10.0,
    seed: Annotated[int, typer.Option()] = 21,
) -> None:
    """Trains the model and saves it with its tokenizer as transformers does."""
    tokenizer = bundled_tokenizer()
    texts = {"english": read_english(english), "python": read_python()}
    corpus = Corpus.from_texts(tokenizer, texts)
    settings = Settings(seed=seed, steps=100_000, minutes=minutes, mixture=MIXTURE)
    model, facts = train(corpus, tokenizer, settings)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    temporary = out.with_name(out.name + ".tmp")
    model.save_pretrained(temporary)
    as_transformers(tokenizer, CONTEXT).save_pretrained(temporary)
    os.replace(temporary, out)
    SAY.print(facts)


if __name__ == "__main__":
    typer.run(main)
