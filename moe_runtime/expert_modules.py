"""Experts that are modules of their own in a list or a dictionary, found in a model by structure.

Knows PyTorch modules; does not know specs, checkpoints or how such experts are called.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["ExpertModules", "find_expert_modules", "owner_of", "parameter_shapes"]

# Name, shape and dtype of each parameter of a module.
_Signature = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertModules:
    """A list or dictionary of experts in a model.

    Args:
        path: of the container.
        container: `nn.ModuleList`, `nn.ModuleDict` or a subclass of them.
        experts: names of the experts in the container, by expert number.
        router: path of the module beside it that has as many outputs; empty if none was found.
    """

    path: str
    container: nn.Module
    experts: tuple[str, ...]
    router: str

    @property
    def scope(self) -> str:
        """Path of the module whose forward runs the experts: the container, or what holds it."""
        runs_them = type(self.container).forward is not nn.Module.forward
        return self.path if runs_them else self.path.rpartition(".")[0]


def find_expert_modules(model: nn.Module, *, apart_from: Collection[str]) -> list[ExpertModules]:
    """The lists of experts of a model (on any device), in the order of its modules.

    A list of experts holds two or more modules of one class whose parameters have the same names,
    shapes and dtypes, and stands beside (or in) a module that says in an attribute that there are
    so many experts. Modules without parameters in it (a dropout) are no experts. Of lists within
    each other only the inner ones count: a list of layers is none of experts.

    Args:
        apart_from: paths of experts found otherwise; what holds one of them is no list of experts.
    """
    found: list[ExpertModules] = []
    for path, parent in model.named_modules():
        for name, container in parent.named_children():
            experts = _equal_children(container)
            if experts and _are_counted(parent, container, len(experts)):
                where = f"{path}.{name}" if path else name
                router = _router(path, parent, container, len(experts))
                found.append(
                    ExpertModules(path=where, container=container, experts=experts, router=router)
                )
    inner = [*apart_from, *(one.path for one in found)]
    return [one for one in found if not any(p.startswith(f"{one.path}.") for p in inner)]


def parameter_shapes(expert: nn.Module) -> _Signature:
    """Name within the expert, shape and dtype of each of its parameters."""
    return tuple(
        (name, tuple(parameter.shape), parameter.dtype)
        for name, parameter in expert.named_parameters()
    )


def owner_of(expert: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds an expert's parameter itself, and the parameter's name there."""
    path, _, leaf = name.rpartition(".")
    return (expert.get_submodule(path) if path else expert), leaf


def _equal_children(container: nn.Module) -> tuple[str, ...]:
    """Names of a container's experts by expert number; empty if it is no list of experts."""
    if not isinstance(container, nn.ModuleList | nn.ModuleDict):
        return ()
    children = {
        name: child
        for name, child in container.named_children()
        if next(child.parameters(), None) is not None
    }
    if len(children) < 2 or len({type(child) for child in children.values()}) > 1:
        return ()
    if len({parameter_shapes(child) for child in children.values()}) > 1:
        return ()
    return _numbered(list(children))


def _numbered(names: list[str]) -> tuple[str, ...]:
    """Ordered by the number that each name ends in, if these count the experts; else as they are.

    Routers speak of experts by number, whatever the order in which a dictionary was filled.
    """
    ends = [re.search(r"\d+$", name) for name in names]
    numbers = {int(end[0]): name for end, name in zip(ends, names, strict=True) if end}
    if sorted(numbers) == list(range(len(names))):
        return tuple(numbers[number] for number in range(len(names)))
    return tuple(names)


def _are_counted(parent: nn.Module, container: nn.Module, count: int) -> bool:
    """Whether the container or something beside it says that there are `count` experts."""
    return any(_says(place, count) for place in (container, parent, *parent.children()))


def _says(module: nn.Module, count: int) -> bool:
    return any(
        value == count
        for name, value in vars(module).items()
        if "expert" in name.lower() and isinstance(value, int) and not isinstance(value, bool)
    )


def _router(path: str, parent: nn.Module, container: nn.Module, count: int) -> str:
    """The sibling that has a matrix of one row for each expert."""
    for name, sibling in parent.named_children():
        if sibling is container or isinstance(sibling, nn.Embedding):
            continue
        if any(p.dim() == 2 and p.shape[0] == count for p in sibling.parameters()):
            return f"{path}.{name}" if path else name
    return ""
