"""The report of a parallel run: its counts, beside the plan's prediction; damage is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.parallel import ParallelRun
from moe_runtime.parallel.run import FORMAT
from moe_runtime.report import PARALLEL_FORMAT, ParallelReport, RunError
from parallel_models import on_threads, random_plan, some_prompts, tiny


@pytest.fixture(scope="module")
def run() -> ParallelRun:
    model = tiny(1)
    plan = random_plan(model, 2)
    return on_threads(
        model, some_prompts(), 2, plan=plan, max_new_tokens=4, stop_tokens=(), mode="coherent"
    )[0]


@pytest.fixture
def data(run: ParallelRun) -> dict[str, Any]:
    return json.loads(json.dumps(run.to_dict()))  # type: ignore[no-any-return]


def test_the_format_is_that_of_the_run() -> None:
    assert PARALLEL_FORMAT == FORMAT


def test_kinds_add_up_to_what_the_run_counted(run: ParallelRun, data: dict[str, Any]) -> None:
    facts = ParallelReport(data).facts()
    for kind, one in facts["kinds"].items():
        assert one == {"calls": run.calls_of(kind), "bytes": run.bytes_of(kind)}
    decode = sum(v["bytes"] for k, v in facts["kinds"].items() if not k.startswith("prefill."))
    assert decode == run.cross_bytes


def test_with_one_expert_a_token_the_plan_foretold_what_moved(data: dict[str, Any]) -> None:
    report = ParallelReport(data)
    line = next(one for one in str(report).splitlines() if "Rows that move" in one)
    foretold, seen = line.split("layer")[1].replace(" %", "%").split()
    assert foretold == seen
    assert foretold.endswith("%")
    page = report.to_html()
    assert page.count(foretold.replace("%", " %")) >= 2
    for kind in report.facts()["kinds"]:
        assert f"<td>{kind}</td>" in page


def test_prefill_is_foretold_to_the_byte_and_timed_beside_the_least_wait(
    data: dict[str, Any],
) -> None:
    def line(of: dict[str, Any], name: str) -> list[str]:
        found = [one for one in str(ParallelReport(of)).splitlines() if name in one]
        return found[0].split(name)[1].rsplit(maxsplit=4) if found else []

    bytes_line = line(data, "Bytes between ranks in prefill")
    assert bytes_line[-4:-2] == bytes_line[-2:]
    assert line(data, "Prefill on the links") == []  # nothing is known of them
    data["predicted"]["prefill"] |= {"seconds": 0.25}
    data["prefill_wait_seconds"] = [0.5, 0.75]
    assert line(data, "Prefill on the links")[-4:] == ["250.0", "ms", "500.0", "ms"]
    for damaged in ([], {"cross_bytes": "many", "seconds": None}):
        data["predicted"]["prefill"] = damaged
        assert line(data, "Prefill on the links") == line(data, "Bytes between ranks") == []
    del data["prefill_wait_seconds"]  # of older files
    ParallelReport(data).to_html()


def test_a_file_is_read_and_rendered(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.parallel-run.json"
    path.write_text(json.dumps(data))
    report = ParallelReport.load(path)
    assert report.save(tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "coherent on 2 ranks" in str(report)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("format", "moe-runtime.run", "format"),
        ("version", 2, "version"),
        ("ranks", None, "ranks"),
        ("steps", True, "steps"),
        ("sent", [1], "entries"),
        ("traffic", [{"kind": "move"}], r"traffic\[0\]\.layer"),
        ("stays", [{"layer": 0, "rows": "many"}], r"stays\[0\]"),
    ],
)
def test_damage_is_named(data: dict[str, Any], field: str, value: Any, named: str) -> None:
    with pytest.raises(RunError, match=named):
        ParallelReport(copy.deepcopy(data) | {field: value})
