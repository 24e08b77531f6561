"""What runs between the matrix products of a layer, with fewer passes over activations and less kept for backward.

Stock code writes each step as an operator of its own, and autograd keeps what each of them needs. Here normalisation,
rotation and gate are one function each with its gradient by hand, in plain PyTorch on any device.
"""

# This module defines autograd functions, subclasses of something heavy; it is imported only inside functions.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """x [.., width] / rms(x) * weight; keeps x and one number a row. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> Any:
        wide = x.to(torch.float32)  # as transformers does, whatever the dtype
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        wide = x.to(torch.float32)
        out = (grad * weight).to(torch.float32)
        # d x = scale * (g - x * scale^2 * mean(g * x)), with g the gradient of x * scale
        share = torch.linalg.vecdot(out, wide).div_(x.shape[-1]).unsqueeze_(-1).mul_(scale * scale)
        out = torch.addcmul(out, wide, share, value=-1).mul_(scale)
        return out.to(x.dtype), None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`Phi3RMSNorm` (Zhang and Sennrich 2019, arXiv 1910.07467) with a frozen weight: [.., width] -> [.., width].

    On a GPU from torch 2.9 on by PyTorch's own kernel, one pass in each direction.
    """
    with torch.autocast(x.device.type, enabled=False):  # which would take sums of squares in 16 bits
        if x.is_cuda and _FUSED_NORM:
            made: torch.Tensor = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        else:
            made = _RmsNorm.apply(x, weight, eps)
    return made


_FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    """qkv [rows, tokens, (heads + 2 key heads) x size] -> rotated q, rotated k, v, each [rows, heads, tokens, size]."""

    @staticmethod
    def forward(ctx: Any, qkv: Any, cos: Any, sin: Any, heads: int, key_heads: int, size: int, reuse: bool) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.sizes = heads, key_heads, size
        rows, tokens = qkv.shape[:2]
        parts = qkv.view(rows, tokens, heads + 2 * key_heads, size)
        both = parts[:, :, : heads + key_heads]
        if reuse:
            _turn_in_place(both, cos, sin)
            turned = both
        else:
            turned = torch.empty_like(both, memory_format=torch.contiguous_format)
            _turn(both, cos, sin, turned, 1)
        value = parts[:, :, heads + key_heads :]
        return turned[:, :, :heads].transpose(1, 2), turned[:, :, heads:].transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_q: Any, grad_k: Any, grad_v: Any) -> Any:
        cos, sin = ctx.saved_tensors
        heads, key_heads, size = ctx.sizes
        rows, _, tokens, _ = grad_q.shape
        out = torch.empty(rows, tokens, heads + 2 * key_heads, size, dtype=grad_q.dtype, device=grad_q.device)
        _turn(grad_q.transpose(1, 2), cos, sin, out[:, :, :heads], -1)
        _turn(grad_k.transpose(1, 2), cos, sin, out[:, :, heads : heads + key_heads], -1)
        out[:, :, heads + key_heads :] = grad_v.transpose(1, 2)
        return out.view(rows, tokens, -1), None, None, None, None, None, None


def _turn(x: Any, cos: Any, sin: Any, out: Any, way: int) -> None:
    """Rotate the first `cos.shape[-1]` numbers of each head of x [rows, tokens, heads, size] into `out`; copy the rest.

    `way` is 1 for the embedding and -1 for its gradient, which turns back. Both halves of cos and sin are equal.
    """
    width = cos.shape[-1]
    half = width // 2
    cosine, sine = cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2)
    first, second = x[..., :half], x[..., half:width]
    torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine, value=-way)
    torch.mul(second, cosine, out=out[..., half:width]).addcmul_(first, sine, value=way)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]


def _turn_in_place(x: Any, cos: Any, sin: Any) -> None:
    half = cos.shape[-1] // 2
    cosine, sine = cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * cosine).addcmul_(second, sine, value=-1)
    second.mul_(cosine).addcmul_(first, sine)
    first.copy_(turned)


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
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        return gate_backward(grad, gate, up, torch.nn.functional.silu(gate))


def gate_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
    """The gradient [.., 2 x width] of `swiglu`, from that of its output and from `opened`, silu(gate)."""
    out = torch.empty(*grad.shape[:-1], 2 * grad.shape[-1], dtype=grad.dtype, device=grad.device)
    into_gate, into_up = out.chunk(2, dim=-1)
    torch.mul(opened, grad, out=into_up)
    torch.mul(grad, up, out=into_gate)
    torch.ops.aten.silu_backward.grad_input(into_gate, gate, grad_input=into_gate)
    return out


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202) of a fused projection, gate first: [.., 2 x width] -> [.., width]."""
    made: torch.Tensor = _SwiGlu.apply(both)
    return made
