"""Operators `phi3_lora::..` of PyTorch, one Triton kernel each: how they are launched, and what they give back.

As operators they can be traced and run on tensors without values, and what a step costs on a card is counted on any
machine. Triton is imported when one runs on real tensors. `card_passes` calls them.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from functools import partial
from typing import Any

import torch  # noqa: TID253

_MOST = 4096  # numbers in a piece of a long row
_TOKENS, _COLUMNS = 32, 128  # of a tile that LoRA is added to


def _norm(x: Any, weight: Any, eps: float) -> Any:
    return _launch_norm(x, None, weight, eps)[1:]


def _launch_norm(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    total, normed, scale = _like_add_norm(x, residual, weight, eps)
    rows, others = _rows(x), None if residual is None else _rows(residual)
    block = _power(rows.shape[1])
    kernels.norm[(len(rows),)](
        rows, others, weight, total, normed, scale, rows.shape[1], rows.stride(0), 0 if others is None else
        others.stride(0), eps, ADD=others is not None, WIDE=_wide(x), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, normed, scale


def _norm_backward(grad: Any, ahead: Any, x: Any, weight: Any, scale: Any) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    out = _like_norm_backward(grad, ahead, x, weight, scale)
    parts = _rows(grad), None if ahead is None else _rows(ahead), _rows(x)
    block, width = _power(x.shape[-1]), x.shape[-1]
    kernels.norm_backward[(len(parts[0]),)](
        *parts, weight, scale, out, width, *(0 if part is None else part.stride(0) for part in parts),
        AHEAD=ahead is not None, WIDE=_wide(x), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _turn_(both: Any, cos: Any, sin: Any) -> None:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    rows, tokens, heads, size = both.shape
    if both.stride()[2:] != (size, 1) or (rows > 1 and both.stride(0) != tokens * both.stride(1)):
        raise ValueError(f"heads lie apart or rows do: strides {both.stride()} of {tuple(both.shape)}")
    cos, sin = _angles(cos, sin)
    kernels.turn[(rows * tokens,)](
        both, cos, sin, both.stride(1), heads, cos.shape[1], size, len(cos), cos.stride(0),
        WIDE=_wide(both), HEADS=_power(heads), HALF=_power(cos.shape[1]), num_warps=4,
    )  # fmt: skip


def _turn_backward(grad_q: Any, grad_k: Any, grad_v: Any, cos: Any, sin: Any) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    out = _like_turn_backward(grad_q, grad_k, grad_v, cos, sin)
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (grad_q, grad_k, grad_v)]
    rows, heads, tokens, size = grad_q.shape
    key_heads, (cos, sin) = grad_k.shape[1], _angles(cos, sin)
    half, rest = cos.shape[1], size - 2 * cos.shape[1]
    kernels.turn_backward[(rows * tokens,)](
        *parts, cos, sin, out, tokens, *(part.stride(place) for part in parts for place in (0, 2, 1)),
        heads, key_heads, half, size, len(cos), cos.stride(0), WIDE=_wide(out), HEADS=_power(heads),
        KEY_HEADS=_power(key_heads), HALF=_power(half), REST=_power(rest) if rest else 0, SIZE=_power(size),
        num_warps=4,
    )  # fmt: skip
    return out


def _gate(both: Any) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    out, rows = _like_gate(both), _rows(both)
    width = rows.shape[1] // 2
    block = min(_power(width), _MOST)
    kernels.gate[(len(rows), -(-width // block))](
        rows, out, width, rows.stride(0), WIDE=_wide(both), BLOCK=block, num_warps=_warps(block)
    )
    return out


def _gate_backward(grad: Any, both: Any) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    (out, made), rows, back = _like_gate_backward(grad, both), _rows(both), _rows(grad)
    width = rows.shape[1] // 2
    block = min(_power(width), _MOST)
    kernels.gate_backward[(len(rows), -(-width // block))](
        back, rows, out, made, width, back.stride(0), rows.stride(0), WIDE=_wide(both), BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out, made


def _gate_sum(both: Any, down: Any, wide: Any, scaling: float) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    out, rows, (down, wide) = _like_gate(both), _rows(both), (_rows(down), _rows(wide))
    width = rows.shape[1] // 2
    kernels.gate_sum[(-(-len(rows) // _TOKENS), -(-width // _COLUMNS))](
        rows, down, wide, out, len(rows), width, down.shape[1], rows.stride(0), down.stride(0), wide.stride(0), scaling,
        WIDE=_wide(both), NARROW=_narrow(both), TOKENS=_TOKENS, COLUMNS=_COLUMNS, RANK=max(16, _power(down.shape[1])),
        num_warps=8,
    )  # fmt: skip
    return out


def _gate_sum_backward(grad: Any, both: Any, down: Any, wide: Any, scaling: float) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    (out, made), rows, back = _like_gate_backward(grad, both), _rows(both), _rows(grad)
    down, wide, width = _rows(down), _rows(wide), rows.shape[1] // 2
    kernels.gate_sum_backward[(-(-len(rows) // _TOKENS), -(-width // _COLUMNS))](
        back, rows, down, wide, out, made, len(rows), width, down.shape[1], back.stride(0), rows.stride(0),
        down.stride(0), wide.stride(0), scaling, WIDE=_wide(both), NARROW=_narrow(both), TOKENS=_TOKENS,
        COLUMNS=_COLUMNS, RANK=max(16, _power(down.shape[1])), num_warps=8,
    )  # fmt: skip
    return out, made


def _cross_entropy_(logits: Any, labels: Any, scale: float, gradient: bool) -> Any:
    from phi3_lora_plugin.speed import triton_kernels as kernels

    losses = _like_cross_entropy_(logits, labels, scale, gradient)
    block = min(_power(logits.shape[1]), 2 * _MOST)
    kernels.cross_entropy[(len(logits),)](
        logits, labels, losses, logits.shape[1], logits.stride(0), scale, GRADIENT=gradient, WIDE=_wide(logits),
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return losses


def _like_norm(x: Any, weight: Any, eps: float) -> Any:
    return _like_add_norm(x, None, weight, eps)[1:]


def _like_add_norm(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    total = None if residual is None else x.new_empty(x.shape)
    return total, x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _like_norm_backward(grad: Any, ahead: Any, x: Any, weight: Any, scale: Any) -> Any:
    return x.new_empty(x.shape)


def _like_turn_(both: Any, cos: Any, sin: Any) -> None:
    return None


def _like_turn_backward(grad_q: Any, grad_k: Any, grad_v: Any, cos: Any, sin: Any) -> Any:
    rows, heads, tokens, size = grad_q.shape
    return grad_q.new_empty(rows, tokens, (heads + 2 * grad_k.shape[1]) * size)


def _like_gate(both: Any) -> Any:
    return both.new_empty((*both.shape[:-1], both.shape[-1] // 2))


def _like_gate_backward(grad: Any, both: Any) -> Any:
    return both.new_empty(both.shape), _like_gate(both)


def _like_gate_sum(both: Any, down: Any, wide: Any, scaling: float) -> Any:
    return _like_gate(both)


def _like_gate_sum_backward(grad: Any, both: Any, down: Any, wide: Any, scaling: float) -> Any:
    return _like_gate_backward(grad, both)


def _like_cross_entropy_(logits: Any, labels: Any, scale: float, gradient: bool) -> Any:
    return logits.new_empty(len(logits), dtype=torch.promote_types(torch.float32, logits.dtype))


def _rows(x: Any) -> Any:
    """[rows, width] with a dense last dimension."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])


def _angles(cos: Any, sin: Any) -> Any:
    """[angles, half] of each, with equal strides."""
    cos, sin = (part.reshape(-1, part.shape[-1]) for part in (cos, sin))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


def _wide(x: Any) -> Any:
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _narrow(x: Any) -> Any:
    """What tensor cores multiply; the interpreter's products know no bfloat16."""
    import triton.language as tl

    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return names.get(x.dtype, _wide(x)) if x.is_cuda else _wide(x)


def _power(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


_SCHEMAS = {
    "norm": (_norm, _like_norm, "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)"),
    "add_norm": (
        _launch_norm,
        _like_add_norm,
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    ),
    "norm_backward": (
        _norm_backward,
        _like_norm_backward,
        "(Tensor grad, Tensor? ahead, Tensor x, Tensor weight, Tensor scale) -> Tensor",
    ),
    "turn_": (_turn_, _like_turn_, "(Tensor(a!) both, Tensor cos, Tensor sin) -> ()"),
    "turn_backward": (
        _turn_backward,
        _like_turn_backward,
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) -> Tensor",
    ),
    "gate": (_gate, _like_gate, "(Tensor both) -> Tensor"),
    "gate_backward": (_gate_backward, _like_gate_backward, "(Tensor grad, Tensor both) -> (Tensor, Tensor)"),
    "gate_sum": (
        _gate_sum,
        _like_gate_sum,
        "(Tensor both, Tensor down, Tensor wide, float scaling) -> Tensor",
    ),
    "gate_sum_backward": (
        _gate_sum_backward,
        _like_gate_sum_backward,
        "(Tensor grad, Tensor both, Tensor down, Tensor wide, float scaling) -> (Tensor, Tensor)",
    ),
    "cross_entropy_": (
        _cross_entropy_,
        _like_cross_entropy_,
        "(Tensor(a!) logits, Tensor labels, float scale, bool gradient) -> Tensor",
    ),
}


def _there(kernel: Any, x: torch.Tensor, *args: Any) -> Any:
    """Launch on the card that x is on: Triton takes the current one."""
    with torch.cuda.device_of(x):
        return kernel(x, *args)


_LIBRARY = torch.library.Library("phi3_lora", "FRAGMENT")
for _name, (_kernel, _fake, _schema) in _SCHEMAS.items():
    _LIBRARY.define(f"{_name}{_schema}")
    _LIBRARY.impl(_name, partial(_there, _kernel), "CUDA")
    _LIBRARY.impl(_name, _kernel, "CPU")  # by Triton's interpreter
    torch.library.register_fake(f"phi3_lora::{_name}", _fake, lib=_LIBRARY)
