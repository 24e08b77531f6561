"""Files of tensors, read without running code that lies in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import first_line

if TYPE_CHECKING:
    from torch import Tensor


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
        except (SafetensorError, OSError) as error:
            raise wrong(f"{file} is cut off or damaged: {error}") from error
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's own errors, whatever is in the file
        why = f"damaged, or needs code from it to be run, which is never done: {first_line(error)}"
        raise wrong(f"{file} is {why}") from error


def named_tensors(loaded: Any, file: Path, wrong: type[Phi3LoraError]) -> Mapping[str, Tensor]:
    """What `read_weights` gave, if it is a mapping of names to tensors, and nothing else; raises `wrong`."""
    import torch

    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise wrong(f"{file}: expected a mapping of names to tensors, as PEFT and lora.lora_state_dict give it")
    return {name: value.to_dense() if value.layout != torch.strided else value for name, value in loaded.items()}


def shapes_of(file: Path, wrong: type[Phi3LoraError]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a .safetensors file, from its header alone; raises `wrong` for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise wrong(f"{file} is cut off or damaged: {error}") from error
