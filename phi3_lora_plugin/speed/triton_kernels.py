"""Triton kernels for one card: each is one pass over activations; `card_ops` launches them.

Numbers are read in their own dtype, computed in `WIDE` (float64 of float64, else float32) and rounded once, where
plain PyTorch rounds after each operator. Under `TRITON_INTERPRET=1` they run on a CPU.
"""

# Imported only where a kernel is launched: triton comes with CUDA builds of torch, and with no other.
# Triton reads the source of these functions and gives their arguments types of its own.
# mypy: disable-error-code="no-untyped-def", allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm(
    x, residual, weight, total, normed, scale, width, x_stride, residual_stride, eps,
    ADD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: total = x + residual where `ADD`, else x; scale = 1 / rms(total); normed = total x scale x weight."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        value = (value.to(WIDE) + other.to(WIDE)).to(x.dtype.element_ty)
        tl.store(total + row * width + at, value, mask=inside)
    wide = value.to(tl.float32)  # in float64 too, as transformers has it
    each = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(scale + row, each)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(WIDE)
    out = (wide * each).to(x.dtype.element_ty).to(WIDE) * factor
    tl.store(normed + row * width + at, out, mask=inside)


@triton.jit
def norm_backward(
    grad, ahead, x, weight, scale, out, width, grad_stride, ahead_stride, x_stride,
    AHEAD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: the gradient of x from that of its norm, and what else came back to x where `AHEAD`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    wide = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(WIDE)
    back = (tl.load(grad + row * grad_stride + at, mask=inside, other=0.0).to(WIDE) * factor).to(tl.float32)
    each = tl.load(scale + row)
    share = tl.sum(back * wide, 0) / width * each * each
    back = ((back - wide * share) * each).to(WIDE)
    if AHEAD:
        back += tl.load(ahead + row * ahead_stride + at, mask=inside, other=0.0).to(WIDE)
    tl.store(out + row * width + at, back, mask=inside)


@triton.jit
def turn(
    x, cos, sin, token_stride, heads, half, size, angles, angle_stride,
    WIDE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A token: the first 2 x `half` numbers of each of its heads, turned in place; `angles` rows of cos and sin."""
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    angle = (token % angles) * angle_stride + at
    cosine = tl.load(cos + angle, mask=at < half, other=0.0).to(WIDE)
    sine = tl.load(sin + angle, mask=at < half, other=0.0).to(WIDE)
    place = x + token * token_stride + head * size + at
    first = tl.load(place, mask=inside, other=0.0).to(WIDE)
    second = tl.load(place + half, mask=inside, other=0.0).to(WIDE)
    tl.store(place, first * cosine - second * sine, mask=inside)
    tl.store(place + half, second * cosine + first * sine, mask=inside)


@triton.jit
def _turn_back(
    grad, head_stride, out, cosine, sine, heads, half, size,
    WIDE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    place, there = grad + head * head_stride + at, out + head * size + at
    first = tl.load(place, mask=inside, other=0.0).to(WIDE)
    second = tl.load(place + half, mask=inside, other=0.0).to(WIDE)
    tl.store(there, first * cosine + second * sine, mask=inside)
    tl.store(there + half, second * cosine - first * sine, mask=inside)
    if REST > 0:  # what does not turn
        at = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (at < size)
        kept = tl.load(grad + head * head_stride + at, mask=inside, other=0.0)
        tl.store(out + head * size + at, kept, mask=inside)


@triton.jit
def turn_backward(
    grad_q, grad_k, grad_v, cos, sin, out,
    tokens, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    heads, key_heads, half, size, angles, angle_stride,
    WIDE: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """A token: the gradient of its row of the projection, queries and keys turned back, values as they are."""
    token = tl.program_id(0).to(tl.int64)
    row, column = token // tokens, token % tokens
    at = tl.arange(0, HALF)[None, :]
    angle = (token % angles) * angle_stride + at
    cosine = tl.load(cos + angle, mask=at < half, other=0.0).to(WIDE)
    sine = tl.load(sin + angle, mask=at < half, other=0.0).to(WIDE)
    out += token * (heads + 2 * key_heads) * size
    grad_q += row * q_row + column * q_token
    _turn_back(grad_q, q_head, out, cosine, sine, heads, half, size, WIDE, HEADS, HALF, REST)
    out += heads * size
    grad_k += row * k_row + column * k_token
    _turn_back(grad_k, k_head, out, cosine, sine, key_heads, half, size, WIDE, KEY_HEADS, HALF, REST)
    out += key_heads * size
    head, at = tl.arange(0, KEY_HEADS)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (head < key_heads) & (at < size)
    value = tl.load(grad_v + row * v_row + column * v_token + head * v_head + at, mask=inside, other=0.0)
    tl.store(out + head * size + at, value, mask=inside)


@triton.jit
def gate(both, out, width, both_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of a row: silu(first half of `both`) x second half."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    closed = tl.load(both + row * both_stride + at, mask=inside, other=0.0).to(WIDE)
    up = tl.load(both + row * both_stride + width + at, mask=inside, other=0.0).to(WIDE)
    opened = (closed / (1.0 + tl.exp(-closed))).to(both.dtype.element_ty).to(WIDE)
    tl.store(out + row * width + at, opened * up, mask=inside)


@triton.jit
def gate_backward(
    grad, both, out, made, width, grad_stride, both_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A piece of a row: the gradient of `both` into `out`, and what `gate` made of it into `made`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    back = tl.load(grad + row * grad_stride + at, mask=inside, other=0.0).to(WIDE)
    closed = tl.load(both + row * both_stride + at, mask=inside, other=0.0).to(WIDE)
    up = tl.load(both + row * both_stride + width + at, mask=inside, other=0.0).to(WIDE)
    share = 1.0 / (1.0 + tl.exp(-closed))
    opened = (closed * share).to(both.dtype.element_ty).to(WIDE)
    tl.store(made + row * width + at, opened * up, mask=inside)
    tl.store(out + row * 2 * width + at, back * up * share * (1.0 + closed * (1.0 - share)), mask=inside)
    tl.store(out + row * 2 * width + width + at, back * opened, mask=inside)


@triton.jit
def _with_lora(
    both, down, wide, row, at, inside, width, rank, both_stride, down_stride, wide_stride, scaling,
    WIDE: tl.constexpr, NARROW: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """(gate, up) of a tile in `WIDE`: what the frozen weights gave, and LoRA's scaling x down wide^T."""
    place = both + row[:, None] * both_stride + at[None, :]
    closed = tl.load(place, mask=inside, other=0.0).to(WIDE)
    up = tl.load(place + width, mask=inside, other=0.0).to(WIDE)
    rank_at = tl.arange(0, RANK)
    narrow = tl.load(down + row[:, None] * down_stride + rank_at[None, :], mask=rank_at[None, :] < rank, other=0.0).to(
        NARROW
    )
    place = wide + at[None, :].to(tl.int64) * wide_stride + rank_at[:, None]
    known = (at[None, :] < width) & (rank_at[:, None] < rank)
    closed += scaling * tl.dot(narrow, tl.load(place, mask=known, other=0.0).to(NARROW), input_precision="ieee")
    place += tl.cast(width, tl.int64) * wide_stride
    up += scaling * tl.dot(narrow, tl.load(place, mask=known, other=0.0).to(NARROW), input_precision="ieee")
    # rounded as the product of a whole projection is
    return closed.to(both.dtype.element_ty).to(WIDE), up.to(both.dtype.element_ty).to(WIDE)


@triton.jit
def gate_sum(
    both, down, wide, out, rows, width, rank, both_stride, down_stride, wide_stride, scaling,
    WIDE: tl.constexpr, NARROW: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A tile: `gate` of `both` with its LoRA."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (at[None, :] < width)
    row = tl.where(row < rows, row, 0)  # what is read of it is not written
    closed, up = _with_lora(
        both, down, wide, row, at, inside, width, rank, both_stride, down_stride, wide_stride, scaling,
        WIDE, NARROW, RANK,
    )  # fmt: skip
    opened = (closed / (1.0 + tl.exp(-closed))).to(both.dtype.element_ty).to(WIDE)
    tl.store(out + row[:, None] * width + at[None, :], opened * up, mask=inside)


@triton.jit
def gate_sum_backward(
    grad, both, down, wide, out, made, rows, width, rank, grad_stride, both_stride, down_stride, wide_stride, scaling,
    WIDE: tl.constexpr, NARROW: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A tile: the gradient of `both` with its LoRA into `out`, and what `gate_sum` made of it into `made`."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (at[None, :] < width)
    row = tl.where(row < rows, row, 0)
    closed, up = _with_lora(
        both, down, wide, row, at, inside, width, rank, both_stride, down_stride, wide_stride, scaling,
        WIDE, NARROW, RANK,
    )  # fmt: skip
    back = tl.load(grad + row[:, None] * grad_stride + at[None, :], mask=inside, other=0.0).to(WIDE)
    share = 1.0 / (1.0 + tl.exp(-closed))
    opened = (closed * share).to(both.dtype.element_ty).to(WIDE)
    tl.store(made + row[:, None] * width + at[None, :], opened * up, mask=inside)
    place = out + row[:, None] * 2 * width + at[None, :]
    tl.store(place, back * up * share * (1.0 + closed * (1.0 - share)), mask=inside)
    tl.store(place + width, back * opened, mask=inside)


@triton.jit
def cross_entropy(
    logits, labels, losses, words, stride, scale, GRADIENT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row: its loss, and (softmax - label) x scale in place of its logits where `GRADIENT`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    wanted = tl.load(logits + label).to(WIDE)  # before anything is written
    highest = tl.full((), float("-inf"), WIDE)
    total = tl.full((), 0.0, WIDE)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(logits + at, mask=at < words, other=float("-inf")).to(WIDE)
        higher = tl.maximum(highest, tl.max(part, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(part - higher), 0)
        highest = higher
    norm_of_row = highest + tl.log(total)
    tl.store(losses + row, norm_of_row - wanted)
    if GRADIENT:
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            part = tl.load(logits + at, mask=at < words, other=float("-inf")).to(WIDE)
            share = tl.exp(part - norm_of_row) - tl.where(at == label, 1.0, 0.0)
            tl.store(logits + at, share * scale, mask=at < words)
