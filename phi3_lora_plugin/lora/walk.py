"""Walks over the modules of a model: one for all who ask within a block, and whether it is still what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Structure:
    """What a model is made of, level by level. It holds on to all of it, so that identity means what it says.

    Attributes:
        names: of modules and parameters, each in the one that has it.
        modules: the model itself first.
        parameters: like modules, None where a place is empty.
        trained: whether each parameter is.
    """

    names: Sequence[str]
    modules: Sequence[Any]
    parameters: Sequence[Any]
    trained: Sequence[bool]

    def holds(self, model: nn.Module) -> bool:
        """Whether `model` is made of the very same parts under the same names, and the same ones are trained."""
        now = structure(model)
        return (
            self.trained == now.trained
            and self.names == now.names
            and _same(self.modules, now.modules)
            and _same(self.parameters, now.parameters)
        )


def structure(model: nn.Module) -> Structure:
    """The structure of a model; a fifth of the time of `named_modules`, as no path is put together."""
    names: list[str] = []
    modules: list[Any] = [model]
    parameters: list[Any] = []
    for module in modules:  # which grows as it goes; it ends, as a module that contains itself cannot be trained
        own = {} if module is None else vars(module)
        if children := own.get("_modules"):
            names += children
            modules += children.values()
        if inside := own.get("_parameters"):
            names += inside
            parameters += inside.values()
    return Structure(names, modules, parameters, [p is not None and p.requires_grad for p in parameters])


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Let everybody who walks over the modules of `model` in this block see one walk; none may come or go meanwhile.

    Who asks for names, parameters, layers and shapes makes a dozen walks of 3 ms each over 32 layers.
    """
    if several_processes() or "named_modules" in model.__dict__:  # there may be a block like this one around
        yield
        return
    modules = tuple(model.named_modules())
    parameters = tuple(_parameters_of(modules))
    stock = type(model)

    def named_modules(memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        if memo or prefix or not remove_duplicate:
            return iter(stock.named_modules(model, memo, prefix, remove_duplicate))
        return iter(modules)

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        if prefix or not recurse or not remove_duplicate:
            return iter(stock.named_parameters(model, prefix, recurse, remove_duplicate))
        return iter(parameters)

    model.named_modules, model.named_parameters = named_modules, named_parameters
    try:
        yield
    finally:
        del model.named_modules, model.named_parameters


def several_processes() -> bool:
    """Whether a model may be sharded: then gathering swaps parameters for others, and nothing may be remembered."""
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_initialized())


def _parameters_of(modules: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What `named_parameters` gives, from a walk that has been made."""
    seen = set()
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter
