"""One autograd function for a frozen linear layer and its LoRA, in place of the six that PEFT's forward makes.

`y = x W^T + s (x A^T) B^T` is accumulated into one buffer; the input is saved once and in its own dtype (PEFT casts
it to the adapter's float32), the scaled copy and the out-sized sums are never made, and the frozen weight is never
differentiated. Only the class of PEFT's layer is swapped: parameters, keys, files, merge and resume stay PEFT's.

A 4-bit weight is unpacked once in each direction, into one buffer that all layers share (see lora_linear4bit.py).
A layer whose parameters are not whole (FSDP, ZeRO-3, DTensors) takes PEFT's forward (see shards.py).
"""

# This module defines subclasses of something heavy; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch  # noqa: TID253
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: TID253

from phi3_lora_plugin.speed.proved_kernels import passes_for
from phi3_lora_plugin.speed.shards import linear_obstacle, say_once

_FEW = 16  # rows; up to this many, a pass over A and B costs more than a pass over the rows

#: One block of a block-diagonal B: (first row, end of rows, first column, end of columns).
Block = tuple[int, int, int, int]


class _LoraLinear(torch.autograd.Function):  # type: ignore[misc]
    """x [n, in], weight [out, in], A [r, in], B [out, r] -> [n, out]; `seen` is x after dropout, None for x itself.

    `unpack` makes [out, in] of a weight that is stored otherwise; what it returns is used up before it is called again.
    With `gated`, x is [n, 2 x in]: gate and up. SwiGLU makes the input from them here and again in backward, so that
    it is not kept next to them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        seen: Any,
        weight: Any,
        bias: Any,
        a: Any,
        b: Any,
        scaling: float,
        blocks: tuple[Block, ...],
        unpack: Callable[[], Any] | None,
        gated: bool,
    ) -> Any:
        kept = x if seen is None else seen
        if gated:
            x = passes_for("gate", x, x.shape[-1] // 2).gate(x)
        down = (x if seen is None else seen) @ a.t().to(x.dtype)
        # A weight of another dtype (autocast) is cast again in backward: kept, it would be a copy of the whole base.
        out = torch.nn.functional.linear(x, weight.to(x.dtype) if unpack is None else unpack(), bias)
        wide = b.to(x.dtype)
        for top, bottom, left, right in blocks or ((0, b.shape[0], 0, b.shape[1]),):
            out[:, top:bottom].addmm_(down[:, left:right], wide[top:bottom, left:right].t(), alpha=scaling)
        ctx.save_for_backward(kept, down, weight, a, b)
        ctx.scaling, ctx.blocks, ctx.dropped, ctx.unpack = scaling, blocks, seen is not None, unpack
        ctx.gated = gated
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        seen, down, weight, a, b = ctx.saved_tensors
        wide = b.to(grad.dtype)
        if ctx.blocks:
            grad_b, grad_down = torch.zeros_like(b), torch.empty_like(down)
            for top, bottom, left, right in ctx.blocks:
                part = grad[:, top:bottom]
                grad_b[top:bottom, left:right] = (part.t() @ down[:, left:right]).mul_(ctx.scaling)
                grad_down[:, left:right] = (part @ wide[top:bottom, left:right]).mul_(ctx.scaling)
        else:
            grad_b = (grad.t() @ down).mul_(ctx.scaling).to(b.dtype)
            grad_down = (grad @ wide).mul_(ctx.scaling)
        grad_x = grad_seen = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight.to(grad.dtype) if ctx.unpack is None else ctx.unpack())
        if ctx.dropped:
            grad_seen = grad_down @ a.to(grad.dtype) if ctx.needs_input_grad[1] else None
        elif grad_x is not None:
            grad_x.addmm_(grad_down, a.to(grad.dtype))
        if ctx.gated:
            run = passes_for("gate", seen, seen.shape[-1] // 2)
            if grad_x is None:
                seen = run.gate(seen)
            else:
                grad_x, seen = run.gate_backward(grad_x, seen)
        grad_a = (grad_down.t() @ seen).to(a.dtype)
        return grad_x, grad_seen, None, None, grad_a, grad_b, None, None, None, None


class FusedLoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over `nn.Linear` with the fused function as its forward; anything unusual takes PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        out = None if args or kwargs else self.fast(x)
        return super().forward(x, *args, **kwargs) if out is None else out

    def fast(self, x: torch.Tensor, gated: bool = False) -> torch.Tensor | None:
        """What the fused function gives, or None where this layer is in an unusual state; see `_LoraLinear`."""
        adapter = single_adapter(self, gated)
        base = self.base_layer
        if adapter is None:
            return None
        if obstacle := linear_obstacle(base) or parts_obstacle(self, adapter) or _trained(base):
            say_once(f"lora: PEFT's forward runs in layers with {obstacle}")
            return None
        bias = base.bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = None if bias is None else bias.to(x.dtype)
        elif x.dtype != base.weight.dtype:
            return None
        return fused(self, adapter, x, base.weight, bias, gated=gated)


def fused(
    layer: Any,
    adapter: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    unpack: Callable[[], torch.Tensor] | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The fused function for one adapter of a PEFT layer: x [..., in] -> [..., out] in x's dtype; see `_LoraLinear`."""
    a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    rows = x.reshape(-1, x.shape[-1])
    dropped = layer.training and not isinstance(dropout, torch.nn.Identity)
    seen = dropout(x).reshape(-1, x.shape[-1]) if dropped else None
    blocks = _rows_and_columns(lora_b)
    with torch.autocast(x.device.type, enabled=False):
        if len(rows) <= _FEW and not torch.is_grad_enabled() and a.dtype != x.dtype and not blocks and not gated:
            few = _few_rows(
                rows, weight if unpack is None else unpack(), bias, a, lora_b.weight, layer.scaling[adapter]
            )
            return few.view(*x.shape[:-1], -1)
        out: torch.Tensor = _LoraLinear.apply(
            rows, seen, weight, bias, a, lora_b.weight, layer.scaling[adapter], blocks, unpack, gated
        )
    return out.view(*x.shape[:-1], -1)


def _few_rows(x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> torch.Tensor:
    """A token or so, as in generation: the rows are cast to the adapter's dtype, and not the adapter to theirs."""
    out = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    return out.add_((x.to(a.dtype) @ a.t()) @ b.t(), alpha=scaling)


def single_adapter(layer: Any, gated: bool = False) -> str | None:
    """The adapter to fuse, if there is just one active and nothing about it is special: dropout is, if `gated`."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A or adapter in layer.lora_variant or "_stock" in layer.__dict__:
        return None
    if not isinstance(layer.scaling[adapter], float | int):
        return None
    if gated and layer.training and not isinstance(layer.lora_dropout[adapter], torch.nn.Identity):
        return None
    if any(getattr(part[adapter], "bias", None) is not None for part in (layer.lora_A, layer.lora_B)):
        return None
    return str(adapter)


def _trained(base: Any) -> str | None:
    return "a base that is trained, or in one unit of FSDP with what is" if base.weight.requires_grad else None


def parts_obstacle(layer: Any, adapter: str) -> str | None:
    """Why A and B of an adapter must not be read past their own forward; None if they may."""
    return linear_obstacle(layer.lora_A[adapter]) or linear_obstacle(layer.lora_B[adapter])


def _rows_and_columns(lora_b: Any) -> tuple[Block, ...]:
    """The blocks of a sliced B (`lora.slices.SlicedLinear`); none for an ordinary one."""
    found, left = [], 0
    for block in getattr(lora_b, "blocks", ()):
        found.append((block.start, block.stop, left, left + block.rank))
        left += block.rank
    return tuple(found)
