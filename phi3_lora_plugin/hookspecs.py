"""The contract between this package, the plugins that extend it, and the hosts that ask it.

Five hooks and the two markers. pluggy is the only import that runs; the foreign types are for readers and checkers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from importlib.resources.abc import Traversable
    from os import PathLike

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from phi3_lora_plugin.export.exporter import Exporter
    from phi3_lora_plugin.recipe import Recipe

    Loader = Callable[[Recipe], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    Adapter = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
    RecipeFile = str | PathLike[str] | Traversable

NAME = "phi3_lora_plugin"  # One name for markers, manager and entry-point group: pluggy ignores hooks that differ.

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


@hookspec
def register_models(register: Callable[[str, Loader], None]) -> None:
    """Call `register(name, load)` for each loader that a recipe may name in `model.loader`."""


@hookspec
def register_dataset_adapters(register: Callable[[str, Adapter], None]) -> None:
    """Call `register(name, adapt)` for each row format that a recipe may name in `data.format`."""


@hookspec
def register_recipes(register: Callable[[str, RecipeFile], None]) -> None:
    """Call `register(name, path)` for each YAML preset that `phi3-lora train NAME` or `extends: NAME` may name."""


@hookspec
def register_exporters(register: Callable[[str, Exporter], None]) -> None:
    """Call `register(name, export)` for each target that `phi3-lora export --to` may name."""


@hookspec
def trainer_callbacks(recipe: Recipe) -> Iterable[TrainerCallback] | None:
    """Return the callbacks to add to the trainer that is being built for `recipe`, or None for none."""
