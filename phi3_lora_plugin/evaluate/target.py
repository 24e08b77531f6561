"""What `phi3-lora eval` is to look at: a recipe, an adapter or a model folder -> the recipe of one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.model.fingerprint import base_fingerprint, local_folder
from phi3_lora_plugin.recipe import Recipe, load_recipe
from phi3_lora_plugin.recipe.yaml_file import dump
from phi3_lora_plugin.store.adapter_folder import Adapter, AdapterError, read_adapter
from phi3_lora_plugin.store.checkpoint import latest_complete
from phi3_lora_plugin.store.layout import numbered

Find = Callable[[str], Any]


@dataclass(frozen=True)
class Target:
    """A recipe that says base and data, the adapter that goes onto the base (None: none), and what to tell about it."""

    recipe: Recipe
    adapter: Path | None
    notes: tuple[str, ...] = ()


def find_target(what: str, overrides: Sequence[str], find: Find, base: str | None = None) -> Target:
    """Find out what `what` means.

    A folder with an adapter, a checkpoint or a run is that adapter, with the recipe of its run if that is there, else
    with what its manifest says of base, quantisation and chats. A folder with a model alone is that model. Anything
    else is a recipe, with the newest complete adapter that was trained by it, if there is one.

    Args:
        overrides: as of `load_recipe`.
        find: gives the file of a preset.
        base: a base model instead of the one that the adapter or the recipe names.

    Raises:
        AdapterError: a folder with neither, an adapter whose base is not to be found, or of another base.
        RecipeError: see there.
    """
    overrides = [*overrides, *([f"model.path={base}"] if base else [])]
    folder = Path(what)
    if not folder.is_dir():
        return _of_recipe(load_recipe(what, overrides, find))
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return Target(_made({"model": {"path": str(folder)}}, folder.name, overrides, find), None)
    adapter = read_adapter(folder)
    recipe = _of_adapter(adapter, overrides, find)
    notes = [f"adapter {adapter.folder}"] if adapter.folder != folder else []
    if adapter.recipe_file is None:
        notes.append("no recipe next to the adapter: rows are read and rendered with default settings")
    return Target(recipe, adapter.folder, (*notes, *_other_base(adapter, recipe)))


def _of_recipe(recipe: Recipe) -> Target:
    """The recipe and its newest adapter; a run without a named folder may be in one with a number at its end."""
    folder = Path(recipe.output_dir)
    runs = [folder]
    if recipe.provenance.get("output_dir", "default") == "default":
        runs += numbered(folder)
    found = [newest for run in runs if run.is_dir() and (newest := latest_complete(run)) is not None]
    if not found:
        note = f"no trained adapter in {folder}: evaluating the base model only; train {recipe.name} first"
        return Target(recipe, None, (note,))
    adapter = read_adapter(max(found, key=lambda path: path.stat().st_mtime))
    trained = adapter.base[0]
    if trained not in (recipe.model.path, locate(recipe.model.path)):
        raise AdapterError(
            f"{adapter.folder} was trained on {trained}, not on {recipe.model.path}, which the recipe names; "
            f"evaluate the adapter by its folder, or name the run with output_dir=FOLDER"
        )
    return Target(recipe, adapter.folder, (f"adapter {adapter.folder}", *_other_base(adapter, recipe)))


def _of_adapter(adapter: Adapter, overrides: Sequence[str], find: Find) -> Recipe:
    """The recipe of the run that an adapter is from, else one made of what is known."""
    path, revision = adapter.base
    recipe = adapter.recipe(overrides, find)
    if recipe is None:
        model = {"path": path, "revision": revision, "quantize": adapter.quantize}
        recipe = _made({"model": model, "data": adapter.chat}, adapter.folder.name, overrides, find)
    if recipe.provenance.get("model.path") == "override":
        return recipe
    # The adapter knows its base best, unless that has moved: then its recipe may name it another way (`embedded:`).
    if Path(path).is_absolute() and not Path(path).is_dir():
        if not Path(locate(recipe.model.path)).is_dir():
            raise AdapterError(
                f"{adapter.folder} was trained on {path}, which no longer exists; pass its base with --base"
            )
    elif path != locate(recipe.model.path):
        changed = recipe.model.model_copy(update={"path": path, "revision": revision})
        recipe = recipe.model_copy(update={"model": changed})
    return recipe


def _made(content: dict[str, Any], name: str, overrides: Sequence[str], find: Find) -> Recipe:
    """A recipe out of what is known, with overrides over it as over any other."""
    with TemporaryDirectory() as folder:
        file = Path(folder, f"{name or 'adapter'}.yaml")
        file.write_text(dump(content), encoding="utf-8")
        return load_recipe(file, overrides, find)


def _other_base(adapter: Adapter, recipe: Recipe) -> list[str]:
    """A sentence if the weights of the base here are not those that the manifest names."""
    trained_on = (adapter.manifest.get("base") or {}).get("fingerprint")
    folder = local_folder(recipe.model.path, recipe.model.revision) if trained_on else None
    if folder is None or base_fingerprint(folder) == trained_on:
        return []
    return [
        f"the weights of {recipe.model.path} are not those that {adapter.folder} was trained on (another fingerprint): "
        "its scores mean little"
    ]
