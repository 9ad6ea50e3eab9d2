"""The README's measured tables: how markers become tables, and that the README is current."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "readme_tables", ROOT / "scripts" / "readme_tables.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_script()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    data = {
        "machine": {
            "processor": "A CPU",
            "cores": 2,
            "memory_bytes": 24 << 30,
            "load_average": [0.1],
            "when": "2026-11-23T22:00:00+00:00",
        },
        "command": "python bench/peers.py",
        "speedup": 12.345,
        "runners": {
            "ours": {"rate": 5.26, "disk": {"bytes": 123_456_789}, "same": True},
            "theirs": {"rate": 0.5, "disk": {"bytes": None}, "same": False},
            "killed": {"rate": None, "disk": "none"},
        },
        "list": [{"share": 0.25}, {"share": 0.5}],
    }
    (tmp_path / "peers.json").write_text(json.dumps(data))
    return tmp_path


def test_a_table_is_made_from_an_object_of_rows(results: Path) -> None:
    text = (
        "before\n<!-- table peers.json runners | runner = @key | tokens/s = rate : .2f\n"
        "| disk = disk/bytes : bytes | same = same -->\nold\n<!-- /table -->\nafter"
    )
    new = tables.render(text, results)
    assert "| runner | tokens/s | disk | same |\n|---|---|---|---|\n" in new
    assert (
        "| ours | 5.26 | 123 MB | yes |\n| theirs | 0.50 | - | no |\n| killed | - | - | - |\n"
        in new
    )
    assert (
        "\nMachine: A CPU, 2 cores, 24 GiB of memory. Command: `python bench/peers.py`. "
        "Measured 2026-11-23.\n" in new
    )
    assert "old" not in new
    assert new.startswith("before\n")
    assert new.endswith("\nafter")
    assert tables.render(new, results) == new


def test_a_table_is_made_from_a_list_of_rows(results: Path) -> None:
    text = "<!-- table peers.json list | share = share : percent -->\n<!-- /table -->"
    assert "| 25.0 % |\n| 50.0 % |" in tables.render(text, results)


def test_a_slash_in_a_name_is_doubled() -> None:
    data = {"100 Mbit/s": {"speedup": 2}}
    assert tables.look_up(data, "100 Mbit//s/speedup", "links.json") == 2
    with pytest.raises(tables.TableError, match="no '100 Mbit'"):
        tables.look_up(data, "100 Mbit/s/speedup", "links.json")


def test_a_value_stands_in_a_sentence(results: Path) -> None:
    text = "It is <!-- value peers.json speedup : .1f -->1<!-- /value -->x."
    assert "-->12.3<!--" in tables.render(text, results)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("value gone.json speedup", "peers.json"),
        ("value peers.json sped", "speedup"),
        ("value peers.json list/7", "'7'"),
        ("table peers.json runners | tokens/s = speed", "no 'speed'"),
        ("table peers.json runners", "columns are written"),
        ("table peers.json speedup | a = b", "neither a list nor an object"),
    ],
)
def test_a_marker_that_does_not_fit_is_named(results: Path, spec: str, hint: str) -> None:
    with pytest.raises(tables.TableError, match=hint):
        tables.render(f"<!-- {spec} -->\n<!-- /{spec.split(maxsplit=1)[0]} -->", results)


def test_the_readme_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_marker_of_the_readme_is_closed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("table", "value"):
        assert text.count(f"<!-- {name} ") == text.count(f"<!-- /{name} -->")
