"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_runtime.files import replacing, write_text


def test_a_file_gets_its_name_when_the_block_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".json"
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
