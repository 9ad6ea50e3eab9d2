"""Options that several commands share: their names, help and checks.

Knows no command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.core import parse_bytes, parse_share
from moe_runtime.errors import ConfigError

__all__ = [
    "AskedBatchOption",
    "AskedLengthOption",
    "DebugOption",
    "DtypeOption",
    "ExactOption",
    "ExpertBudgetOption",
    "HardwareOption",
    "HostBudgetOption",
    "JsonOption",
    "LocalOption",
    "MaxBatchOption",
    "MaxLengthOption",
    "ModelArgument",
    "PageOption",
    "PlanOption",
    "PolicyOption",
    "ReaderThreadsOption",
    "RevisionOption",
    "SubfolderOption",
    "VariantOption",
    "checked_budget",
    "hub_options",
    "outcome_place",
    "tokenizer_options",
]


def checked_budget(text: str) -> str:
    """A budget as `RuntimeConfig` takes it; wrong usage otherwise."""
    if text == "auto" or parse_share(text) is not None:
        return text
    try:
        parse_bytes(text)
    except ConfigError:
        raise typer.BadParameter(f"{text!r} is none of: bytes, '8GiB', '25%', 'auto'") from None
    return text


ModelArgument = Annotated[
    str, typer.Argument(help="A checkpoint's folder, or the id of one on the hub.")
]
ExpertBudgetOption = Annotated[
    str,
    typer.Option(
        "--expert-budget",
        callback=checked_budget,
        metavar="SIZE",
        help="Memory for experts: bytes, 8GiB, 25% (of all experts) or auto.",
    ),
]
HostBudgetOption = Annotated[
    str,
    typer.Option(
        "--host-budget",
        callback=checked_budget,
        metavar="SIZE",
        help="Pinned host memory for experts beside a GPU.",
    ),
]
MaxBatchOption = Annotated[
    int,
    typer.Option("--max-batch", min=1, help="Sequences at once that auto leaves memory for."),
]
MaxLengthOption = Annotated[
    int,
    typer.Option("--max-length", min=1, help="Tokens of each that auto leaves memory for."),
]
AskedBatchOption = Annotated[
    int | None,
    typer.Option(
        "--max-batch",
        min=1,
        help="Sequences at once that auto leaves memory for; as many as will run if not given.",
    ),
]
AskedLengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=1,
        help="Tokens of each that auto leaves memory for; the longest prompt's and the new ones "
        "if not given.",
    ),
]
HardwareOption = Annotated[
    str,
    typer.Option(
        "--hardware",
        metavar="FILE",
        help="A hardware profile; auto for the one that moe-runtime hardware kept, if any.",
    ),
]
HostExecutionOption = Annotated[
    str,
    typer.Option(
        "--host-execution",
        help="Compute experts that miss on a GPU on the host: auto (where that is sooner by the "
        "hardware profile), never, always.",
    ),
]
PolicyOption = Annotated[
    str, typer.Option("--policy", help="Which experts to evict: lru, lfu, ... by name.")
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="X.plan.json",
        help="Keep resident what this plan for one device keeps; the policy has the rest.",
    ),
]
ExactOption = Annotated[
    bool,
    typer.Option("--exact", help="Compute as transformers' eager experts do, bit for bit."),
]
ReaderThreadsOption = Annotated[
    int, typer.Option("--reader-threads", min=1, max=16, help="Threads that read experts.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Convert weights on reading: float32, bfloat16, float16."),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
]
SubfolderOption = Annotated[
    str | None, typer.Option("--subfolder", help="Folder inside the model's repository.")
]
VariantOption = Annotated[
    str | None, typer.Option("--variant", help="Variant in the weight files' names, like fp16.")
]
LocalOption = Annotated[
    bool, typer.Option("--local-files-only", help="Never ask the hub; use what is cached.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _page(path: Path | None) -> Path | None:
    """Refused before the work is done, not after it."""
    if path is not None and path.suffix != ".html":
        raise typer.BadParameter(f"{str(path)!r}: a page is written as .html; choose such a name")
    return path


PageOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="X.html",
        callback=_page,
        help="Write the run's page too, as `moe-runtime report` makes it.",
    ),
]


def hub_options(
    *,
    dtype: str | None = None,
    revision: str | None,
    subfolder: str | None,
    variant: str | None,
    local_files_only: bool,
) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`, only those that were given."""
    given = {
        "dtype": dtype,
        "revision": revision,
        "subfolder": subfolder,
        "variant": variant,
        "local_files_only": local_files_only,
    }
    return {name: value for name, value in given.items() if value}


def tokenizer_options(hub: dict[str, Any]) -> dict[str, Any]:
    """Those of `hub_options` that are not of weights."""
    return {name: value for name, value in hub.items() if name not in {"dtype", "variant"}}


def outcome_place(path: Path) -> Path:
    """A file to write to: its folder is made; BadParameter if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder of {path}: {error.strerror}") from None
    return path
