"""The settings of an adapter as its files name them: adapter_config.json, and what loralib's file leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.gather import unwrapped
from phi3_lora_plugin.lora_files.keys import without_wrappers
from phi3_lora_plugin.lora_files.loralib_files import sidecar

if TYPE_CHECKING:
    from torch import nn


#: Written whatever their values, because readers of all ages look for them; of the rest only what is not the default.
_ALWAYS = (
    "base_model_name_or_path", "bias", "inference_mode", "lora_alpha", "lora_dropout", "peft_type", "r", "revision",
    "target_modules", "task_type",
)  # fmt: skip


def minimal_config(config: Any, model: Any) -> dict[str, Any]:
    """adapter_config.json with what differs from PEFT's defaults, so that older versions read it; base filled in."""
    settings = {key: _plain(value) for key, value in config.to_dict().items() if key != "peft_version"}
    if settings.get("peft_type") == "LORA":
        kind: Any = type(config)
        defaults = _defaults(kind)
        settings = {k: v for k, v in settings.items() if k in _ALWAYS or k not in defaults or v != defaults[k]}
    settings["inference_mode"] = True
    base, revision = base_of(model)
    settings["base_model_name_or_path"] = settings.get("base_model_name_or_path") or base
    settings["revision"] = settings.get("revision") or revision
    if settings.get("task_type") is None:
        kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
        settings["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return settings


@cache
def _defaults(kind: Any) -> Mapping[str, Any]:
    """The settings that a PEFT config has by itself."""
    return {key: _plain(value) for key, value in kind().to_dict().items()}


def base_of(model: Any) -> tuple[str | None, str | None]:
    """(path or hub id, commit) of the model that LoRA was put on, as far as it knows."""
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    name = getattr(inner, "name_or_path", None) or getattr(config, "name_or_path", None)
    return (str(name) if name else None), getattr(config, "_commit_hash", None)


def loralib_sidecar(model: nn.Module) -> dict[str, Any]:
    """What loralib's file does not store: kind, rank, alpha and enabled groups of each layer."""
    modules: dict[str, dict[str, Any]] = {}
    for path, layer in model.named_modules():
        if "lora_A" not in dict(layer.named_parameters(recurse=False)) or not hasattr(layer, "lora_alpha"):
            continue
        kind = {"MergedLinear": "merged_linear"}.get(type(layer).__name__, type(layer).__name__.lower())
        modules[without_wrappers(path)] = {"kind": kind, "r": layer.r, "alpha": layer.lora_alpha}
        if hasattr(layer, "enable_lora"):
            modules[without_wrappers(path)]["enable_lora"] = list(layer.enable_lora)
    dropouts = {getattr(m.lora_dropout, "p", 0.0) for m in model.modules() if hasattr(m, "lora_dropout")}
    return sidecar(modules, base_of(model)[0], max(dropouts, default=0.0))


def _plain(value: Any) -> Any:
    """A config value as JSON has it: sets sorted, enumerations by value."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return getattr(value, "value", value)
