"""One autograd function for a frozen linear layer and its LoRA, in place of the six that PEFT's forward makes.

`y = x W^T + s (x A^T) B^T` is accumulated into one buffer; the input is saved once and in its own dtype (PEFT casts
it to the adapter's float32), the scaled copy and the out-sized sums are never made, and the frozen weight is never
differentiated. Only the class of PEFT's layer is swapped: parameters, keys, files, merge and resume stay PEFT's.
"""

# This module defines subclasses of something heavy; it is imported only inside functions.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: TID253
from peft.tuners.lora.layer import LoraLayer  # noqa: TID253

#: One block of a block-diagonal B: (first row, end of rows, first column, end of columns).
Block = tuple[int, int, int, int]


class _LoraLinear(torch.autograd.Function):  # type: ignore[misc]
    """x [n, in], weight [out, in], A [r, in], B [out, r] -> [n, out]; `seen` is x after dropout, None for x itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, seen: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float, blocks: tuple[Block, ...]
    ) -> Any:
        down = (x if seen is None else seen) @ a.t().to(x.dtype)
        out = torch.nn.functional.linear(x, weight, bias)
        up = b.to(x.dtype)
        for top, bottom, left, right in blocks or ((0, b.shape[0], 0, b.shape[1]),):
            out[:, top:bottom].addmm_(down[:, left:right], up[top:bottom, left:right].t(), alpha=scaling)
        ctx.save_for_backward(x if seen is None else seen, down, weight, a, b)
        ctx.scaling, ctx.blocks, ctx.dropped = scaling, blocks, seen is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        seen, down, weight, a, b = ctx.saved_tensors
        grad_b = torch.zeros_like(b)
        grad_down = torch.empty_like(down)
        up = b.to(grad.dtype)
        for top, bottom, left, right in ctx.blocks or ((0, b.shape[0], 0, b.shape[1]),):
            part = grad[:, top:bottom]
            grad_b[top:bottom, left:right] = (part.t() @ down[:, left:right]).mul_(ctx.scaling)
            grad_down[:, left:right] = (part @ up[top:bottom, left:right]).mul_(ctx.scaling)
        grad_a = (grad_down.t() @ seen).to(a.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_seen = None
        if ctx.dropped:
            grad_seen = grad_down @ a.to(grad.dtype) if ctx.needs_input_grad[1] else None
        elif grad_x is not None:
            grad_x.addmm_(grad_down, a.to(grad.dtype))
        return grad_x, grad_seen, None, None, grad_a, grad_b, None, None


class FusedLoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over `nn.Linear` with the fused function as its forward; anything unusual takes PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        adapter = self._single_adapter()
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        a, lora_b = self.lora_A[adapter].weight, self.lora_B[adapter]
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        dropout = self.lora_dropout[adapter]
        rows = x.reshape(-1, x.shape[-1])
        seen = (
            dropout(x).reshape(-1, x.shape[-1])
            if self.training and not isinstance(dropout, torch.nn.Identity)
            else None
        )
        with torch.autocast(x.device.type, enabled=False):
            out = _LoraLinear.apply(
                rows, seen, weight, bias, a, lora_b.weight, self.scaling[adapter], _rows_and_columns(lora_b)
            )
        return out.view(*x.shape[:-1], -1)

    def _single_adapter(self) -> str | None:
        """The adapter to fuse, if there is just one active and nothing about it is special."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        adapter = self.active_adapters[0]
        if (
            adapter not in self.lora_A
            or adapter in self.lora_variant
            or not isinstance(self.scaling[adapter], float | int)
        ):
            return None
        base = self.base_layer
        if type(base) is not torch.nn.Linear or base.weight.requires_grad:
            return None
        if self.lora_A[adapter].bias is not None or self.lora_B[adapter].bias is not None:
            return None
        return str(adapter)


def _rows_and_columns(lora_b: Any) -> tuple[Block, ...]:
    """The blocks of a sliced B (`lora.slices.SlicedLinear`); none for an ordinary one."""
    found, left = [], 0
    for block in getattr(lora_b, "blocks", ()):
        found.append((block.start, block.stop, left, left + block.rank))
        left += block.rank
    return tuple(found)


def fuse_lora(model: torch.nn.Module) -> int:
    """Swap the class of every PEFT layer over a plain linear layer; return how many. `restore_lora` takes it back."""
    layers = [module for module in model.modules() if type(module) is PeftLinear and _plain(module)]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    return len(layers)


def fused_layers(model: torch.nn.Module) -> tuple[int, int]:
    """(LoRA layers that are fused, LoRA layers that are not)."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    fused = sum(type(layer) is FusedLoraLinear for layer in layers)
    return fused, len(layers) - fused


def restore_lora(model: torch.nn.Module) -> None:
    """Undo `fuse_lora`."""
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = PeftLinear


def _plain(layer: Any) -> bool:
    return type(layer.base_layer) is torch.nn.Linear and not layer.fan_in_fan_out
