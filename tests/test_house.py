"""The repository as a house: packaging, names, what importing does, and that the README's example
prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = {
    name: ROOT / PROJECT["tool"]["setuptools"]["package-dir"].get(name, name.replace(".", "/"))
    for name in PROJECT["tool"]["setuptools"]["packages"]
}
CODE = sorted(
    path
    for folder in ("moe_runtime", "placement", "predictors", "kernels", "tests", "bench", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = sorted(
    ".".join([name, path.stem]) if path.stem != "__init__" else name
    for name, folder in PACKAGES.items()
    for path in folder.glob("*.py")
    if path.stem != "__main__"
)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_python(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter outside the repository, so that only what is installed is imported."""
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "transformers imports the Hugging Face package `kernels`; a package of ours by that name "
        "breaks every model import"
    )
    assert (ROOT / "kernels" / "ops" / "__init__.py").is_file()


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_mapped_packages_are_imported_by_their_full_name(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    ]
    bare = {name for name in names if name.split(".")[0] in {"placement", "predictors", "kernels"}}
    assert not bare, f"import moe_runtime.{bare.pop()}"


def test_every_package_is_listed_and_exists() -> None:
    for name, folder in PACKAGES.items():
        assert (folder / "__init__.py").is_file(), f"{name}: no {folder}/__init__.py"
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "moe_runtime").rglob("__init__.py")
    }
    unlisted = found - set(PACKAGES)
    assert not unlisted, f"add to packages in pyproject.toml: {sorted(unlisted)}"


def test_the_version_is_the_same_everywhere() -> None:
    import moe_runtime

    assert moe_runtime.__version__ == PROJECT["project"]["version"]
    assert importlib.metadata.version("moe-runtime") == PROJECT["project"]["version"]


def test_types_and_data_are_installed() -> None:
    package = importlib.resources.files("moe_runtime")
    assert package.joinpath("py.typed").is_file()
    data = ROOT / "moe_runtime" / "data"
    for path in data.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py":
            relative = path.relative_to(ROOT / "moe_runtime").as_posix()
            assert package.joinpath(relative).is_file(), f"{relative} is not installed"


def by_kind(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, as ruff sorts `__all__`."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_sorted_and_there(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if name == "moe_runtime":
        assert public
    if public is None:
        return
    assert list(public) == sorted(public, key=by_kind)
    assert len(set(public)) == len(public)
    missing = [attribute for attribute in public if not hasattr(module, attribute)]
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_owns(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip()


def test_importing_is_light_and_starts_no_device(tmp_path: Path) -> None:
    # What torch and transformers import by themselves does not count.
    outcome = run_python(
        "import sys, torch, transformers\n"
        "from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel\n"
        "import transformers.conversion_mapping, transformers.integrations.moe\n"
        "before = set(sys.modules)\n"
        "import moe_runtime\n"
        "heavy = {'triton', 'matplotlib', 'typer', 'rich', 'jinja2', 'accelerate', 'pulp'}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & heavy, f'importing moe_runtime imports {sorted(new & heavy)}'\n"
        "assert not torch.cuda.is_initialized(), 'importing moe_runtime starts CUDA'\n",
        tmp_path,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert not outcome.stdout


@pytest.mark.parametrize(
    "path",
    [path for folder in PACKAGES.values() for path in sorted(folder.glob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_is_read_from_the_environment(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        assert name not in {"environ", "getenv", "putenv"}, (
            f"{path.name}:{getattr(node, 'lineno', 0)} uses {name}: options are arguments here"
        )


def test_the_readme_example_prints_what_it_says(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    match = re.search(
        r"<!-- example[^>]*-->\s*```python\n(?P<code>.*?)```\s*```text\n(?P<output>.*?)```",
        readme.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert match is not None, (
        "README.md has no example: write <!-- example -->, a ```python block, and a ```text block "
        "with its output (... stands for what changes)"
    )
    outcome = run_python(match["code"], tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    same = doctest.OutputChecker().check_output(
        match["output"], outcome.stdout, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert same, f"the README says\n{match['output']}\nbut it prints\n{outcome.stdout}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    if not path.is_file():
        pytest.fail(f"{path.name} is missing")
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "moe_runtime").glob("*.py")}
    missing = {
        name for name in files - {"__init__.py", "__main__.py", "version.py"} if name not in text
    }
    assert not missing, f"docs/architecture.md does not say what {sorted(missing)} own"


def test_pins_cover_every_direct_dependency() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert names == pinned
    assert "torch==2.13.0" in lines


@pytest.mark.parametrize("name", ["install", "check", "test", "bench", "../.ci/run"])
def test_scripts_parse_and_can_be_executed(name: str) -> None:
    script = ROOT / "scripts" / name
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


def test_make_says_what_is_wrong_with_a_bad_interpreter(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    outcome = subprocess.run(
        ["bash", ROOT / "scripts" / "install", tmp_path / "venv"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(fake)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode != 0
    assert "Python 3.11" in outcome.stderr
    assert not (tmp_path / "venv").exists()
