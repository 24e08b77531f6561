"""What a model is made of, whether it has changed since, and whether it may be sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.seams import require

if TYPE_CHECKING:
    from torch import nn

_CHILDREN, _PARAMETERS = attrgetter("_modules"), attrgetter("_parameters")


@dataclass(frozen=True, eq=False)
class Structure:
    """What a model is made of. It keeps references to all of it, so that comparing by identity is safe.

    Attributes:
        modules: the model itself first, then what is in it, then what is in that.
        children: of each module, what is in it by name.
        parameters: those of each module in turn; None where a place is empty.
        facts: how many parameters each module has, their names in it, and whether they are trained.
    """

    modules: Sequence[Any]
    children: Sequence[Mapping[str, Any]]
    parameters: Sequence[Any]
    facts: Sequence[Any]

    def holds(self, model: nn.Module) -> bool:
        """Whether `model` is made of the very same parts under the same names, and the same ones are trained.

        Asks every module that was there what is in it now: any difference shows in the first module that has it.
        """
        if model is not self.modules[0] or self.children != list(map(_CHILDREN, self.modules)):
            return False
        parameters, facts = _parameters_in(self.modules)
        return self.facts == facts and all(map(is_, self.parameters, parameters))


def parameter_shapes(model: nn.Module) -> dict[str, Any]:
    """Parameter -> shape, once each; those of a unit that FSDP1 has made one flat vector under their own names.

    With `use_orig_params=False` that vector is the only parameter of a unit, and knows what is in it.
    """
    shapes: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        inside = getattr(parameter, "_fqns", None)
        if inside is None:
            shapes[name] = getattr(parameter, "ds_shape", parameter.shape)
        else:
            unit = name.rpartition(".")[0]
            named = (f"{unit}.{each}" if unit else each for each in inside)
            shapes |= dict(zip(named, parameter._shapes, strict=True))
    return shapes


def structure(model: nn.Module) -> Structure:
    """The structure of a model."""
    require("torch.parameters", "torch.modules")
    modules: list[Any] = [model]
    for module in modules:  # which grows as it goes; it ends, as a module that contains itself cannot be trained
        modules += [child for child in module._modules.values() if child is not None]
    return Structure(modules, [dict(module._modules) for module in modules], *_parameters_in(modules))


def _parameters_in(modules: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    inside = list(map(_PARAMETERS, modules))
    parameters = list(chain.from_iterable(map(dict.values, inside)))
    trained = [parameter is not None and parameter.requires_grad for parameter in parameters]
    return parameters, [list(map(len, inside)), list(chain.from_iterable(inside)), trained]


def several_processes() -> bool:
    """Whether a model may be sharded: then gathering swaps parameters for others, and nothing may be remembered."""
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_initialized())
