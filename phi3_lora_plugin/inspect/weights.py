"""Whether the tensors of an adapter on disk can be what was learned: readable, in pairs, finite."""

from __future__ import annotations

from pathlib import Path

from phi3_lora_plugin.lora.finite import is_finite
from phi3_lora_plugin.lora_files.peft_files import CONFIG, WEIGHTS, PeftFilesError, changes_base, parts, read_peft
from phi3_lora_plugin.store.adapter_files import LORALIB
from phi3_lora_plugin.wording import listed


def weights_problems(folder: Path) -> list[str]:
    """What is wrong with the adapter in a folder, a sentence each; nothing for a folder without weights.

    Looks at PEFT's and loralib's files, whatever program wrote them.
    """
    problems = []
    for name in (WEIGHTS, LORALIB):
        if (folder / name).is_file():
            problems += [f"{name}: {problem}" for problem in _tensor_problems(folder / name)]
    if (folder / CONFIG).is_file() and not problems:
        try:
            adapter = read_peft(folder)
            flat = all(tensor.dim() < 3 for tensor in adapter.tensors.values())  # convolutions have other shapes
            if flat and not adapter.config.get("target_parameters") and not changes_base(adapter.config):
                parts(adapter)
        except PeftFilesError as error:
            problems.append(str(error))
    return problems


def _tensor_problems(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[str]] = {}
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            if not names:
                return ["holds no tensor: the adapter is its base"]
            for name in names:
                tensor = tensors.get_tensor(name)
                if not tensor.numel():
                    found.setdefault("are empty: shards that were not gathered", []).append(name)
                elif not is_finite(tensor):
                    found.setdefault("are not finite (NaN or Inf)", []).append(name)
    except (SafetensorError, OSError) as error:
        return [f"cannot be read: {error}"]
    return [f"{len(names)} tensors {what}: {listed(names)}" for what, names in found.items()]
