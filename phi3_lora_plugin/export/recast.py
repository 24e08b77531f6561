"""A model folder with its weights in another floating-point type."""

from __future__ import annotations

import shutil
from pathlib import Path


def recast(source: Path, folder: Path, dtype: str) -> None:
    """Copy a model folder into `folder`, which is empty, with weights of `dtype` (float32, bfloat16, float16)."""
    import torch

    from phi3_lora_plugin.model.folder import read_json
    from phi3_lora_plugin.model.shards import ShardWriter, Weights, write_json

    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, folder / file.name)
    weights, writer = Weights(source), ShardWriter(folder, "2GB")
    for name in weights:
        tensor = weights.read(name)
        writer.add(name, tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)
    writer.close()
    config = read_json(source / "config.json")
    write_json(folder / "config.json", config | {"dtype" if "dtype" in config else "torch_dtype": dtype})


def shipped_dtype(base: Path) -> str:
    """The floating-point type of a model folder's weights."""
    from phi3_lora_plugin.model.shards import Weights

    weights = Weights(base)
    return {"F16": "float16", "BF16": "bfloat16"}.get(weights.dtype(next(iter(weights))), "float32")
