"""Whether a layer's parameters can be read directly: those of a sharded model are whole only in its forward."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch  # noqa: TID253

log = logging.getLogger(__name__)


def shard_obstacle(parameter: Any, shape: tuple[int, ...] | None = None) -> str | None:
    """Why this parameter is not whole; None if it is.

    Args:
        shape: of the whole parameter, where it is known; FSDP1 leaves a piece of another shape, or nothing.
    """
    if parameter is None:
        return "a parameter that FSDP has taken away"
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
        return "parameters partitioned by ZeRO-3"
    if hasattr(parameter, "full_tensor"):
        return "parameters that are DTensors"
    if shape is not None and tuple(parameter.shape) != shape:
        return "parameters that are shards"
    return None


def has_own_forward(module: Any) -> bool:
    """Whether a forward was put on this module itself, other than accelerate's that only moves inputs to its device.

    accelerate puts that one on every module of a model with a `device_map`, as PEFT loads an adapter into it; on one
    device there is nothing to move.
    """
    if "forward" not in module.__dict__:
        return False
    hook, stock = module.__dict__.get("_hf_hook"), module.__dict__.get("_old_forward")
    only_moves = type(hook).__name__ == "AlignDevicesHook" and not getattr(hook, "offload", True)
    one_device = module.weight.device.type == "cpu" or torch.cuda.device_count() <= 1
    return not (only_moves and one_device and getattr(stock, "__func__", None) is type(module).forward)


def hooked(module: Any) -> bool:
    """Whether any hook waits for a module to be called, or for its gradients."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def linear_obstacle(layer: Any) -> str | None:
    """Why the weights of this linear layer must not be read past its forward; None if they may."""
    if type(layer) is not torch.nn.Linear:
        sliced = isinstance(layer, torch.nn.Linear) and hasattr(layer, "blocks")  # `lora.slices.SlicedLinear`
        if (wrapper := wrapper_of(layer)) or not sliced:
            return wrapper or f"a {type(layer).__name__}"
    if hooked(layer) or "forward" in layer.__dict__:
        return "hooks on their parts"  # of code that counts, offloads or moves them: ZeRO-3, accelerate
    if layer.bias is not None and layer.bias.requires_grad:
        return "a bias that is trained"
    if type(layer.weight) not in _WHOLE and not type(layer.weight).__module__.startswith("torch._subclasses"):
        return shard_obstacle(layer.weight) or f"weights of type {type(layer.weight).__name__}"
    return shard_obstacle(layer.weight, (layer.out_features, layer.in_features))


def in_units(model: Any) -> bool:
    """Whether units of FSDP make parameters whole before they are used."""
    return any(wrapper_of(module) for module in model.modules())


@cache
def say_once(what: str) -> None:
    """Warn, once a process, of a fast path that gives way while a model runs, because of how it was wrapped."""
    log.warning("speed: %s", what)


def wrapper_of(module: Any) -> str | None:
    """That a module is a unit of FSDP by itself; None if it is not."""
    name = type(module).__name__
    if name == "FullyShardedDataParallel":
        return "units of FSDP1"
    return "units of FSDP2" if any(each.__name__ == "FSDPModule" for each in type(module).__mro__) else None


_WHOLE = (torch.Tensor, torch.nn.Parameter)
