"""Stands for bitsandbytes' 4-bit and 8-bit layers on tensors without storage: as many bytes, the same temporaries."""

# This module defines subclasses of something heavy; it is imported only inside functions.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: TID253

from phi3_lora_plugin.model.quantize import PACKED_BYTES
from phi3_lora_plugin.speed.lora_linear import apply, part_of, single_adapter
from phi3_lora_plugin.speed.prefetch import fits_twice


def pack_weights(model: Any, quantize: str, compute: Any) -> None:
    """Give the projections of a model packed weights of "nf4" or "int8" that are multiplied in `compute`."""
    for layer in model.model.layers:
        for module in list(layer.modules()):
            if type(module) is torch.nn.Linear:
                module.__class__ = _PackedLinear
                module.compute = compute
                size = int(module.weight.numel() * PACKED_BYTES[quantize])
                module.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)


def fuse_packed(model: Any) -> None:
    """What `speed.lora` does with 4-bit layers."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is _PackedLinear:
            module.__class__ = _FusedPackedLinear


def make_buffers(model: Any, memory: int | None) -> None:
    """What `speed.lora` holds on a card with so many bytes of memory (None: not known): the largest weight, or two."""
    fused = [module for module in model.modules() if type(module) is _FusedPackedLinear]
    if not fused:
        return
    bases = [module.base_layer for module in fused]
    size = max(base.out_features * base.in_features for base in bases)
    compute = bases[0].compute
    count = 2 if len(fused) > 1 and fits_twice(size * compute.itemsize, memory) else 1
    rooms = [torch.empty(size, dtype=compute) for _ in range(count)]
    for module in fused:
        module.rooms = rooms


class _PackedFunction(torch.autograd.Function):  # type: ignore[misc]
    """A frozen linear map whose weight is unpacked for every use, as bitsandbytes does; keeps the packed one only."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, shape: tuple[int, int]) -> Any:
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return torch.nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad @ grad.new_empty(ctx.shape), None, None


class _PackedLinear(torch.nn.Linear):  # type: ignore[misc]
    compute: Any = torch.float32

    def forward(self, x: Any) -> Any:
        out = _PackedFunction.apply(x.to(self.compute), self.weight, (self.out_features, self.in_features))
        return out.to(x.dtype).clone()  # PEFT clones what a 4-bit layer gives before it adds to it


class _FusedPackedLinear(PeftLinear):  # type: ignore[misc]
    """Stands for `FusedLoraLinear4bit`."""

    rooms: Any = ()
    """What weights are unpacked into; empty where each is unpacked into memory of its own."""

    def forward(self, x: Any, *args: Any, unnormed: Any = None, **kwargs: Any) -> Any:
        adapter = single_adapter(self)
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        compute = self.base_layer.compute
        return apply(self, adapter, x.to(compute), self.part(adapter, compute), unnormed).to(x.dtype)

    def part(self, adapter: str, dtype: Any) -> Any:
        """As `FusedLoraLinear4bit.part`."""
        base, rooms = self.base_layer, self.rooms

        def unpack() -> Any:  # must not know x: what it knows stays alive until the backward pass
            shape = base.out_features, base.in_features
            return rooms[0][: shape[0] * shape[1]].view(shape) if rooms else torch.empty(shape, dtype=base.compute)

        return part_of(self, adapter, base.weight, base.bias, unpack) if base.compute == dtype else None
