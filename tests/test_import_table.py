"""The import table of the house: which module may import which, and which package of others.

Every import statement counts, inside functions and under `if TYPE_CHECKING` too. A module without
a row fails: add one to `ROWS`, below everything it may import.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = {  # folder of the repository -> name of the package
    "moe_runtime": "moe_runtime",
    "placement": "moe_runtime.placement",
    "predictors": "moe_runtime.predictors",
    "kernels/ops": "moe_runtime.kernels",
}

# module (without "moe_runtime.") | modules of ours it may import | packages of others
# A row may name only rows above it (ABOVE: all of them); `core`, `errors`, `files` are for all.
# A name ending in ".*" stands for a package and all that is in it.
ROWS = """
version           |                                        |
bundled           |                                        |
errors            |                                        |
core              |                                        | numpy
files             |                                        |
kernels.*         | kernels.*                              | torch numpy triton
config            |                                        |
memory            |                                        | torch psutil
device            |                                        | torch
ending            |                                        |
hardware.*        | memory hardware.*                      | torch numpy psutil pynvml
places            | hardware.*                             | numpy
expert_modules    |                                        | torch
model_spec        | expert_modules                         | torch transformers
paged             |                                        | torch
expert_tensors    | expert_modules model_spec paged        | torch
safetensors_index |                                        | torch transformers safetensors
loading           | model_spec paged safetensors_index expert_tensors \
                                                           | torch transformers safetensors
checkpoint        | model_spec safetensors_index           | torch transformers numpy
access            |                                        | numpy
trace             | access model_spec                      | torch numpy safetensors
trace_writer      | trace                                  | numpy safetensors
trace_reader      | trace                                  | numpy safetensors
routing_counts    | trace                                  | numpy safetensors
trace_summary     | trace routing_counts                   | numpy
corpus            |                                        |
importers.*       | trace trace_writer routing_counts importers.* | numpy torch safetensors
kv_cache          |                                        | torch transformers
slots             | model_spec                             | torch
filling           | checkpoint                             | torch
store             | checkpoint model_spec slots filling    | torch numpy
budget            | memory model_spec slots store hardware.* kv_cache | torch transformers
slot_memory       | budget device memory model_spec slots store | torch
selection         |                                        | numpy
eviction_learned  | selection                              | numpy
eviction_predicted | eviction_learned selection            | numpy
eviction          | access eviction_learned eviction_predicted selection | numpy
simulate          | access eviction                        | numpy
predictors.base   | trace                                  | torch numpy
predictors.evaluation |                                    |
predictors.*      | trace trace_summary model_spec predictors.* | torch numpy safetensors
cache             | access store eviction                  | torch numpy
prefetch          | model_spec cache device store          | torch numpy
layout            | kernels.* model_spec checkpoint slots  |
steps             |                                        | torch
routing           | access                                 | torch numpy
eager             |                                        | torch
profiler          | access                                 | numpy psutil
payoff            |                                        |
forecast          | predictors.base                        | torch numpy
prefetch_planner  | cache forecast                         | numpy
loader            | access cache forecast payoff predictors.base prefetch_planner profiler | torch
slot_transfers    | cache device prefetch slots            |
rows              | steps predictors.base                  | torch numpy
prediction        | model_spec forecast loader payoff predictors.* prefetch_planner | numpy
decision_log      | cache                                  |
virtual_link      | prefetch                               |
timed_result      |                                        |
timed_simulation  | access cache eviction forecast loader payoff predictors.* prefetch_planner \
                    profiler timed_result trace virtual_link | numpy
cache_baselines   | eviction predictors.* prefetch_planner timed_result timed_simulation trace \
                    virtual_link                           | numpy
host_experts      | kernels.*                              | torch
hosting           | hardware.* places                      |
slot_layers       | kernels.* cache device ending host_experts hosting loader prefetch \
                    routing slot_transfers slots                  | torch
executor          | kernels.* model_spec access cache device eager loader prefetch profiler \
                    routing rows slot_layers slot_transfers slots steps | torch numpy transformers
interface         | executor                               | torch transformers
module_routing    | access                                 | torch numpy
module_calls      | access executor expert_modules model_spec module_routing steps | torch numpy
module_hooks      | executor interface model_spec module_calls | torch
recorder          | model_spec trace steps                 | torch numpy
saving            | model_spec safetensors_index checkpoint paged | torch
run_record        | version access budget cache config eviction memory model_spec profiler \
                    simulate                               | numpy torch transformers psutil
scheduler         | cache predictors.base                  | torch numpy
steering.values   |                                        |
steering.plain    |                                        |
steering.evaluation | steering.plain                       |
steering.fields   |                                        |
steering.identification | steering.fields                  | numpy
steering.files    | model_spec steering.identification steering.fields steering.values |
steering.shift    | trace                                  | numpy
steering.cost     | steering.plain steering.shift          |
placement.topology|                                        | numpy yaml
placement.plan    | placement.topology                     | numpy
placement.ilp*    | trace placement.*                      | numpy pulp
placement.export_*| trace placement.*                      | numpy torch yaml
placement.bake*   | version memory model_spec loading checkpoint safetensors_index placement.plan \
                    placement.bake*                        | numpy torch transformers
placement.*       | trace routing_counts placement.*       | numpy scipy
pinning           | placement.plan model_spec cache executor | numpy
report.*          | profiler placement.plan predictors.evaluation steering.files \
                    steering.identification steering.evaluation steering.cost report.* \
                                                           | numpy jinja2 matplotlib
inspection        | model_spec loading checkpoint safetensors_index |
assembly          | ABOVE                                  | torch transformers
runtime           | ABOVE                                  | torch transformers
lifecycle         | ABOVE                                  | torch transformers
steering.picture  | steering.identification                | numpy matplotlib
steering.tasks    |                                        |
steering.statistics |                                      | numpy
steering.journal  | steering.outcomes steering.plain       |
steering.cost_run | run_record runtime steering.* trace version | torch transformers
steering.*        | trace trace_reader routing_counts version model_spec expert_modules \
                    module_routing steps cache executor runtime steering.* \
                                                           | torch numpy transformers
token_choice      |                                        | torch
prompt_state      | token_choice                           | torch
sequence_caches   |                                        | torch transformers
path_forecast     | predictors.base steps                  | torch numpy
batch_run         |                                        |
batch_counts      | runtime scheduler batch_run            | numpy
batch_loop        | runtime scheduler predictors.base prompt_state sequence_caches path_forecast \
                    batch_run batch_counts                 | torch numpy transformers
batch_check       | batch_run prompt_state token_choice    | torch transformers
parallel.*        | version model_spec checkpoint safetensors_index device memory layout slots \
                    store expert_tensors loading kv_cache trace run_record \
                    placement.* token_choice batch_run prompt_state sequence_caches parallel.* \
                                                           | torch numpy scipy transformers
batches           | runtime scheduler predictors.* token_choice prompt_state path_forecast \
                    batch_run batch_loop batch_check       | transformers
__init__          | ABOVE                                  |
cli.*             | version __init__ runtime config budget kv_cache layout report.* placement.* \
                    hardware.*                             \
                    cache_baselines timed_result timed_simulation virtual_link \
                    predictors.* steering.* importers.* trace trace_summary routing_counts \
                    corpus batches parallel.* cli.* \
                  | typer rich numpy torch transformers
__main__          | cli.*                                  |
"""

ALWAYS = {"errors", "core", "files"}
INSIDE_FUNCTIONS_ONLY = {"triton", "matplotlib", "pulp", "pynvml"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one module, or every module that a pattern names, may import."""

    module: str
    ours: frozenset[str]
    others: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import found in a file; `target` is dotted, `top` says whether importing runs it."""

    target: str
    line: int
    top: bool


def parse_rows(text: str) -> list[Row]:
    rows: list[Row] = []
    for line in text.strip().splitlines():
        module, ours, others = (part.strip() for part in line.split("|"))
        named = set(ours.split())
        if "ABOVE" in named:
            named = (named - {"ABOVE"}) | {row.module for row in rows}
        rows.append(
            Row(module=module, ours=frozenset(named | ALWAYS), others=frozenset(others.split()))
        )
    return rows


TABLE = parse_rows(ROWS)


def covers(pattern: str, module: str) -> bool:
    """Whether a name of the table stands for this module (`report.*` also for `report`)."""
    if pattern.endswith(".*"):
        package = pattern[:-2]
        return module == package or module.startswith(package + ".")
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\w*"), module) is not None


def row_of(module: str) -> Row | None:
    """The row of this very name, else the first whose pattern names the module."""
    exact = next((row for row in TABLE if row.module == module), None)
    return exact or next((row for row in TABLE if covers(row.module, module)), None)


def our_files() -> dict[str, Path]:
    """Every module of ours by its name without `moe_runtime.`; the root package is `__init__`."""
    found: dict[str, Path] = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts]
            if parts[-1] == "__init__" and parts != ["moe_runtime", "__init__"]:
                parts.pop()
            found[".".join(parts[1:])] = path
    return found


FILES = our_files()


def imports_of(source: str) -> Iterator[Import]:
    """All imports of a source text, those made through `importlib.import_module("x")` too."""

    def visit(node: ast.AST, *, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = top and not (
                isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            )
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(target=alias.name, line=child.lineno, top=top)
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                for alias in child.names:
                    yield Import(target=f"{base}.{alias.name}", line=child.lineno, top=top)
            elif isinstance(child, ast.Call) and child.args:
                name = getattr(child.func, "attr", getattr(child.func, "id", ""))
                first = child.args[0]
                if (
                    name in {"import_module", "__import__"}
                    and isinstance(first, ast.Constant)
                    and isinstance(first.value, str)
                ):
                    yield Import(target=first.value, line=child.lineno, top=top)
            yield from visit(child, top=inner)

    yield from visit(ast.parse(source), top=True)


def our_module(target: str) -> str | None:
    """The module of ours that a dotted import target names, None if it is not of ours."""
    if target.split(".", 1)[0] != "moe_runtime":
        return None
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in FILES:
        parts.pop()  # the last names may be attributes of the module
    return ".".join(parts) or "__init__"


def faults_of(module: str, source: str) -> list[str]:
    """Everything in a module's source that its row of the table does not allow."""
    row = row_of(module)
    if row is None:
        return [f"{module}: no row in ROWS of {Path(__file__).name}; add one for it"]
    faults = []
    for found in imports_of(source):
        where = f"{module}:{found.line} imports {found.target}"
        if found.target.startswith("."):
            faults.append(f"{where}: relative imports are not used here")
            continue
        ours = our_module(found.target)
        package = found.target.split(".")[0]
        if ours is not None:
            if ours != module and not any(covers(name, ours) for name in row.ours):
                faults.append(f"{where}: its row allows {sorted(row.ours)}")
        elif package in FOLDERS or package == "kernels":
            faults.append(f"{where}: write moe_runtime.{package}")
        elif package not in sys.stdlib_module_names:
            if package not in row.others:
                faults.append(f"{where}: its row allows {sorted(row.others)}")
            elif found.top and package in INSIDE_FUNCTIONS_ONLY:
                faults.append(f"{where}: import {package} inside the function that uses it")
    return faults


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_only_what_its_row_allows(module: str) -> None:
    faults = faults_of(module, FILES[module].read_text(encoding="utf-8"))
    assert not faults, "\n".join(faults)


def test_every_package_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    declared = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in wanted}
    distributions = {"pynvml": "nvidia-ml-py", "yaml": "pyyaml"}
    undeclared = {
        f"{module} imports {found.target}"
        for module, path in FILES.items()
        for found in imports_of(path.read_text(encoding="utf-8"))
        for package in [found.target.split(".")[0]]
        if package not in sys.stdlib_module_names and package != "moe_runtime"
        if distributions.get(package, package) not in declared | {"triton"}  # comes with torch
    }
    assert not undeclared


def test_a_row_names_only_rows_above_it() -> None:
    above: list[str] = []
    for row in TABLE:
        above.append(row.module)
        unknown = {
            name
            for name in row.ours - ALWAYS
            if name not in above
            and not (name == "placement.plan" and "placement.*" in above)
            and not name.startswith(row.module.split(".")[0] + ".")
        }
        assert not unknown, f"{row.module} names {unknown}, which are not above it"


@pytest.mark.parametrize(
    ("module", "source", "hint"),
    [
        ("cache", "import moe_runtime.executor", "its row allows"),
        ("cache", "from moe_runtime import runtime", "its row allows"),
        ("core", "def f():\n    import torch", "its row allows"),
        ("cache", "if TYPE_CHECKING:\n    from moe_runtime.executor import x", "its row allows"),
        ("store", "import placement.plan", "write moe_runtime.placement"),
        ("cache", "from . import store", "relative"),
        ("kernels.grouped", "import triton", "inside the function"),
        ("kernels.grouped", "from moe_runtime.core import ExpertId", ""),
        ("placement.sweep", "import torch", "its row allows"),
        ("placement.sweep", "def f():\n    import pulp", "its row allows"),
        ("placement.sweep", "import moe_runtime.cache", "its row allows"),
        ("predictors.transition", "from moe_runtime.placement import plan", "its row allows"),
        ("config", "import importlib\nimportlib.import_module('moe_runtime.runtime')", "its row"),
        ("brand_new", "import os", "add one"),
    ],
)
def test_the_table_catches(module: str, source: str, hint: str) -> None:
    faults = faults_of(module, source)
    assert len(faults) == bool(hint)
    assert not faults or hint in faults[0]
