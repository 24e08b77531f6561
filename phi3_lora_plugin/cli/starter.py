"""The text of a new recipe: the values that people change first, each with what it does, over a preset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.recipe.yaml_file import dump_line

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

_EXPLAINED = {
    "lora.r": "rank: more learns more and takes more memory",
    "lora.alpha": "the update is scaled by alpha / r; change both together",
    "lora.targets": "all-linear, or names such as [q_proj, v_proj]",
    "training.learning_rate": "halve it if the loss jumps",
    "training.num_train_epochs": "passes over the data; watch the evaluation loss",
    "training.per_device_train_batch_size": "rows at a time: less takes less memory",
    "training.gradient_accumulation_steps": "times rows = rows of one step",
}


def starter(preset: Recipe, file: Path, data: str, changes: Mapping[str, Any]) -> str:
    """A recipe that extends `preset`.

    Args:
        preset: whose values are written down, so that they can be changed in place.
        file: where the recipe goes; it and the run are named after it.
        data: `data.path`.
        changes: dotted keys and values that differ from the preset.
    """
    values = preset.resolved()
    lines = [
        f"# {data} on {changes.get('model.path', preset.model.path)}.",
        f"#   phi3-lora data check {file}    what is trained, token by token, before a model is loaded",
        f"#   phi3-lora plan {file}          memory and steps",
        f"#   phi3-lora train {file}",
        f"# What is not here comes from the preset: phi3-lora show {file} --resolved",
        f"extends: {preset.name}",
    ]
    written: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        written.setdefault(section, {})[name] = value
    written["data"] = {"path": data} | written.get("data", {})
    for key in _EXPLAINED:
        section, _, name = key.partition(".")
        if name in values[section] and name not in written.setdefault(section, {}):
            written[section][name] = values[section][name]
    for section in sorted(written, key=list(values).index):
        lines += ["", f"{section}:"]
        for name, value in written[section].items():
            text = f"  {name}: {dump_line(value)}"
            note = _EXPLAINED.get(f"{section}.{name}") or _DATA.get(name if section == "data" else "")
            lines.append(f"{text:<42}  # {note}" if note else text)
    lines += ["", f"output_dir: {dump_line(f'runs/{file.stem}')}", f"seed: {preset.seed}"]
    return "\n".join(lines) + "\n"


_DATA = {
    "path": "file, files, glob, folder or hub id",
    "eval_fraction": "share that is held out and measured; 0 trains on all",
    "columns": "the format's name: the file's name",
    "max_length": "longest row in tokens; longer ones are cut and counted",
}
