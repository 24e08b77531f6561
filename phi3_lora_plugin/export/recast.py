"""A model folder with its weights in another floating-point type."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_lora_plugin.model.folder import read_json
from phi3_lora_plugin.model.shards import ShardWriter, Weights, write_json

if TYPE_CHECKING:
    from torch import Tensor


def recast(
    source: Path, folder: Path, dtype: str, change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> None:
    """Copy a model folder into `folder`, which is empty, with weights of `dtype` (float32, bfloat16, float16).

    Args:
        change: what each weight becomes before that, by its name.
    """
    import torch

    copy_settings(source, folder)
    weights, writer = Weights(source), ShardWriter(folder, "2GB")
    for name in weights:
        tensor = change(name, weights.read(name))
        writer.add(name, tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)
    writer.close()
    config = read_json(source / "config.json")
    write_json(folder / "config.json", config | {"dtype" if "dtype" in config else "torch_dtype": dtype})


def copy_settings(source: Path, folder: Path) -> None:
    """Copy the files of a model folder other than its weights."""
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, folder / file.name)
