"""A recipe's data policy and checkpoints as the section `phi3_lora:` of a host's config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.hosts.render.common import Line
from phi3_lora_plugin.recipe.sections import ChatSection

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The section with what differs from its defaults; empty where nothing does."""
    data = {
        name: value
        for name, field in ChatSection.model_fields.items()
        if (value := getattr(recipe.data, name)) != field.default
    }
    checkpoint = {  # not `every_steps`: ours are written with the host's own, at its `save_steps`
        name: value
        for name, field in type(recipe.checkpoint).model_fields.items()
        if name != "every_steps" and (value := getattr(recipe.checkpoint, name)) != field.default
    }
    return {name: values for name, values in (("data", data), ("checkpoint", checkpoint)) if values}


def section(recipe: Recipe) -> list[Line]:
    """The section as a line, or none."""
    given = settings_of(recipe)
    return [Line("phi3_lora", given)] if given else []
