"""Which adapter a path means, and what lies next to its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError


class AdapterError(Phi3LoraError):
    """A folder that was meant to be a LoRA adapter is not one that can be used."""


def adapter_folder(path: str | Path) -> Path:
    """The adapter that `path` means: itself, or the newest complete checkpoint of the run or store it names.

    Raises:
        AdapterError: nothing under `path` is an adapter; says what is there.
    """
    from phi3_lora_plugin.store.checkpoint import latest_complete

    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "adapter" / "adapter_config.json").is_file():
        return folder / "adapter"
    found = latest_complete(folder) if folder.is_dir() else None
    if found is None:
        inside = (
            ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        )
        raise AdapterError(
            f"{folder} holds no LoRA adapter (adapter_config.json) and no complete checkpoint; "
            f"found: {inside or 'nothing'}"
        )
    return found


def base_of(adapter: Path) -> tuple[str, str | None]:
    """(path or hub id, revision) of the model that an adapter folder says it was trained on."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise AdapterError(f"{adapter / 'adapter_config.json'} cannot be read: {error}") from error
    base = config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{adapter / 'adapter_config.json'} names no base model; give one with --base")
    return base, config.get("revision")


def encoding_of(adapter: Path) -> dict[str, Any]:
    """How the adapter's data was rendered, from its manifest; what people type is never allowed to open a turn."""
    manifest = adapter / "manifest.json"
    chat = json.loads(manifest.read_text(encoding="utf-8")).get("chat", {}) if manifest.is_file() else {}
    return {"system": chat.get("system", "error"), "template": chat.get("template"), "control_tokens": "escape"}
