"""The MLP of a layer as one autograd function: both projections with their LoRA, and the gate between them.

Of its inside, gate and up are kept and what the gate gives is made again in backward. On a card, where the kernels are
proved right, gate and up are kept as the frozen weights give them: what LoRA adds is added inside the kernel of the
gate, so that no pass over them is needed for it.
"""

# This module defines an autograd function, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed import passes
from phi3_lora_plugin.speed.elementwise import Unnormed
from phi3_lora_plugin.speed.first_order import first_order
from phi3_lora_plugin.speed.lora_linear import Part, computed_in, drops, gradient_of_a, kept_of, single_adapter
from phi3_lora_plugin.speed.proved_kernels import passes_for
from phi3_lora_plugin.speed.shards import linear_obstacle


class _LoraMlp(torch.autograd.Function):  # type: ignore[misc]
    """x [n, hidden] -> [n, hidden]; the adapters of both parts are arguments of their own, for their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, first: Part, second: Part, unnormed: Any, a: Any, b: Any, other_a: Any, other_b: Any
    ) -> Any:
        both, down, other = first.product(x), None, None
        run: Any = passes
        if a is not None:
            down = x @ a.t().to(x.dtype)
            if not first.blocks:
                run = passes_for("gate_sum", x, both.shape[1] // 2, len(a))
        if down is not None and run is not passes:
            opened = run.gate_sum(both, down, b.to(x.dtype), first.scaling)
        else:
            if down is not None:
                first.add(both, down)
            opened = passes_for("gate", x, both.shape[1] // 2).gate(both)
        out = second.product(opened)
        if other_a is not None:
            other = opened @ other_a.t().to(x.dtype)
            second.add(out, other)
        kept = (None,) * 3 if a is None else kept_of(x, unnormed)
        ctx.save_for_backward(both, down, other, first.weight, second.weight, a, b, other_a, other_b, *kept)
        ctx.parts, ctx.run = (first, second), run
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Any) -> Any:
        both, down, other, _, _, a, b, other_a, _, *kept = ctx.saved_tensors
        first, second = ctx.parts
        grad_a = grad_b = grad_other_a = grad_other_b = grad_other = grad_down = None
        if other_a is not None:
            grad_other_b, grad_other = second.gradients(grad, other)
        back = second.back(grad, grad_other)
        if ctx.run is passes:
            into_both, opened = passes_for("gate", both, both.shape[1] // 2).gate_backward(back, both)
        else:
            wide = b.to(grad.dtype)
            into_both, opened = ctx.run.gate_sum_backward(back, both, down, wide, first.scaling)
        if grad_other is not None:
            grad_other_a = (grad_other.t() @ opened).to(other_a.dtype)
        if a is not None:
            grad_b, grad_down = first.gradients(into_both, down)
            grad_a = gradient_of_a(grad_down, a.dtype, kept)
        grad_x = first.back(into_both, grad_down) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, grad_a, grad_b, grad_other_a, grad_other_b


def lora_mlp(x: torch.Tensor, gate_up: Any, down: Any, unnormed: Unnormed | None = None) -> torch.Tensor | None:
    """SwiGLU between two projections, at least one with LoRA: [..., hidden] -> [..., hidden].

    None where they have to be called one by one: one is in an unusual state, or dropout changes what an adapter sees.
    `unnormed` says what x was made of if a norm gave it.
    """
    dtype = computed_in(x)
    first, second = _part(gate_up, dtype), _part(down, dtype)
    if first is None or second is None or (first.a is None and second.a is None):
        return None
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        out: torch.Tensor = _LoraMlp.apply(rows, first, second, unnormed, first.a, first.b, second.a, second.b)
    return out.view(*x.shape[:-1], -1)


def _part(projection: Any, dtype: torch.dtype) -> Part | None:
    if hasattr(projection, "part"):  # one of our LoRA layers
        adapter = single_adapter(projection)
        if adapter is None or drops(projection, adapter):
            return None
        part: Part | None = projection.part(adapter, dtype)
        return part
    if linear_obstacle(projection) or projection.weight.requires_grad or projection.weight.dtype != dtype:
        return None
    return Part(projection.weight, projection.bias)
