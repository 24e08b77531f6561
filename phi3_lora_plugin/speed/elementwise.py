"""What runs between the matrix products of a layer, with fewer passes over activations and less kept for backward.

Stock code writes each step as an operator of its own, and autograd keeps what each of them needs. Here normalisation,
rotation and gate are one function each with its gradient by hand: in plain PyTorch on any device (`passes`), and on a
card where they are proved right there (`proved_kernels`) as one kernel in each direction (`card_passes`).
"""

# This module defines autograd functions, subclasses of something heavy; it is imported only inside functions.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed.first_order import first_order
from phi3_lora_plugin.speed.proved_kernels import passes_for


@dataclass(frozen=True)
class Unnormed:
    """What a normed tensor [.., width] was made of: total x scale x weight, all of which its norm keeps anyway."""

    total: torch.Tensor
    """[.., width], without a gradient."""
    scale: torch.Tensor
    """[.., 1], 1 / rms(total) in float32."""
    weight: torch.Tensor
    """[width]."""


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """(x + residual, or x itself; its norm x weight; 1 / its rms); keeps the sum and one number a row. The weight is
    frozen."""

    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, eps: float, reuse: bool) -> Any:
        run = passes_for("norm", x, x.shape[-1])
        if residual is None or reuse:
            total = x.view_as(x) if residual is None else x.add_(residual).view_as(x)
            normed, scale = run.norm(x, weight, eps)
        else:
            total, normed, scale = run.add_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.added = residual is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(scale)
        return total, normed, scale

    @staticmethod
    @first_order
    def backward(ctx: Any, ahead: Any, grad: Any, _: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        out = ahead
        if grad is not None:
            out = passes_for("norm", x, x.shape[-1]).norm_backward(grad, ahead, x, weight, scale)
        return out, out if ctx.added else None, None, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`Phi3RMSNorm` (Zhang and Sennrich 2019, arXiv 1910.07467) with a frozen weight: [.., width] -> [.., width]."""
    return add_and_norm(x, None, weight, eps)[1]


def add_and_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, reuse: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Unnormed]:
    """(x + residual, `rms_norm` of it), each [.., width], with one gradient for both; without `residual` (x, its norm).

    Who goes on with the first of the two instead of x has one pass less in backward, where both gradients meet. The
    third says what the second was made of. `reuse` as for `add`.
    """
    with torch.autocast(x.device.type, enabled=False):  # which would take sums of squares in 16 bits
        total, normed, scale = _Norm.apply(x, residual, weight, eps, reuse)
    return total, normed, Unnormed(total.detach(), scale, weight)


class _Add(torch.autograd.Function):  # type: ignore[misc]
    """x + residual, in place of x."""

    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any) -> Any:
        return x.add_(residual).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, grad


def add(x: torch.Tensor, residual: torch.Tensor, reuse: bool = False) -> torch.Tensor:
    """x + residual, both [.., width].

    Args:
        reuse: write it into x. Only where no other code reads x any more; if autograd has kept it for a gradient,
            PyTorch raises its own error.
    """
    total: torch.Tensor = _Add.apply(x, residual) if reuse else x + residual
    return total


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    """qkv [rows, tokens, (heads + 2 key heads) x size] -> rotated q, rotated k, v, each [rows, heads, tokens, size]."""

    @staticmethod
    def forward(ctx: Any, qkv: Any, cos: Any, sin: Any, heads: int, key_heads: int, size: int, reuse: bool) -> Any:
        half = cos.shape[-1] // 2  # both halves of cos and sin are equal
        cos, sin = cos[..., :half], sin[..., :half]
        ctx.save_for_backward(cos, sin)
        rows, tokens = qkv.shape[:2]
        parts = qkv.view(rows, tokens, heads + 2 * key_heads, size)
        turned = parts[:, :, : heads + key_heads]
        if not reuse:
            turned = turned.clone(memory_format=torch.contiguous_format)
        passes_for("rotate", qkv, heads, key_heads, size, half).turn_(turned, cos, sin)
        value = parts[:, :, heads + key_heads :]
        return turned[:, :, :heads].transpose(1, 2), turned[:, :, heads:].transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_q: Any, grad_k: Any, grad_v: Any) -> Any:
        cos, sin = ctx.saved_tensors
        sizes = grad_q.shape[1], grad_k.shape[1], grad_q.shape[-1], cos.shape[-1]
        out = passes_for("rotate", grad_q, *sizes).turn_backward(grad_q, grad_k, grad_v, cos, sin)
        return out, None, None, None, None, None, None


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    key_heads: int,
    size: int,
    reuse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fused projection and rotate queries and keys (Su et al. 2021, arXiv 2104.09864).

    Args:
        qkv: [rows, tokens, (heads + 2 key heads) x size].
        cos, sin: [rows or 1, tokens, rotated], of the dtype of qkv, with equal halves; less than `size` is partial.
        reuse: write q and k into qkv, which then holds all three and nothing else is kept. Only where no other code
            reads qkv any more; if autograd has kept it for a gradient, PyTorch raises its own error.

    Returns:
        q [rows, heads, tokens, size], k and v [rows, key heads, tokens, size]; v is a view of qkv.
    """
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Rotate.apply(qkv, cos, sin, heads, key_heads, size, reuse)
    return parts


class _SwiGlu(torch.autograd.Function):  # type: ignore[misc]
    """[.., 2 x width] -> silu(first half) x second half; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, both: Any) -> Any:
        ctx.save_for_backward(both)
        return passes_for("gate", both, both.shape[-1] // 2).gate(both)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Any) -> Any:
        (both,) = ctx.saved_tensors
        return passes_for("gate", both, both.shape[-1] // 2).gate_backward(grad, both)[0]


class _Take(torch.autograd.Function):  # type: ignore[misc]
    """Rows of [rows, width], each once: PyTorch's own gradient adds row by row, as if one could come twice."""

    @staticmethod
    def forward(ctx: Any, x: Any, index: Any) -> Any:
        ctx.save_for_backward(index)
        ctx.all = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.all, grad.shape[1]).index_copy_(0, index, grad), None


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[rows, tokens, width] -> [1, len(index), width]: these places, each once, among all rows end to end."""
    taken: torch.Tensor = _Take.apply(x.flatten(0, 1), index)
    return taken.unsqueeze(0)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202) of a fused projection, gate first: [.., 2 x width] -> [.., width]."""
    made: torch.Tensor = _SwiGlu.apply(both)
    return made
