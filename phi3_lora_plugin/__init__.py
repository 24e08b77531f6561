"""LoRA for the Phi-3 family inside any Hugging Face Trainer host.

The public names resolve on first use (PEP 562), so that importing the package costs milliseconds and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_lora_plugin.chat.encode import encode as encode
    from phi3_lora_plugin.error import Phi3LoraError as Phi3LoraError
    from phi3_lora_plugin.hookspecs import hookimpl as hookimpl
    from phi3_lora_plugin.hosts.activate import activate as activate
    from phi3_lora_plugin.hosts.activate import deactivate as deactivate
    from phi3_lora_plugin.hosts.notebook import load_ipython_extension as load_ipython_extension
    from phi3_lora_plugin.hosts.notebook import unload_ipython_extension as unload_ipython_extension
    from phi3_lora_plugin.lora.inject import add_lora as add_lora
    from phi3_lora_plugin.lora.state import load_lora_state_dict as load_lora_state_dict
    from phi3_lora_plugin.lora.state import lora_state_dict as lora_state_dict
    from phi3_lora_plugin.lora.state import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from phi3_lora_plugin.model.load import load_model as load_model
    from phi3_lora_plugin.model.tokenizer import load_tokenizer as load_tokenizer
    from phi3_lora_plugin.pipeline import train as train
    from phi3_lora_plugin.plugins.discovery import load_plugins as load_plugins
    from phi3_lora_plugin.plugins.registry import Plugins as Plugins
    from phi3_lora_plugin.recipe import Recipe as Recipe
    from phi3_lora_plugin.recipe import RecipeError as RecipeError
    from phi3_lora_plugin.recipe import load_recipe as load_recipe
    from phi3_lora_plugin.speed.apply import accelerate_phi3 as accelerate_phi3
    from phi3_lora_plugin.store.checkpoint import latest_complete as latest_complete
    from phi3_lora_plugin.store.checkpoint import verify as verify
    from phi3_lora_plugin.training.attach import attach as attach
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint as LoraCheckpoint
    from phi3_lora_plugin.training.resume import resumable as resumable

_HOME = {
    "LoraCheckpoint": "training.callbacks",
    "Phi3LoraError": "error",
    "Plugins": "plugins.registry",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "activate": "hosts.activate",
    "accelerate_phi3": "speed.apply",
    "add_lora": "lora.inject",
    "attach": "training.attach",
    "deactivate": "hosts.activate",
    "encode": "chat.encode",
    "hookimpl": "hookspecs",
    "latest_complete": "store.checkpoint",
    "load_ipython_extension": "hosts.notebook",
    "load_lora_state_dict": "lora.state",
    "load_model": "model.load",
    "load_plugins": "plugins.discovery",
    "load_recipe": "recipe",
    "load_tokenizer": "model.tokenizer",
    "lora_state_dict": "lora.state",
    "mark_only_lora_as_trainable": "lora.state",
    "resumable": "training.resume",
    "train": "pipeline",
    "unload_ipython_extension": "hosts.notebook",
    "verify": "store.checkpoint",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
