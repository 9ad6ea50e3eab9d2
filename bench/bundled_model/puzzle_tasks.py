"""Task files of puzzles for `moe-runtime steer eval`: validation, held-out test, other families.

Experts are found on training puzzles of `FOUND_ON`; beta is chosen on `validation.jsonl` (training
split, same families, another seed); `test.jsonl` has held-out puzzles of the same families,
`transfer.jsonl` held-out puzzles of families that neither saw. Run from bench/:

    python -m bundled_model.puzzle_tasks --out /tmp/tasks --count 120
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable
from itertools import islice, zip_longest
from pathlib import Path

from bundled_model.puzzles import Puzzle, Split, stream

# Without products: only seven of them are held out at the standard level.
FOUND_ON = ("sum", "chain", "sort", "largest")
TRANSFER = ("story", "count", "evens")
DRAWS = 50_000  # puzzles to look at before giving up
# Exact text, so that "07" or "7 apples" is no answer where "7" is wanted.
CHECKER = "exact"


def puzzles(
    split: Split,
    families: Collection[str],
    count: int,
    *,
    seed: int,
    leave_out: Collection[str] = (),
) -> list[Puzzle]:
    """`count` different puzzles, as many of each family as of the others, in turns.

    Args:
        leave_out: prompts that must not come.
    """
    wanted = dict(zip(families, _shares(count, len(families)), strict=True))
    found: dict[str, dict[str, Puzzle]] = {name: {} for name in families}
    for puzzle in islice(stream(split, seed), DRAWS):
        group = found.get(puzzle.family, {})
        if len(group) < wanted.get(puzzle.family, 0) and puzzle.prompt not in leave_out:
            group.setdefault(puzzle.prompt, puzzle)
            if all(len(found[name]) == wanted[name] for name in families):
                break
    else:
        few = {name: len(group) for name, group in found.items() if len(group) < wanted[name]}
        raise SystemExit(f"too few different {split} puzzles in {DRAWS} draws: found {few}")
    rounds = zip_longest(*(group.values() for group in found.values()))
    return [one for turn in rounds for one in turn if one is not None]


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (at < count % parts) for at in range(parts)]


def write_tasks(path: Path, chosen: Iterable[Puzzle]) -> None:
    """A task file; ids are family and number."""
    lines = [
        json.dumps(
            {
                "id": f"{one.family}-{number}",
                "prompt": one.prompt,
                "answer": one.answer,
                "checker": CHECKER,
                "family": one.family,
            }
        )
        for number, one in enumerate(chosen)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--count", type=int, default=120, help="puzzles in each file")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    files = {
        "validation": puzzles("train", FOUND_ON, options.count, seed=options.seed),
        "test": puzzles("held_out", FOUND_ON, options.count, seed=options.seed + 1),
        "transfer": puzzles("held_out", TRANSFER, options.count, seed=options.seed + 2),
    }
    for name, chosen in files.items():
        write_tasks(options.out / f"{name}.jsonl", chosen)
        print(f"{options.out / name}.jsonl: {len(chosen)} puzzles")


if __name__ == "__main__":
    main()
