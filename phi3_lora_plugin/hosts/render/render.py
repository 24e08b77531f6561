"""A recipe as another host's own config, commented where we had to choose."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.hosts.render import __path__
from phi3_lora_plugin.hosts.render.common import Rendered, RenderError, Rendering
from phi3_lora_plugin.model.families import has_towers
from phi3_lora_plugin.model.published import why_refused
from phi3_lora_plugin.recipe.sections import Section
from phi3_lora_plugin.recipe.yaml_file import dump_line

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

#: What the modules next to this one share; each of the others renders for the host that it is named after.
_SHARED = ("common", "render", "settings_section")
HOSTS = tuple(sorted({found.name for found in iter_modules(__path__)} - {*_SHARED}))


def render(recipe: Recipe, host: str) -> Rendered:
    """The config that makes `host` train the recipe, as closely as it can; what it cannot is a comment in it.

    Raises:
        RenderError: an unknown host, or a recipe that the host does not support.
    """
    if host not in HOSTS:
        raise RenderError(f"--host: {host!r} is not one of {', '.join(HOSTS)}")
    if recipe.reward:
        raise RenderError(f"{recipe.name} trains by rewards, which is not rendered; it runs by `phi3-lora train`")
    if recipe.preference.on and (
        host != "trl" or recipe.preference.rows == "pairs" and not recipe.preference.has_reference
    ):
        raise RenderError(
            f"{recipe.name} trains on preferences, which is not rendered for {host} with preference.loss: "
            f"{recipe.preference.loss}; it runs by `phi3-lora train`"
        )
    if why := why_refused(recipe.model.path, recipe.model.revision):
        raise RenderError(f"{recipe.model.path}: {why}")
    if has_towers(Rendering(recipe, host).base_config or {}):
        raise RenderError(
            f"{recipe.model.path}: {host} would give LoRA to the audio tower as well, whose modules have the names of "
            "the text model's; its text side is trained by `phi3-lora train`"
        )
    made: Rendered = import_module(f"phi3_lora_plugin.hosts.render.{host}").render(recipe)
    return Rendered(f"{made.text}# recipe: {settings(recipe)}\n", made.beside)


def settings(recipe: Recipe) -> str:
    """What the recipe sets, in one line of YAML, of which `phi3-lora import` makes the same recipe again."""
    found: dict[str, Any] = {"name": recipe.name}
    for name, info in type(recipe).model_fields.items():
        value = getattr(recipe, name)
        if name == "about" or value == info.default:
            continue
        if isinstance(value, Section):
            fields = type(value).model_fields
            value = {key: inner for key in fields if (inner := getattr(value, key)) != fields[key].default}
        found[name] = value
    return dump_line(found)
