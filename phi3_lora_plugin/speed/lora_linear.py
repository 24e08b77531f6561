"""One autograd function for a frozen linear layer and its LoRA, in place of the six that PEFT's forward makes.

`y = x W^T + s (x A^T) B^T` is accumulated into one buffer; the input is saved once and in its own dtype (PEFT casts
it to the adapter's float32), the scaled copy and the out-sized sums are never made, and the frozen weight is never
differentiated. Only the class of PEFT's layer is swapped: parameters, keys, files, merge and resume stay PEFT's.

A 4-bit weight is unpacked once in each direction, into buffers that all layers share (see lora_linear4bit.py).
A layer whose parameters are not whole (FSDP, ZeRO-3, DTensors) takes PEFT's forward (see shards.py).
"""

# This module defines subclasses of something heavy; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: TID253

from phi3_lora_plugin.speed.elementwise import Unnormed
from phi3_lora_plugin.speed.first_order import first_order
from phi3_lora_plugin.speed.shards import hooked, linear_obstacle, say_once

_FEW = 16  # rows; up to this many, a pass over A and B costs more than a pass over the rows

#: One block of a block-diagonal B: (first row, end of rows, first column, end of columns).
Block = tuple[int, int, int, int]


@dataclass(frozen=True)
class Part:
    """A frozen projection and the adapter on it, as the fused functions take them; `a` and `b` may be None together."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scaling: float = 1.0
    blocks: tuple[Block, ...] = ()
    unpack: Callable[[], torch.Tensor] | None = None
    """Makes [out, in] of a weight that is stored otherwise; what it returns is used up before it is called again."""
    times: Callable[[torch.Tensor], torch.Tensor | None] | None = None
    """x [n, in] -> [n, out] by a kernel that takes such a weight as it is, or None where there is none for x."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, in] -> [n, out], without the adapter, in x's dtype."""
        if self.times is not None and (made := self.times(x)) is not None:
            return made
        # A weight of another dtype (autocast) is cast again in backward: kept, it would be a copy of the whole base.
        return torch.nn.functional.linear(x, self._whole(x.dtype), self.bias)

    def add(self, out: torch.Tensor, down: torch.Tensor) -> None:
        """Add to out [n, out] what the adapter makes of down [n, r], A x."""
        assert self.b is not None
        wide = self.b.to(out.dtype)
        for top, bottom, left, right in self.blocks or ((0, wide.shape[0], 0, wide.shape[1]),):
            out[:, top:bottom].addmm_(down[:, left:right], wide[top:bottom, left:right].t(), alpha=self.scaling)

    def gradients(self, grad: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(that of B, that of down) from that of the output [n, out]."""
        assert self.b is not None
        wide = self.b.to(grad.dtype)
        if not self.blocks:
            return (grad.t() @ down).mul_(self.scaling).to(self.b.dtype), (grad @ wide).mul_(self.scaling)
        grad_b, grad_down = torch.zeros_like(self.b), torch.empty_like(down)
        for top, bottom, left, right in self.blocks:
            part = grad[:, top:bottom]
            grad_b[top:bottom, left:right] = (part.t() @ down[:, left:right]).mul_(self.scaling)
            grad_down[:, left:right] = (part @ wide[top:bottom, left:right]).mul_(self.scaling)
        return grad_b, grad_down

    def back(self, grad: torch.Tensor, grad_down: torch.Tensor | None) -> torch.Tensor:
        """The gradient of x from that of the output and, unless it goes elsewhere, that of down."""
        out = grad @ self._whole(grad.dtype)
        if grad_down is not None and self.a is not None:
            out.addmm_(grad_down, self.a.to(grad.dtype))
        return out

    def _whole(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype) if self.unpack is None else self.unpack()


def kept_of(x: torch.Tensor, unnormed: Unnormed | None) -> tuple[torch.Tensor | None, ...]:
    """What `gradient_of_a` needs to know of A's input x [n, in]: what that was made of, which its norm keeps anyway."""
    if unnormed is None or unnormed.total.dtype != x.dtype:
        return x, None, None
    scale = unnormed.scale.reshape(-1, 1)
    if scale.dtype != torch.float32 or len(scale) != len(x):
        return x, None, None
    return unnormed.total.reshape(-1, x.shape[-1]), scale, unnormed.weight


def gradient_of_a(grad_down: torch.Tensor, dtype: torch.dtype, kept: Any) -> torch.Tensor:
    """[r, in] in `dtype`, from the gradient [n, r] of A x and `kept_of` x: x itself, or total, scale and weight.

    With x = total * scale * weight, row by row and column by column, d A = (d down * scale)^T total * weight.
    """
    x, scale, weight = kept
    if scale is None:
        return (grad_down.t() @ x).to(dtype)
    # divided by rms(total), gradients may leave the range of float16
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    made = (grad_down * scale).to(wide).t() @ x.to(wide)
    return (made * weight.to(torch.promote_types(torch.float32, wide))).to(dtype)


class _LoraLinear(torch.autograd.Function):  # type: ignore[misc]
    """x [n, in], A [r, in], B [out, r] -> [n, out]; `seen` is x after dropout, None for x itself."""

    @staticmethod
    def forward(ctx: Any, x: Any, seen: Any, a: Any, b: Any, part: Part, unnormed: Unnormed | None) -> Any:
        given = x if seen is None else seen
        down = given @ a.t().to(x.dtype)
        out = part.product(x)
        part.add(out, down)
        ctx.save_for_backward(down, part.weight, a, b, *kept_of(given, unnormed if seen is None else None))
        ctx.part, ctx.dropped = part, seen is not None
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Any) -> Any:
        down, _, a, _, *kept = ctx.saved_tensors
        grad_b, grad_down = ctx.part.gradients(grad, down)
        grad_a = gradient_of_a(grad_down, a.dtype, kept)
        grad_x = grad_seen = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.part.back(grad, None if ctx.dropped else grad_down)
        if ctx.dropped and ctx.needs_input_grad[1]:
            grad_seen = grad_down @ a.to(grad.dtype)
        return grad_x, grad_seen, grad_a, grad_b, None, None


class FusedLoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over `nn.Linear` with the fused function as its forward; anything unusual takes PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, unnormed: Unnormed | None = None, **kwargs: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]; `unnormed` says what x was made of if a norm gave it."""
        out = None if args or kwargs else self.fast(x, unnormed)
        return super().forward(x, *args, **kwargs) if out is None else out

    def fast(self, x: torch.Tensor, unnormed: Unnormed | None = None) -> torch.Tensor | None:
        """What the fused function gives, or None where this layer is in an unusual state."""
        adapter, dtype = single_adapter(self), computed_in(x)
        if adapter is None or (part := self.part(adapter, dtype)) is None:
            return None
        return apply(self, adapter, x.to(dtype), part, unnormed)

    def part(self, adapter: str, dtype: torch.dtype) -> Part | None:
        """The layer with this adapter, for x in this dtype; None where PEFT's forward has to run."""
        base = self.base_layer
        if obstacle := linear_obstacle(base) or parts_obstacle(self, adapter) or _trained(base):
            say_once(f"lora: PEFT's forward runs in layers with {obstacle}")
            return None
        if not torch.is_autocast_enabled(base.weight.device.type) and dtype != base.weight.dtype:
            return None
        bias = None if base.bias is None else base.bias.to(dtype)
        return part_of(self, adapter, base.weight, bias)


def computed_in(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast or x itself asks for."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def part_of(
    layer: Any,
    adapter: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    unpack: Callable[[], torch.Tensor] | None = None,
    times: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
) -> Part:
    """A PEFT layer over this weight as one of the fused functions takes it."""
    a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter]
    return Part(
        weight, bias, a, lora_b.weight, layer.scaling[adapter], _rows_and_columns(lora_b), unpack=unpack, times=times
    )


def drops(layer: Any, adapter: str) -> bool:
    """Whether dropout changes what A sees, or others look at it there."""
    dropout = layer.lora_dropout[adapter]
    return hooked(dropout) or layer.training and not isinstance(dropout, torch.nn.Identity)


def apply(layer: Any, adapter: str, x: torch.Tensor, part: Part, unnormed: Unnormed | None = None) -> torch.Tensor:
    """x [..., in] -> [..., out] in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    seen = layer.lora_dropout[adapter](x).reshape(-1, x.shape[-1]) if drops(layer, adapter) else None
    with torch.autocast(x.device.type, enabled=False):
        few = len(rows) <= _FEW and not torch.is_grad_enabled() and not part.blocks
        if few and part.a is not None and part.a.dtype != x.dtype:
            out = _few_rows(rows, part)
        else:
            out = _LoraLinear.apply(rows, seen, part.a, part.b, part, unnormed)
    return out.view(*x.shape[:-1], -1)


def _few_rows(x: torch.Tensor, part: Part) -> torch.Tensor:
    """A token or so, as in generation: the rows are cast to the adapter's dtype, and not the adapter to theirs."""
    assert part.a is not None and part.b is not None
    return part.product(x).add_((x.to(part.a.dtype) @ part.a.t()) @ part.b.t(), alpha=part.scaling)


def single_adapter(layer: Any) -> str | None:
    """The adapter to fuse, if there is just one active and nothing about it is special."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A or adapter in layer.lora_variant or "_stock" in layer.__dict__:
        return None
    if not isinstance(layer.scaling[adapter], float | int):
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
