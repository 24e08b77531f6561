"""NF4 with double quantisation in place of a model's linear maps, as bitsandbytes loads a checkpoint."""

from __future__ import annotations

from typing import Any

import torch


def linears(base: Any) -> list[tuple[Any, str, Any]]:
    """(parent, name, map) of every linear map of the layers."""
    return [
        (parent, name, linear)
        for layer in base.model.layers
        for parent in (layer.self_attn, layer.mlp)
        for name, linear in list(parent.named_children())
        if type(linear) is torch.nn.Linear
    ]


def packed_linear(linear: Any) -> Any:
    """The same map in NF4, on the same device."""
    import bitsandbytes as bnb

    weight = linear.weight
    four = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    four.weight = bnb.nn.Params4bit(weight.data.clone(), requires_grad=False, quant_type="nf4")
    return four.to(weight.device)


def pack(base: Any) -> None:
    """Replace every linear map of the layers."""
    for parent, name, linear in linears(base):
        setattr(parent, name, packed_linear(linear))
    base.is_loaded_in_4bit = True
