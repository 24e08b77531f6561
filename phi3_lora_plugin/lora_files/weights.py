"""Files of tensors, read without running code that lies in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import first_line


def read_weights(file: Path, wrong: type[Phi3LoraError]) -> Any:
    """What is in a .safetensors file, {name: tensor}, or in one of torch.save's, whatever that is.

    Raises:
        Phi3LoraError: of the class `wrong`: the file is damaged, or needs code.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise wrong(f"{file} is cut off or damaged: {error}") from error
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's own errors, whatever is in the file
        why = f"damaged, or needs code from it to be run, which is never done: {first_line(error)}"
        raise wrong(f"{file} is {why}") from error
