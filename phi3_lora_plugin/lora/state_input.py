"""Which part of a given state can be loaded into a model, and which part is the base's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.gather import gather
from phi3_lora_plugin.lora_files.keys import bare

if TYPE_CHECKING:
    from torch import Tensor, nn


def no_numbers(value: Any) -> str | None:
    """What a value is that cannot be a parameter's, in a word or two; None for floating-point tensors with values."""
    import torch

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_meta:
        return "meta device"
    return None if value.is_floating_point() else str(value.dtype).removeprefix("torch.")


def copies_of_the_base(
    model: nn.Module, inner: nn.Module, state: Mapping[str, Tensor], unexpected: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(keys that are still unexpected, keys of base weights that differ from the model's).

    PEFT writes the base's own weight next to an adapted embedding or head; that is fine where the model has the same.
    """
    import torch

    names = {bare(name): name for name, _ in inner.named_parameters()}
    copies = {
        key: names[plain]
        for key in unexpected
        if (plain := bare(key)) in names and plain.endswith(".base_layer.weight")
    }
    if not copies:
        return list(unexpected), []
    own = gather(model, inner, sorted(set(copies.values())))
    same = {
        key: no_numbers(state[key]) is None
        and own[name].shape == state[key].shape
        and torch.equal(own[name].to(state[key]), state[key])
        for key, name in copies.items()
    }
    return [key for key in unexpected if key not in copies], [key for key, equal in same.items() if not equal]
