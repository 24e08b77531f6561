"""Which adapter a path means, and the files next to its weights: settings, manifest, the recipe of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.peft_files import CONFIG, read_config
from phi3_lora_plugin.recipe import Recipe, load_recipe
from phi3_lora_plugin.store.manifest import MANIFEST, check_folder, read_manifest
from phi3_lora_plugin.wording import listed


class AdapterError(Phi3LoraError):
    """A folder that was meant to be a LoRA adapter is not one that can be used."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, its weights unread.

    Attributes:
        folder: with adapter_config.json in it.
        config: adapter_config.json.
        manifest: of the checkpoint; {} of an adapter that something else saved.
        recipe_file: recipe.yaml of the run that saved it, or None.
    """

    folder: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    recipe_file: Path | None

    @property
    def base(self) -> tuple[str, str | None]:
        """(path or hub id, revision) of the model that it was trained on."""
        name = self.config.get("base_model_name_or_path")
        if not name:
            raise AdapterError(f"{self.folder / CONFIG} records no base model; pass one with --base")
        return str(name), self.config.get("revision")

    @cached_property
    def quantize(self) -> str:
        """How the base was quantised in training: none, nf4 or int8. Raises RecipeError."""
        recipe = self.recipe() if "quantize" not in self.manifest else None
        return str(self.manifest.get("quantize", recipe.model.quantize if recipe else "none"))

    @property
    def chat(self) -> dict[str, Any]:
        """How chats were rendered in training, as a recipe's `data` section. Raises RecipeError."""
        recipe = self.recipe() if "chat" not in self.manifest else None
        if recipe is None:
            return dict(self.manifest.get("chat", {}))
        return {"system": recipe.data.system, "template": recipe.data.template}

    def recipe(self, overrides: Sequence[str] = (), find: Callable[[str], Any] | None = None) -> Recipe | None:
        """The recipe of its run, if it was saved there; see `load_recipe`."""
        return load_recipe(self.recipe_file, overrides, find) if self.recipe_file else None


def read_adapter(path: str | Path, check: bool = True) -> Adapter:
    """The adapter that `path` means and the files next to it; without its weights, and before any model is loaded.

    Args:
        check: that every file is the one that the manifest lists.

    Raises:
        AdapterError: see `adapter_folder`; or its files are not those that its manifest lists.
        PeftFilesError: adapter_config.json is damaged.
    """
    folder = adapter_folder(path)
    if check and (problems := damage(folder)):
        raise AdapterError(
            f"{folder} is damaged:\n"
            + "".join(f"  {problem}\n" for problem in problems)
            + f"Use another checkpoint, or delete {MANIFEST} to use it unchecked"
        )
    runs = [place / "recipe.yaml" for place in folder.resolve().parents[:2] if (place / "recipe.yaml").is_file()]
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    return Adapter(folder, read_config(folder), manifest, runs[0] if runs else None)


def damage(folder: Path) -> tuple[str, ...]:
    """What differs from the manifest of an adapter folder, a sentence each; nothing without a manifest."""
    return check_folder(folder, resume=False).problems if (folder / MANIFEST).exists() else ()


def adapter_folder(path: str | Path) -> Path:
    """The adapter that `path` means: itself, or the newest complete checkpoint of the run or store it names.

    Raises:
        AdapterError: nothing under `path` is an adapter; the message lists what is there.
    """
    from phi3_lora_plugin.store.checkpoint import latest_complete

    folder = Path(path)
    for place in (folder, folder / "adapter"):
        if (place / CONFIG).is_file():
            return place
    found = latest_complete(folder) if folder.is_dir() else None
    if found is None:
        inside = listed(sorted(entry.name for entry in folder.iterdir()), 8) if folder.is_dir() else "no such folder"
        raise AdapterError(
            f"{folder} has no LoRA adapter ({CONFIG}) and no complete checkpoint; found: {inside or 'nothing'}"
        )
    return found
