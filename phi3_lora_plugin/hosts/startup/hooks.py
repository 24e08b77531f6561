"""What is done for which library, as it is imported, where `PHI3_LORA_ACTIVATE=1`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.hosts import first_rank
from phi3_lora_plugin.hosts.on_import import Undo, when_imported
from phi3_lora_plugin.hosts.switch import VARIABLE, SwitchError, switched
from phi3_lora_plugin.seams import look_up

AXOLOTL = "phi3_lora_plugin.hosts.axolotl.Phi3LoraPlugin"


def start() -> None:
    """Wait for the libraries; nothing of them, and nothing heavy, is imported here. A wrong value ends the process."""
    try:
        on = switched()
    except SwitchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # an exception here is a fatal error with a traceback
    if on:
        for module, then in HOOKS.items():
            when_imported(module, _guarded(then))


def _guarded(then: Callable[[Any], None]) -> Callable[[Any], Undo]:
    """What cannot be activated is reported, and the host's import is left alone."""

    def look(module: Any) -> Undo:
        try:
            then(module)
        except Phi3LoraError as error:
            say(f"not active in {module.__name__.partition('.')[0]}: {error}")
        return lambda: None

    return look


def _parts(*parts: str) -> Callable[[Any], None]:
    def then(module: Any) -> None:
        from phi3_lora_plugin.hosts.activate import activate

        for sentence in activate(parts=parts, optional=parts, say=say):
            say(sentence)

    return then


def _axolotl(module: Any) -> None:
    """Before 0.21 axolotl asks nobody for plugins, so every config names ours; for other bases it does nothing."""
    if hasattr(import_module("axolotl.integrations.base"), "get_builtin_plugins"):
        return
    stock = look_up("axolotl.prepare")

    @wraps(stock)
    def prepare_plugins(cfg: Any) -> Any:
        named = list(cfg.get("plugins") or ())
        cfg["plugins"] = named if AXOLOTL in named else [*named, AXOLOTL]
        return stock(cfg)

    module.prepare_plugins = prepare_plugins
    say(f"axolotl: plugins: [{AXOLOTL}]")


def _llamafactory(module: Any) -> None:
    from phi3_lora_plugin.hosts.llamafactory import wrapped

    module.run_exp = wrapped(look_up("llamafactory.run"))


def _llamafactory_v1(module: Any) -> None:
    from phi3_lora_plugin.hosts.llamafactory_v1 import take_over

    take_over(look_up("llamafactory.v1_renderer"))


def _swift(module: Any) -> None:
    from phi3_lora_plugin.hosts.swift.register import register

    register()
    say("ms-swift renders and masks rows of Phi-3 chats as published")


def _olive(module: Any) -> None:
    from phi3_lora_plugin.hosts.activate import TARGETS

    look_up("olive.targets").update(TARGETS)
    say(f"Olive's LoRA pass goes to {', '.join(TARGETS['phi3'])} of a phi3 model")


#: A module of a library: what is done once it is imported.
HOOKS: dict[str, Callable[[Any], None]] = {
    "peft.utils.constants": _parts("targets"),
    "transformers.trainer": _parts("report_to", "trainers"),
    "trl": _parts("trl"),
    "axolotl.cli.config": _axolotl,
    "llamafactory.train.tuner": _llamafactory,
    "llamafactory.v1.core.utils.rendering": _llamafactory_v1,
    "swift.template": _swift,
    "olive.common.hf.mappings": _olive,
}


def say(sentence: str) -> None:
    """As `first_rank.say`; before the first sentence, why and how to switch it off."""
    _introduce()
    first_rank.say(sentence)


@cache
def _introduce() -> None:
    first_rank.say(f"active, because {VARIABLE}=1; {VARIABLE}=0 switches it off")
