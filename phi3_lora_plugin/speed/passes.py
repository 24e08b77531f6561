"""The passes over activations between the matrix products of a layer, in plain PyTorch, on any device.

Each is a forward or a backward without autograd, which `elementwise` puts together. On a card `card_passes` has the
same functions as one kernel each; these are their twins.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

import torch  # noqa: TID253

from phi3_lora_plugin.speed.device_kind import device_kind, in_dry_run

Pair = tuple[torch.Tensor, torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
    """(x / rms(x) * weight [.., width], 1 / rms(x) [.., 1] in float32), as `Phi3RMSNorm` of transformers has it."""
    wide = x.to(torch.float32)  # as transformers does, whatever the dtype
    out = torch.mul(wide, wide, out=_room_for(wide))  # squares, and then in their place what is normed
    scale = out.sum(-1, keepdim=True).div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(wide, scale, out=out).to(x.dtype).mul_(weight), scale


def _room_for(x: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor like x that is wanted for a short time, a little more than x needs.

    What is kept for backward is as large. Before 2.38 glibc fills the place of a freed block, aligned as PyTorch wants
    them, only with smaller ones: without more, each layer of a step on a CPU left holes that nothing else fitted into.
    """
    return x.new_empty(x.numel() + 64)[: x.numel()].view(x.shape)


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """(x + residual, and `norm` of it: what is normed, its scale)."""
    total = x + residual
    return (total, *norm(total, weight, eps))


def norm_backward(
    grad: torch.Tensor, ahead: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The gradient of x from that of its norm, `grad`, and from what else comes back to x, `ahead`."""
    wide = x.to(torch.float32)
    out = (grad * weight).to(torch.float32)
    # d x = scale * (g - x * scale^2 * mean(g * x)), with g the gradient of x * scale
    share = torch.linalg.vecdot(out, wide).div_(x.shape[-1]).unsqueeze_(-1).mul_(scale * scale)
    out = torch.addcmul(out, wide, share, value=-1).mul_(scale).to(x.dtype)
    return out if ahead is None else out.add_(ahead)


def turn_(both: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads in place: both [rows, tokens, heads, size], cos and sin [rows or 1, tokens, half of what turns]."""
    half = cos.shape[-1]
    cosine, sine = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = both[..., :half], both[..., half : 2 * half]
    turned = (first * cosine).addcmul_(second, sine, value=-1)
    second.mul_(cosine).addcmul_(first, sine)
    first.copy_(turned)


def turn_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient [rows, tokens, (heads + 2 key heads) x size] of a projection, from those of its parts.

    Args:
        grad_q: [rows, heads, tokens, size], of the rotated queries; `grad_k` and `grad_v` have the key heads.
        cos, sin: as for `turn_`.
    """
    rows, heads, tokens, size = grad_q.shape
    key_heads = grad_k.shape[1]
    out = torch.empty(rows, tokens, heads + 2 * key_heads, size, dtype=grad_q.dtype, device=grad_q.device)
    _turn_back(grad_q.transpose(1, 2), cos, sin, out[:, :, :heads])
    _turn_back(grad_k.transpose(1, 2), cos, sin, out[:, :, heads : heads + key_heads])
    out[:, :, heads + key_heads :] = grad_v.transpose(1, 2)
    return out.view(rows, tokens, -1)


def _turn_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    half = cos.shape[-1]
    cosine, sine = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine)
    torch.mul(second, cosine, out=out[..., half : 2 * half]).addcmul_(first, sine, value=-1)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]


def gate(both: torch.Tensor) -> torch.Tensor:
    """[rows, 2 x width] -> [rows, width]: silu(first half) x second half."""
    opened, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(opened).mul_(up)


def gate_backward(grad: torch.Tensor, both: torch.Tensor) -> Pair:
    """(gradient of `both`, `gate(both)` again), from the gradient [rows, width] of `gate(both)`."""
    closed, up = both.chunk(2, dim=-1)
    opened = torch.nn.functional.silu(closed)
    out = torch.empty_like(both, memory_format=torch.contiguous_format)
    into_gate, into_up = out.chunk(2, dim=-1)
    torch.mul(opened, grad, out=into_up)
    torch.mul(grad, up, out=into_gate)
    torch.ops.aten.silu_backward.grad_input(into_gate, closed, grad_input=into_gate)
    return out, opened.mul_(up)


def gate_sum(both: torch.Tensor, down: torch.Tensor, wide: torch.Tensor, scaling: float) -> torch.Tensor:
    """`gate` of a projection with its LoRA, both + scaling x down wide^T: down [rows, r], wide [2 x width, r]."""
    return gate(torch.addmm(both, down, wide.t(), alpha=scaling))


def gate_sum_backward(
    grad: torch.Tensor, both: torch.Tensor, down: torch.Tensor, wide: torch.Tensor, scaling: float
) -> Pair:
    """(gradient of `both`, `gate_sum` again), from the gradient [rows, width] of `gate_sum`."""
    return gate_backward(grad, torch.addmm(both, down, wide.t(), alpha=scaling))


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, scale: float, gradient: bool, stats: Pair | None = None
) -> torch.Tensor:
    """The cross-entropy of each row [rows] in float32, and in place of `logits` [rows, words] its gradient x `scale`.

    Args:
        gradient: whether that gradient is wanted; what is in `logits` afterwards is of no use without.
        stats: where to write the entropy of each row's prediction, and whether it is right, each [rows].
    """
    exact = torch.promote_types(torch.float32, logits.dtype)  # float64 stays what it is
    # On a CPU a few rows at a time: what one pass has written is still in the cache for the next.
    few = min(len(logits), max(1, _CACHED // logits.shape[1])) if device_kind(logits) == "cpu" else len(logits)
    shares = logits.new_empty(few, logits.shape[1], dtype=exact)
    wide = None if logits.dtype == exact else torch.empty_like(shares)
    losses = logits.new_empty(len(logits), dtype=exact)
    for start in range(0, few if in_dry_run() else len(logits), max(1, few)):
        rows, names = logits[start : start + few], labels[start : start + few, None]
        given = rows if wide is None else wide[: len(rows)].copy_(rows)
        share = torch.softmax(given, -1, out=shares[: len(rows)])
        total = share.sum(-1, keepdim=True)  # one, but for how softmax adds up: 2e-5 among 200,000 words
        # The logarithm of the sum, from the largest share: at least 1 / words, it has all its digits.
        norms = given.amax(-1, keepdim=True) - (share.amax(-1, keepdim=True) / total).log_()
        losses[start : start + few] = (norms - given.gather(-1, names)).squeeze(-1)
        if stats is not None:
            entropy, right = (part[start : start + few] for part in stats)
            torch.sub(norms.squeeze(-1), torch.linalg.vecdot(share, given) / total.squeeze(-1), out=entropy)
            torch.eq(given.argmax(-1), names.squeeze(-1), out=right)
        if gradient:  # softmax - onehot
            torch.mul(share.scatter_add_(-1, names, -total), scale / total, out=rows)
    return losses


_CACHED = 2**19  # logits that are taken at a time: 2 MB in float32, what a core's cache holds
