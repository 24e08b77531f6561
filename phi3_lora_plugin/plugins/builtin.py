"""What this package itself registers, through the same entry point that any other plugin uses."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from phi3_lora_plugin.recipe import Recipe


@hookimpl
def register_models(register: Callable[[str, Any], None]) -> None:
    from phi3_lora_plugin.model.load import load

    register("phi3", load)


@hookimpl
def register_dataset_adapters(register: Callable[[str, Any], None]) -> None:
    from phi3_lora_plugin.chat.formats import ADAPTERS

    for name, adapt in ADAPTERS.items():
        register(name, adapt)


@hookimpl
def register_recipes(register: Callable[[str, Any], None]) -> None:
    from phi3_lora_plugin.shipped import shipped

    for file in shipped("recipes").iterdir():
        if file.name.endswith(".yaml"):
            register(file.name.removesuffix(".yaml"), file)


@hookimpl
def register_exporters(register: Callable[[str, Any], None]) -> None:
    from phi3_lora_plugin.export import targets

    for found in iter_modules(targets.__path__, f"{targets.__name__}."):
        target = import_module(found.name)
        register(getattr(target, "NAME", found.name.rpartition(".")[2]), target.export)


@hookimpl
def trainer_callbacks(recipe: Recipe) -> list[TrainerCallback]:
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint  # derives from TrainerCallback: importing is heavy

    return [LoraCheckpoint.from_recipe(recipe)]
