"""Exports the trained weights as the package's bundled model, with its demo prompts.

    python -m bundled_model.finish

Does not measure; `bundled_model.measure` does, and writes the model card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from safetensors import safe_open
from tokenizers import Tokenizer

from bundled_model.data import Mixture
from bundled_model.model import Shape, build, export
from bundled_model.puzzles import FAMILIES, held_out
from bundled_model.state import load_state
from bundled_model.train import STATE, TOKENIZER, Settings, make_optimizer

BUNDLED = Path(__file__).resolve().parents[2] / "moe_runtime" / "data" / "bundled"

ENGLISH = (
    "The Congress of the United States has",
    "Our relations with foreign nations",
    "The American people have always",
    "In the last year, the Secretary of the Treasury",
)
PYTHON = (
    "def read_lines(path):\n    ",
    "import os\nimport sys\n\n",
    "class Reader:\n    def __init__(self, ",
    "for name in names:\n    if ",
)


def demo_prompts(seed: int = 2) -> dict[str, list[dict[str, str]]]:
    """A few prompts a domain; the reasoning ones are held out, one a family, with the answer."""
    by_family = {puzzle.family: puzzle for puzzle in held_out(200, seed)}
    return {
        "english": [{"prompt": prompt} for prompt in ENGLISH],
        "python": [{"prompt": prompt} for prompt in PYTHON],
        "reasoning": [
            {"prompt": by_family[family].prompt, "answer": by_family[family].answer}
            for family in FAMILIES
        ],
    }


def stored_settings(state: Path) -> Settings:
    """The settings that a saved state was trained with."""
    with safe_open(state, framework="pt") as file:
        stored = json.loads(file.metadata()["facts"])["settings"]
    mixture = stored.pop("mixture")
    mixture["rows"] = tuple(mixture["rows"])
    shape = Shape(**stored.pop("shape"))
    return Settings(**stored, shape=shape, mixture=Mixture(**mixture))


def main(
    trained: Annotated[Path, typer.Option(help="The --out of training.")] = Path(
        "work/bundled_model"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the finished model.")] = BUNDLED,
) -> None:
    """Writes the finished model from the last saved state."""
    settings = stored_settings(trained / STATE)
    tokenizer = Tokenizer.from_file(str(trained / TOKENIZER))
    model = build(settings.shape, tokenizer, settings.seed)
    load_state(trained / STATE, model, make_optimizer(model, settings))
    out.parent.mkdir(parents=True, exist_ok=True)
    size = export(model, tokenizer, out)
    prompts = json.dumps(demo_prompts(), indent=1, ensure_ascii=False) + "\n"
    (out / "prompts.json").write_text(prompts, encoding="utf-8")
    typer.echo(f"{out}: {size + len(prompts.encode())} bytes")


if __name__ == "__main__":
    typer.run(main)
