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

    The `Parameter` objects stay, so that references to them stay valid; call it before an optimizer is made.
    """
    changed = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter._narrow = parameter.dtype
            parameter.data = parameter.data.float()
            changed += 1
    return changed


def restore_masters(model: Any) -> None:
    """Undo `float32_adapters`."""
    for parameter in model.parameters():
        if (dtype := parameter.__dict__.pop("_narrow", None)) is not None:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None if parameter.grad is None else parameter.grad.to(dtype)
