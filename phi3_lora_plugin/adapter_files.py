"""The files of an adapter, as PEFT and loralib write them: equal adapters give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.disk_writes import Content
from phi3_lora_plugin.lora.gather import unwrapped
from phi3_lora_plugin.lora.peft_files import CONFIG, WEIGHTS, PeftAdapter, parts
from phi3_lora_plugin.lora.state_keys import without_wrappers
from phi3_lora_plugin.tensor_file import TensorFile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from phi3_lora_plugin.adapter_snapshot import Snapshot

LORALIB, SIDECAR = "lora.safetensors", "lora.safetensors.json"
FORMATS = ("peft", "loralib", "both")
#: Written whatever their values, because readers of all ages look for them; of the rest only what is not the default.
_ALWAYS = (
    "base_model_name_or_path", "bias", "inference_mode", "lora_alpha", "lora_dropout", "peft_type", "r", "revision",
    "target_modules", "task_type",
)  # fmt: skip
_NEVER = ("peft_version",)


def adapter_files(snapshot: Snapshot, format: str = "peft", layout: Sequence[Any] = ()) -> dict[str, Content]:
    """The files of an adapter: equal snapshots give equal bytes.

    Args:
        format: "peft", "loralib" (one file of `lora_` keys and a sidecar of what they do not say) or "both". A model of
            loralib's layers has no PEFT form and is always written as loralib's.
        layout: `families.projections` of the base, by which slices become loralib's MergedLinear.

    Raises:
        LoralibError, PeftFilesError: loralib has no such thing (DoRA, experts).
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    files: dict[str, Content] = {}
    if snapshot.config is None:
        return {LORALIB: TensorFile(snapshot.tensors), SIDECAR: _json(snapshot.sidecar or {})}
    if format in ("peft", "both"):
        files |= peft_files(snapshot.tensors, snapshot.config)
    if format in ("loralib", "both"):
        from phi3_lora_plugin.lora.loralib_files import to_loralib

        plain = {key.removeprefix("base_model.model."): tensor for key, tensor in snapshot.tensors.items()}
        loras = parts(PeftAdapter(snapshot.config, plain)).loras
        dropout, base = snapshot.config.get("lora_dropout") or 0.0, snapshot.config.get("base_model_name_or_path")
        tensors, sidecar, _ = to_loralib(loras, layout, dropout, base)
        files |= {LORALIB: TensorFile(tensors), SIDECAR: _json(sidecar)}
    return files


def peft_files(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Content]:
    """The two files of a PEFT adapter."""
    return {WEIGHTS: TensorFile(tensors), CONFIG: _json(config)}


def reload_files(snapshot: Snapshot, format: str) -> dict[str, Content]:
    """What Trainer needs beside `adapter_files` to load this state into the model that it came from."""
    if snapshot.memory is not None:
        return {"model.safetensors": TensorFile(snapshot.memory)}
    if snapshot.raw is not None:
        return peft_files(*snapshot.raw)
    if format == "loralib" and snapshot.config is not None:
        return peft_files(snapshot.tensors, snapshot.config)
    return {}


def minimal_config(config: Any, model: Any) -> dict[str, Any]:
    """adapter_config.json with what differs from PEFT's defaults, so that older versions read it; base filled in."""
    settings = {key: _plain(value) for key, value in config.to_dict().items() if key not in _NEVER}
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
    name = getattr(inner, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return (str(name) if name else None), getattr(config, "_commit_hash", None)


def loralib_sidecar(model: nn.Module) -> dict[str, Any]:
    """What loralib's file does not say: kind, rank, alpha and enabled groups of each layer."""
    modules: dict[str, dict[str, Any]] = {}
    for path, layer in model.named_modules():
        if "lora_A" not in layer._parameters or not hasattr(layer, "lora_alpha"):
            continue
        kind = {"MergedLinear": "merged_linear"}.get(type(layer).__name__, type(layer).__name__.lower())
        modules[without_wrappers(path)] = {"kind": kind, "r": layer.r, "alpha": layer.lora_alpha}
        if hasattr(layer, "enable_lora"):
            modules[without_wrappers(path)]["enable_lora"] = list(layer.enable_lora)
    dropouts = {getattr(m.lora_dropout, "p", 0.0) for m in model.modules() if hasattr(m, "lora_dropout")}
    sidecar: dict[str, Any] = {"format": "loralib", "base": base_of(model)[0], "modules": modules}
    sidecar["dropout"] = max(dropouts, default=0.0)
    for name in ("r", "alpha"):
        values = {each[name] for each in modules.values()}
        if len(values) == 1:
            sidecar[name] = values.pop()
    return sidecar


def _plain(value: Any) -> Any:
    """A config value as JSON has it: sets sorted, enumerations by value."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return getattr(value, "value", value)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
