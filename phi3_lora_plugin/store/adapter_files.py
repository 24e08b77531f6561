"""The files of an adapter, as PEFT and loralib write them: equal adapters give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.keys import PREFIX
from phi3_lora_plugin.lora_files.loralib_files import to_loralib
from phi3_lora_plugin.lora_files.peft_files import CONFIG, WEIGHTS, PeftAdapter, parts
from phi3_lora_plugin.store.disk_writes import Content
from phi3_lora_plugin.store.tensor_file import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

    from phi3_lora_plugin.lora.snapshot import Snapshot

LORALIB, SIDECAR = "lora.safetensors", "lora.safetensors.json"
FORMATS = ("peft", "loralib", "both")


def adapter_files(snapshot: Snapshot, format: str = "peft") -> dict[str, Content]:
    """The files of an adapter: equal snapshots give equal bytes.

    Args:
        format: "peft", "loralib" (one file of `lora_` keys and a sidecar of what they do not store) or "both". A model
            of loralib's layers has no PEFT form and is always written as loralib's.

    Raises:
        LoralibError, PeftFilesError: loralib does not support it (DoRA, experts).
    """
    if format not in FORMATS:
        raise Phi3LoraError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    files: dict[str, Content] = {}
    if snapshot.config is None:
        return {LORALIB: TensorFile(snapshot.tensors), SIDECAR: _json(snapshot.sidecar or {})}
    if format in ("peft", "both"):
        files |= peft_files(snapshot.tensors, snapshot.config)
    if format in ("loralib", "both"):
        plain = {key.removeprefix(PREFIX): tensor for key, tensor in snapshot.tensors.items()}
        loras = parts(PeftAdapter(snapshot.config, plain)).loras
        dropout, base = snapshot.config.get("lora_dropout") or 0.0, snapshot.config.get("base_model_name_or_path")
        tensors, sidecar, _ = to_loralib(loras, (), dropout, base)
        files |= {LORALIB: TensorFile(tensors), SIDECAR: _json(sidecar)}
    return files


def peft_files(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Content]:
    """The two files of a PEFT adapter."""
    return {WEIGHTS: TensorFile(tensors), CONFIG: _json(config)}


def reload_files(snapshot: Snapshot, format: str) -> dict[str, Content]:
    """What Trainer needs in addition to `adapter_files` to load this state into the model that it came from."""
    if snapshot.memory is not None:
        return {"model.safetensors": TensorFile(snapshot.memory)}
    if snapshot.raw is not None:
        return peft_files(*snapshot.raw)
    if format == "loralib" and snapshot.config is not None:
        return peft_files(snapshot.tensors, snapshot.config)
    return {}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
