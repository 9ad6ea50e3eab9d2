"""A hub id goes through the usual options: the cache's own layout, offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import moe_runtime
from moe_runtime.errors import CheckpointError
from tiny import TinyCheckpoints

REPOSITORY = "someone/tiny-moe"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoints: TinyCheckpoints) -> Path:
    """A hub cache that holds the tiny checkpoint at revision `main`, and `old` without weights."""
    folder = tmp_path / "hub" / ("models--" + REPOSITORY.replace("/", "--"))
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(tiny_checkpoints.per_expert, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder.parent


def test_an_id_is_found_in_the_cache(hub: Path, tiny_checkpoints: TinyCheckpoints) -> None:
    options = {"expert_budget": "50%", "device": "cpu", "cache_dir": str(hub)}
    by_id = moe_runtime.from_pretrained(REPOSITORY, local_files_only=True, **options)
    by_path = moe_runtime.from_pretrained(
        str(tiny_checkpoints.per_expert), expert_budget="50%", device="cpu"
    )
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(by_id(ids).logits, by_path(ids).logits)


def test_a_revision_is_asked_for(hub: Path) -> None:
    options = {"expert_budget": "50%", "device": "cpu", "cache_dir": str(hub)}
    moe_runtime.from_pretrained(REPOSITORY, revision=COMMIT, local_files_only=True, **options)
    with pytest.raises(OSError, match="cached files"):
        moe_runtime.from_pretrained(REPOSITORY, revision="old", local_files_only=True, **options)


def test_a_subfolder_and_a_variant(tmp_path: Path, tiny_checkpoints: TinyCheckpoints) -> None:
    inner = tmp_path / "model" / "inner"
    shutil.copytree(tiny_checkpoints.per_expert, inner)
    for weights in inner.glob("model.safetensors"):
        weights.rename(inner / "model.half.safetensors")
    options = {"expert_budget": "50%", "device": "cpu", "subfolder": "inner"}
    model = moe_runtime.from_pretrained(str(inner.parent), variant="half", **options)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        moe_runtime.from_pretrained(str(inner.parent), **options)
