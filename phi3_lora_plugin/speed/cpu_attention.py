"""Attention over documents on a CPU, with its gradient: products over a block of queries and the keys that they see.

PyTorch's kernel for CPUs takes longer for its gradient in 16 bits than in float32, and autograd adds up slices of all
tokens document by document. Here scores, shares and their gradients are float32, and what they are multiplied with
has the dtype of the input, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691), whose equations these are. A block of
scores stays in a core's cache; none is kept for backward. The twin is `sdpa.one_by_one`.
"""

# This module defines an autograd function, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed.first_order import first_order

#: Queries of a block: at most, and at least where there are more, down to `_CACHED` scores of all heads.
_MOST, _LEAST, _CACHED = 192, 64, 2**19

#: float16 is left to SDPA: CPUs multiply it slowly.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """query [heads, tokens, size], key and value [key heads, tokens, size] -> [tokens, heads, size]."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bounds: Any, scale: float, window: int | None) -> Any:
        heads, tokens, size = query.shape
        out = query.new_empty(tokens, heads, size)
        dtype = torch.promote_types(torch.float32, query.dtype)  # float64 stays what it is
        rows, keys, later = query.to(dtype), key.to(dtype), _later(dtype)
        for block in _blocks(bounds, heads, window):
            shares = _shares(rows, keys, block, later, scale, window).to(value.dtype)
            attended = torch.bmm(shares, value[:, block.first : block.stop])
            out[block.start : block.stop] = attended.view(heads, -1, size).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        ctx.how = bounds, scale, window
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, out = ctx.saved_tensors
        bounds, scale, window = ctx.how
        heads, _, size = query.shape
        grad, out = grad.transpose(0, 1), out.transpose(0, 1)
        dtype = torch.promote_types(torch.float32, query.dtype)
        rows, keys, values, later = query.to(dtype), key.to(dtype), value.to(dtype), _later(dtype)
        ahead = grad.to(dtype)
        # of each query: the sum over keys of its share x the gradient of that share
        means = torch.linalg.vecdot(ahead, out.to(dtype)).unsqueeze_(-1)
        grad_q, grad_k, grad_v = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(bounds, heads, window):
            asks, seen = slice(block.start, block.stop), slice(block.first, block.stop)
            shares = _shares(rows, keys, block, later, scale, window)
            scores = torch.bmm(_grouped(ahead[:, asks], len(key)), values[:, seen].transpose(1, 2))
            scores = scores.sub_(_grouped(means[:, asks], len(key))).mul_(shares).to(query.dtype)
            grad_q[:, asks] = torch.bmm(scores, key[:, seen]).view(heads, -1, size)
            grad_k[:, seen] += torch.bmm(scores.transpose(1, 2), _grouped(query[:, asks], len(key)))
            grad_v[:, seen] += torch.bmm(shares.to(query.dtype).transpose(1, 2), _grouped(grad[:, asks], len(key)))
        grad_k = grad_k.mul_(scale).to(query.dtype)
        return grad_q.mul_(scale), grad_k, grad_v.to(query.dtype), None, None, None


@dataclass(frozen=True)
class _Block:
    """Queries `start` to `stop` of a document; they see keys from `first` on, the last of them up to `stop`."""

    first: int
    start: int
    stop: int


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _blocks(bounds: tuple[int, ...], heads: int, window: int | None) -> tuple[_Block, ...]:
    blocks = []
    for begin, end in pairwise(bounds):
        most = min(_MOST, max(_LEAST, _CACHED // (heads * (end - begin))))
        step = -(-(end - begin) // -(-(end - begin) // most))
        for start in range(begin, end, step):
            first = begin if window is None else max(begin, start - window + 1)
            blocks.append(_Block(first, start, min(start + step, end)))
    return tuple(blocks)


def _shares(rows: Any, keys: Any, block: _Block, later: Any, scale: float, window: int | None) -> torch.Tensor:
    """[key heads, queries of all heads that share one, keys]: what each query takes of each value."""
    asks = _grouped(rows[:, block.start : block.stop], len(keys))
    seen = keys[:, block.first : block.stop].transpose(1, 2)
    scores = torch.baddbmm(asks.new_empty(1, 1, 1), asks, seen, beta=0, alpha=scale)  # beta 0: the first is not read
    count, before = block.stop - block.start, block.start - block.first
    each = scores.view(len(keys), -1, count, before + count)
    each[..., before:] += later[:count, :count]
    if window is not None and (over := before + count - window) > 0:
        # a query sees its `window` last tokens, itself included
        hidden = torch.ones(count, over, dtype=torch.bool).tril(before - window)
        each[..., :over].masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def _later(dtype: torch.dtype) -> torch.Tensor:
    """[queries, keys] of a block, added to scores: -inf where a key comes later than the query."""
    return torch.full((_MOST, _MOST), -torch.inf, dtype=dtype).triu_(1)


def _grouped(part: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[heads, rows, size] -> [key heads, heads a key head x rows, size]."""
    heads, rows, size = part.shape
    return part if heads == key_heads else part.reshape(key_heads, heads // key_heads * rows, size)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """query [1, heads, tokens, size], key and value with as many or fewer heads -> [1, tokens, heads, size]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = query.squeeze(0), key.squeeze(0), value.squeeze(0)
    out: torch.Tensor = _Attention.apply(*parts, tuple(bounds), scale, window)
    return out.unsqueeze(0)
