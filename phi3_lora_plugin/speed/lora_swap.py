"""Which LoRA layers of a model take the fused forward: their class is swapped, and swapped back."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections import Counter
from typing import Any

import torch  # noqa: TID253
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: TID253
from peft.tuners.lora.layer import LoraLayer  # noqa: TID253

from phi3_lora_plugin.speed.lora_linear import FusedLoraLinear
from phi3_lora_plugin.speed.shards import in_units, shard_obstacle, wrapper_of


def fuse_lora(model: torch.nn.Module) -> int:
    """Swap the class of every PEFT layer over a plain or 4-bit linear layer; return how many. See `restore_lora`."""
    classes = _fused_classes()
    layers = [module for module in model.modules() if type(module) in classes and not module.fan_in_fan_out]
    layers = [layer for layer in layers if type(layer) is not PeftLinear or type(layer.base_layer) is torch.nn.Linear]
    for layer in layers:
        layer.__class__ = classes[type(layer)]
    for layer in model.modules():
        layer.__dict__.pop("_stock", None)
    return len(layers)


def fused_layers(model: torch.nn.Module) -> tuple[int, dict[str, int]]:
    """(LoRA layers whose fused forward will run, why it will not in others -> how many)."""
    fused = tuple(_fused_classes().values())
    units = in_units(model)
    count, others = 0, Counter[str]()
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        obstacle: str | None = "not over a plain linear layer"
        if isinstance(layer, fused):
            obstacle = _obstacle(layer, units)
        if obstacle is None:
            count += 1
        else:
            others[obstacle] += 1
    return count, dict(others)


def restore_lora(model: torch.nn.Module) -> None:
    """Undo `fuse_lora`."""
    stock = {mine: theirs for theirs, mine in _fused_classes().items()}
    for module in model.modules():
        if type(module) in stock:
            module.__class__ = stock[type(module)]
        elif isinstance(module, tuple(stock)):  # FSDP2 has put a class of its own over ours
            module.__dict__["_stock"] = True


def _obstacle(layer: Any, units: bool) -> str | None:
    """Why PEFT's forward will run although the layer is ours: what is seen while the model rests."""
    for part in (layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()):
        if wrapper := wrapper_of(part):
            return wrapper
        # Units of FSDP have whole parameters inside a forward; what others have cut stays cut.
        if not units and (obstacle := shard_obstacle(part.weight)):
            return obstacle
    return None


def _fused_classes() -> dict[type, type]:
    """PEFT's classes, and ours in their places; of 4-bit layers only where bitsandbytes is installed."""
    classes: dict[type, type] = {PeftLinear: FusedLoraLinear}
    try:
        from peft.tuners.lora.bnb import Linear4bit

        from phi3_lora_plugin.speed.lora_linear4bit import FusedLoraLinear4bit
    except ImportError:
        return classes
    return classes | {Linear4bit: FusedLoraLinear4bit}
