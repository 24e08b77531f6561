"""Stock code with Liger's kernels, by what they read and write: they are Triton, which takes no tensors without values.

RMSNorm, SwiGLU and RoPE are one kernel in each direction, and the loss never keeps the logits of all tokens
(github.com/linkedin/Liger-Kernel, `ops/`, version 0.8). SwiGLU and RoPE take whole tensors, and Phi-3's fused
projections give parts of one: these are copied first. Where liger-kernel is installed or not, these are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any
from unittest import mock

import torch

from benchmarks.costs import Meter


class _Kernel(torch.autograd.Function):
    """One kernel forwards and one backwards, which moves `back` bytes and keeps `inputs`."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, shape: Any, dtype: Any, there: float, back: float, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.meter, ctx.back = meter, back
        meter.note("elementwise", 0.0, there)
        return inputs[0].new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        ctx.meter.note("elementwise", 0.0, ctx.back)
        return (None,) * 5 + tuple(torch.empty_like(each) for each in ctx.saved_tensors)


class _Loss(torch.autograd.Function):
    """The head in chunks, the gradient of the hidden states formed in the same pass."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, hidden: Any, weight: Any) -> Any:
        meter.reads.append("item in Liger's loss: how many tokens have a label")
        meter.note("elementwise", 0.0, _size(hidden))  # zeros, to be overwritten
        tokens, width, words = *hidden.shape, weight.shape[0]
        rows = 1 << (ceil(tokens / ceil(words / width)) - 1).bit_length()
        for start in range(0, tokens, rows):
            part = hidden[start : start + rows]
            logits = part @ weight.t()
            meter.note("elementwise", 0.0, 2.0 * logits.numel() * logits.element_size())  # cross-entropy, in place
            logits @ weight
        ctx.save_for_backward(torch.empty_like(hidden))
        ctx.meter = meter
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        ctx.meter.copies.append("tensor in Liger's loss: a one to compare with")
        ctx.meter.reads.append("equal in Liger's loss: whether the gradient is one")
        return None, ctx.saved_tensors[0] * grad.to(ctx.saved_tensors[0].dtype), None


@contextmanager
def liger(model: Any, meter: Meter) -> Iterator[None]:
    """Run a PEFT model of Phi-3 as Liger patches it, while the block runs."""
    from transformers.models.phi3 import modeling_phi3

    base = model.get_base_model()
    for layer in base.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = partial(_norm, meter)
        layer.mlp.forward = partial(_mlp, meter, layer.mlp)
    base.model.norm.forward = partial(_norm, meter)
    base.forward = partial(_forward, meter, base)
    with mock.patch.object(modeling_phi3, "apply_rotary_pos_emb", partial(_rope, meter)):
        yield


def _size(*tensors: torch.Tensor) -> float:
    return float(sum(each.numel() * each.element_size() for each in tensors))


def _norm(meter: Meter, x: torch.Tensor) -> Any:
    return _Kernel.apply(meter, x.shape, x.dtype, 2 * _size(x), 3 * _size(x), x)


def _mlp(meter: Meter, mlp: Any, x: torch.Tensor) -> Any:
    gate, up = (half.contiguous() for half in mlp.gate_up_proj(x).chunk(2, dim=-1))
    both = _size(gate, up)
    # Backwards it writes over gate and up; `chunk` puts the two halves into one gradient, a pass of its own.
    made = _Kernel.apply(meter, gate.shape, gate.dtype, 1.5 * both, 2.5 * both, gate, up)
    return mlp.down_proj(made)


def _rope(meter: Meter, q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, *rest: Any, **more: Any) -> Any:
    moved = 2 * _size(q, k)
    meter.note("elementwise", 0.0, moved)
    return _Turned.apply(meter, moved, q, k)


class _Turned(torch.autograd.Function):
    """Rotated in a copy, [rows, tokens, heads, size] in memory, and back in place; keeps cosines alone."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, moved: float, q: Any, k: Any) -> Any:
        ctx.meter, ctx.moved = meter, moved
        return tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k))

    @staticmethod
    def backward(ctx: Any, grad_q: Any, grad_k: Any) -> Any:
        ctx.meter.note("elementwise", 0.0, ctx.moved)
        return None, None, grad_q, grad_k


def _forward(meter: Meter, base: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    hidden = base.model(**inputs).last_hidden_state
    loss = _Loss.apply(meter, hidden.reshape(-1, hidden.shape[-1]), base.lm_head.weight)
    return CausalLMOutputWithPast(loss=loss)
