"""Attention over documents on a CPU, with its gradient: products over a block of queries and the keys that they see.

PyTorch's kernel for CPUs is called once a document, and its gradient in 16 bits takes longer than that in float32. Here
scores, softmax and their gradients are float32 and the products that leave them are in the dtype of the input, as in
FlashAttention (Dao 2023, arXiv 2307.08691), whose equations these are; a block of scores stays in a core's cache. Its twin
is `sdpa.one_by_one`.
"""

# This module defines an autograd function, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch  # noqa: TID253

#: Queries of a block: at most, and at least where there are more, down to `_CACHED` scores of all heads.
_MOST, _LEAST, _CACHED = 128, 64, 2**19

#: float16 is left to SDPA: CPUs multiply it slowly.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """query [heads, tokens, size], key and value [key heads, tokens, size] -> [tokens, heads, size]."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bounds: Any, scale: float, window: int | None) -> Any:
        heads, tokens, size = query.shape
        out = query.new_empty(tokens, heads, size)
        causal = _causal(query)
        for start, stop in pairwise(bounds):
            q, k, v = (part[:, start:stop] for part in (query, key, value))
            exact = k.to(causal.dtype)
            for block in _blocks(q, window):
                share = _shares(q, exact, block, scale, causal, window).to(v.dtype)
                attended = torch.bmm(share, v[:, block.first : block.stop])
                out[start + block.start : start + block.stop] = _by_head(attended, heads).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        ctx.how = bounds, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, out = ctx.saved_tensors
        bounds, scale, window = ctx.how
        heads, tokens, size = query.shape
        grads = [torch.empty_like(grad[:, : len(part)]).transpose(0, 1) for part in (query, key, value)]
        causal = _causal(query)
        grad, out = grad.transpose(0, 1), out.transpose(0, 1)
        for start, stop in pairwise(bounds):
            q, k, v, ahead, made = (part[:, start:stop] for part in (query, key, value, grad, out))
            grad_q, grad_k, grad_v = (part[:, start:stop] for part in grads)
            exact_k, exact_v = k.to(causal.dtype), v.to(causal.dtype)
            # of each query: the sum over keys of share x gradient of that share
            mean = torch.linalg.vecdot(ahead.to(causal.dtype), made.to(causal.dtype)).unsqueeze(-1)
            blocks = list(_blocks(q, window))
            sums = None if len(blocks) == 1 else [torch.zeros_like(exact_k), torch.zeros_like(exact_v)]
            for block in blocks:
                rows, seen = slice(block.start, block.stop), slice(block.first, block.stop)
                share = _shares(q, exact_k, block, scale, causal, window)
                into = _grouped(ahead[:, rows], len(k))
                scores = torch.bmm(into.to(causal.dtype), exact_v[:, seen].transpose(1, 2))
                scores = scores.sub_(_grouped(mean[:, rows], len(k))).mul_(share).to(q.dtype)
                share = share.to(q.dtype)
                grad_q[:, rows] = _by_head(torch.bmm(scores, k[:, seen]).mul_(scale), heads)
                into_k = torch.bmm(scores.transpose(1, 2), _grouped(q[:, rows], len(k)))
                into_v = torch.bmm(share.transpose(1, 2), into)
                if sums is None:
                    torch.mul(into_k, scale, out=grad_k)
                    grad_v.copy_(into_v)
                else:
                    sums[0][:, seen].add_(into_k, alpha=scale)
                    sums[1][:, seen].add_(into_v)
            if sums is not None:
                grad_k.copy_(sums[0])
                grad_v.copy_(sums[1])
        return (*grads, None, None, None)


class _Block:
    """Queries `start` to `stop` of a document; they see keys from `first` on, the last of them up to `stop`."""

    __slots__ = ("first", "start", "stop")

    def __init__(self, first: int, start: int, stop: int) -> None:
        self.first, self.start, self.stop = first, start, stop


def _blocks(query: torch.Tensor, window: int | None) -> Iterator[_Block]:
    heads, tokens, _ = query.shape
    most = min(_MOST, max(_LEAST, _CACHED // (heads * tokens)))
    step = -(-tokens // -(-tokens // most))
    for start in range(0, tokens, step):
        first = 0 if window is None else max(0, start - window + 1)
        yield _Block(first, start, min(start + step, tokens))


def _shares(q: Any, key: Any, block: _Block, scale: float, causal: torch.Tensor, window: int | None) -> torch.Tensor:
    """[key heads, queries of all heads that share one, keys]: what each query takes of each value, in float32."""
    rows = _grouped(q[:, block.start : block.stop], len(key)).to(key.dtype) * scale
    scores = torch.bmm(rows, key[:, block.first : block.stop].transpose(1, 2))
    count = block.stop - block.start
    each = scores.view(len(key), -1, count, block.stop - block.first)
    each[..., block.start - block.first :].add_(causal[:count, :count])
    if window is not None and (over := block.stop - block.first - window) > 0:
        # a query sees its `window` last tokens, itself included
        hidden = torch.ones(count, over, dtype=torch.bool).tril(block.start - block.first - window)
        each[..., :over].masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def _causal(query: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of a block's queries and keys: -inf where the key comes later."""
    exact = torch.promote_types(torch.float32, query.dtype)
    return torch.full((_MOST, _MOST), -torch.inf, dtype=exact).triu_(1)


def _grouped(part: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[heads, rows, size] -> [key heads, heads a key head x rows, size]."""
    heads, rows, size = part.shape
    return part if heads == key_heads else part.reshape(key_heads, heads // key_heads * rows, size)


def _by_head(part: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_grouped`."""
    return part.view(heads, -1, part.shape[-1])


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
