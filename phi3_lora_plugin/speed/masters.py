"""Adapters in float32 on a base in half precision: steps smaller than half a unit in the last place are not lost.

bfloat16 has 8 bits of mantissa: at a learning rate of 1e-5, a weight of 0.01 does not move in it. PEFT keeps adapters
in float32 by default; TRL casts those of QLoRA to bfloat16.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253


def float32_adapters(model: Any) -> int:
    """Widen trained LoRA tensors that are in half precision, in place; return how many. `restore_masters` undoes it.

    Those beside them that are frozen, as one of A and B may be, are widened too: PEFT multiplies one by the other.
    The `Parameter` objects stay, so that references to them stay valid; call it before an optimizer is made.
    """
    changed = 0
    found = [(_adapter(name), parameter) for name, parameter in model.named_parameters() if ".lora_" in name]
    trained = {adapter for adapter, parameter in found if parameter.requires_grad}
    for adapter, parameter in found:
        if adapter in trained and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter._narrow = parameter.dtype
            parameter.data = parameter.data.float()
            changed += 1
    return changed


def _adapter(name: str) -> tuple[str, str]:
    """(layer, adapter) of a parameter: "layers.0.mlp.down_proj.lora_A.default.weight"."""
    layer, _, part = name.rpartition(".lora_")
    return layer, part.split(".")[1] if "." in part else ""


def restore_masters(model: Any) -> None:
    """Undo `float32_adapters`."""
    for parameter in model.parameters():
        if (dtype := parameter.__dict__.pop("_narrow", None)) is not None:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None if parameter.grad is None else parameter.grad.to(dtype)
