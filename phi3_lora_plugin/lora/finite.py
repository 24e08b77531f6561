"""Whether all values of LoRA tensors are finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.wording import listed


def sick_weights(model: Any, parameters: Sequence[tuple[str, Any]] | None = None) -> str | None:
    """The names of trained parameters that are not finite, in a sentence; None if all are. One pass over them.

    Collective where they are sharded: a bad value in one process stops all of them.

    Args:
        parameters: the trainable ones of the model's `named_parameters`, for callers that check every step: walking 32
            layers takes longer than checking what was trained.
    """
    import torch

    found = model.named_parameters() if parameters is None else parameters
    named = [(name, p) for name, p in found if p.requires_grad and p.is_floating_point()]
    trained = [p for _, p in named]
    shards = [p for p in trained if hasattr(p, "device_mesh") or hasattr(p, "ds_tensor")]
    bad = []
    with torch.no_grad():
        if not all_finite([_local(p) for p in trained] if shards else trained):
            bad = [name for name, p in named if not is_finite(_local(p))]
    anywhere = _agreed(bool(bad), shards[0]) if shards else bool(bad)
    if not anywhere:
        return None
    if not bad:
        return "trained tensors are not finite in another process"
    return f"{len(bad)} of {len(named)} trained tensors are not finite: {listed(bad, 3)}"


def all_finite(tensors: Sequence[Any]) -> bool:
    """Whether all values are finite, in one pass that keeps nothing. False also where only their norms overflow."""
    import torch

    full = [tensor for tensor in tensors if tensor.numel()]
    return bool(torch.nn.utils.get_total_norm(full).isfinite())


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """The names of tensors of floating-point numbers that have a NaN or an Inf."""
    return [name for name, each in tensors.items() if not is_finite(each)]


def is_finite(tensor: Any) -> bool:
    """Whether a tensor has neither a NaN nor an Inf."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # of numbers of one byte, torch does not tell
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _agreed(sick: bool, shard: Any) -> bool:
    """Whether any process that has a part of `shard` found bad values; each replica checks for itself."""
    import torch

    place = shard.device_mesh.device_type if hasattr(shard, "device_mesh") else shard.device
    flag = torch.tensor(float(sick), device=place)
    torch.distributed.all_reduce(flag)
    return bool(flag)


def _local(parameter: Any) -> Any:
    """What this process has of a parameter: its shard under FSDP2 and ZeRO-3."""
    if hasattr(parameter, "to_local"):
        return parameter.detach().to_local()
    return (parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter).detach()
