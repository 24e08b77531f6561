"""A YAML recipe, read and checked in full.

In: a preset's name or a path, and overrides. Out: a frozen `Recipe`, or every problem at once with file and line.
Never: looks for plugins, opens a model, or imports torch.
"""

from phi3_lora_plugin.recipe.recipe import Recipe, RecipeError, load_recipe

__all__ = ["Recipe", "RecipeError", "load_recipe"]
