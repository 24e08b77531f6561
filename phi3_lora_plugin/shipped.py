"""Folders that are installed inside the package, and lie beside it in a checkout: recipes and docs."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def shipped(folder: str) -> Traversable:
    """The folder of that name: `recipes` or `docs`.

    A checkout that is only on PYTHONPATH, as where nothing can be installed, has it beside the package.
    """
    try:
        return files(f"phi3_lora_plugin.{folder}")
    except ModuleNotFoundError:
        return Path(__file__).parents[1] / folder
