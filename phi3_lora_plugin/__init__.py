"""LoRA for the Phi-3 family inside any Hugging Face Trainer host.

The public names resolve on first use (PEP 562), so that importing the package costs milliseconds and no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_lora_plugin.activate import activate as activate
    from phi3_lora_plugin.activate import deactivate as deactivate
    from phi3_lora_plugin.attach import attach as attach
    from phi3_lora_plugin.callbacks import LoraCheckpoint as LoraCheckpoint
    from phi3_lora_plugin.chat.encode import encode as encode
    from phi3_lora_plugin.checkpoint import latest_complete as latest_complete
    from phi3_lora_plugin.checkpoint import verify as verify
    from phi3_lora_plugin.discovery import Plugins as Plugins
    from phi3_lora_plugin.discovery import load_plugins as load_plugins
    from phi3_lora_plugin.hookspecs import hookimpl as hookimpl
    from phi3_lora_plugin.lora.inject import add_lora as add_lora
    from phi3_lora_plugin.lora.state import load_lora_state_dict as load_lora_state_dict
    from phi3_lora_plugin.lora.state import lora_state_dict as lora_state_dict
    from phi3_lora_plugin.lora.state import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from phi3_lora_plugin.model import load_model as load_model
    from phi3_lora_plugin.recipe import Recipe as Recipe
    from phi3_lora_plugin.recipe import RecipeError as RecipeError
    from phi3_lora_plugin.recipe import load_recipe as load_recipe
    from phi3_lora_plugin.resume import resumable as resumable
    from phi3_lora_plugin.speed.apply import accelerate_phi3 as accelerate_phi3
    from phi3_lora_plugin.tokenizer import load_tokenizer as load_tokenizer
    from phi3_lora_plugin.train import train as train

_HOME = {
    "LoraCheckpoint": "callbacks",
    "Plugins": "discovery",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "activate": "activate",
    "accelerate_phi3": "speed.apply",
    "add_lora": "lora.inject",
    "attach": "attach",
    "deactivate": "activate",
    "encode": "chat.encode",
    "hookimpl": "hookspecs",
    "latest_complete": "checkpoint",
    "load_lora_state_dict": "lora.state",
    "load_model": "model",
    "load_plugins": "discovery",
    "load_recipe": "recipe",
    "load_tokenizer": "tokenizer",
    "lora_state_dict": "lora.state",
    "mark_only_lora_as_trainable": "lora.state",
    "resumable": "resume",
    "train": "train",
    "verify": "checkpoint",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps `phi3_lora_plugin.train` the function: importing a submodule would put the module of that name there."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _HOME and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
