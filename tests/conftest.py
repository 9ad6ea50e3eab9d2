"""Fixtures that tests share: tiny checkpoints in every stored form, a prompt, its continuation by
plain transformers, and a way to let a read of an expert fail."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a hub
if not Path("/dev/nvidiactl").exists():
    # Before PyTorch is imported, which imports Triton where it is installed.
    os.environ["TRITON_INTERPRET"] = "1"

import shutil
import threading
from collections.abc import Callable

import hypothesis
import pytest
import torch
import transformers
from transformers import Qwen3MoeForCausalLM

from moe_runtime import store
from outputs import Checkpoint, odd_model
from running import FailAt
from tiny import FORMS, SHARD_SIZE, VOCAB, TinyCheckpoints, tiny_model

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("house")


OUTPUT_CASES = {
    "float32": ("tiny", torch.float32, "native"),
    "bfloat16": ("tiny", torch.bfloat16, "native"),
    "odd-float32": ("odd", torch.float32, "native"),
    "odd-bfloat16": ("odd", torch.bfloat16, "native"),
    "float32-rows": ("tiny", torch.float32, "rows"),
    "bfloat16-rows": ("tiny", torch.bfloat16, "rows"),
    "odd-float32-rows": ("odd", torch.float32, "rows"),
}


def pytest_configure() -> None:
    """One thread for models this small; a test that wants more sets and restores it."""
    # A shell that starts the tests in the background ignores Ctrl-C for them; some tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


# Whatever they test runs no model: the release of transformers beside them makes no difference.
PLAIN = (
    *("test_import_table", "test_house", "test_readme_tables", "test_files", "test_places"),
    *("test_placement_", "test_eplb", "test_replicas", "test_residency", "test_export"),
    *("test_eviction", "test_cache", "test_hardware", "test_kernels_triton", "test_bench_"),
    *("test_report", "test_importers", "test_steering_statistics", "test_slots"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith(PLAIN):
            item.add_marker(pytest.mark.plain)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    """The tiny model in every form; tests must not write there (see `writable_checkpoints`)."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    for form in FORMS:
        model.save_pretrained(
            root / form,
            save_original_format=form.startswith("per_expert"),
            max_shard_size=SHARD_SIZE if form.endswith("sharded") else "1GB",
        )
    return TinyCheckpoints(**{form: root / form for form in FORMS})


@pytest.fixture
def writable_checkpoints(tiny_checkpoints: TinyCheckpoints, tmp_path: Path) -> TinyCheckpoints:
    """Copies of the tiny checkpoints that a test may damage."""
    for form in FORMS:
        shutil.copytree(tiny_checkpoints.form(form), tmp_path / "copies" / form)
    return TinyCheckpoints(**{form: tmp_path / "copies" / form for form in FORMS})


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    """Token ids `[1, 12]` of a prompt."""
    return torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def eager_tokens(tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor) -> torch.Tensor:
    """Token ids `[1, 28]`: the prompt and 16 tokens that plain transformers adds greedily."""
    model = Qwen3MoeForCausalLM.from_pretrained(
        tiny_checkpoints.per_expert, experts_implementation="eager"
    ).eval()
    tokens = model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert isinstance(tokens, torch.Tensor)
    return tokens


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> FailAt:
    """Let one read of an expert do something else; see `running.FailAt`."""
    plain: Callable[[int, memoryview, int], int] = store.read_range
    lock = threading.Lock()

    def arrange(number: int, act: Callable[[], int | None]) -> None:
        count = 0

        def read(fd: int, buffer: memoryview, offset: int) -> int:
            nonlocal count
            with lock:
                count += 1
                mine = count == number
            result = act() if mine else None
            return plain(fd, buffer, offset) if result is None else result

        monkeypatch.setattr(store, "read_range", read)

    return arrange


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other tiny model, of awkward sizes."""
    path = tmp_path_factory.mktemp("odd")
    odd_model().save_pretrained(path)
    return path


@pytest.fixture(scope="session", params=OUTPUT_CASES.values(), ids=OUTPUT_CASES.keys())
def checkpoint(
    request: pytest.FixtureRequest, tiny_checkpoints: TinyCheckpoints, odd_checkpoint: Path
) -> Checkpoint:
    """A checkpoint, and the dtype and layout to run it in."""
    name, dtype, layout = request.param
    path = odd_checkpoint if name == "odd" else tiny_checkpoints.per_expert
    return path, {"dtype": dtype, "layout": layout}
