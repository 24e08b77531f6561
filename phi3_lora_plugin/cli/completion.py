"""What a shell offers after TAB: names of recipes, and keys of a recipe. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path


def complete_recipe(incomplete: str) -> list[str]:
    """Presets, and YAML files of the folder that is being typed."""
    from phi3_lora_plugin.recipe.layers import shipped_names

    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = [str(file) for kind in ("*.yaml", "*.yml") for file in folder.glob(kind)] if folder.is_dir() else []
    return [name for name in (*shipped_names(), *sorted(files)) if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Keys up to their `=`; the trainer's are those of the installed transformers."""
    from phi3_lora_plugin.recipe import Recipe
    from phi3_lora_plugin.recipe.sections import Section
    from phi3_lora_plugin.recipe.training import installed_fields

    keys: list[str] = []
    for name, info in Recipe.model_fields.items():
        inner = info.annotation
        if name == "training":
            keys += [f"training.{field}=" for field in installed_fields()]
        elif isinstance(inner, type) and issubclass(inner, Section):
            keys += [f"{name}.{field}=" for field in inner.model_fields] if name != "about" else []
        else:
            keys.append(f"{name}=")
    return [key for key in keys if key.startswith(incomplete)]
