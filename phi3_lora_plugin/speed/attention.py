"""Attention over documents, one causal call each, so that no document ever sees another and no mask is built.

A block-diagonal mask over a pack of S tokens costs S x S and takes SDPA off its fast kernels; one causal call a
document costs the sum of their squares. The window of Phi-3-mini-4k (2,047 tokens) needs a mask only in documents
that exceed it. On a GPU in half precision PyTorch's own variable-length kernel does all documents in one call.
"""

# This module registers functions with transformers; it is imported only inside functions.
from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError

log = logging.getLogger(__name__)

#: The name in `AttentionInterface`. Without documents it is transformers' "sdpa", masks included.
NAME = "phi3_documents"


def document_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, or transformers' SDPA where no documents are named.

    Args:
        query: [1, heads, tokens, head size]; `key` and `value` have as many heads or an even share of them (GQA).
        attention_mask: None beside documents.
        documents: first token of each document, and the end: [0, ..., tokens].

    Returns:
        ([1, tokens, heads, head size], None), as every attention function of transformers.

    Raises:
        ValueError: a mask or a cache came along with documents, or they do not end where the tokens do.
    """
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        stock: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return stock
    tokens = query.shape[2]
    if attention_mask is not None:
        raise Phi3LoraError("documents attend to themselves without attention_mask, and one came along")
    if key.shape[2] != tokens or query.shape[0] != 1 or documents[-1] != tokens:
        raise Phi3LoraError(
            f"documents end at {documents[-1]} in {query.shape[0]} row(s) of {tokens} queries and {key.shape[2]} keys; "
            "expected one row that ends there, without a cache"
        )
    if dropout == 0.0 and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        out = _in_one_call(query, key, value, scaling, sliding_window, documents)
        if out is not None:
            return out, None
    return _one_by_one(query, key, value, scaling, dropout, sliding_window, documents), None


def _one_by_one(
    query: Any, key: Any, value: Any, scaling: float | None, dropout: float, window: int | None, bounds: Sequence[int]
) -> torch.Tensor:
    """[1, tokens, heads, head size]; the twin of the kernel."""
    parts = [
        _causal(
            query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], scaling, dropout, window
        ).transpose(1, 2)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _causal(
    query: Any, key: Any, value: Any, scaling: float | None, dropout: float, window: int | None
) -> torch.Tensor:
    tokens = query.shape[2]
    mask = None
    if window is not None and tokens > window:
        # transformers lets a token see the `window` last ones, itself included
        distance = torch.arange(tokens, device=query.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < window)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _in_one_call(
    query: Any, key: Any, value: Any, scaling: float | None, window: int | None, bounds: Sequence[int]
) -> torch.Tensor | None:
    """[1, tokens, heads, head size] from PyTorch's kernel (2.10 and later), where it is there and proved right."""
    sizes = (query.shape[1], key.shape[1], query.shape[3], window is not None)
    if not _kernel_is_right(str(query.device), query.dtype, *sizes):
        return None
    return _kernel(query, key, value, scaling, window, bounds)


def _kernel(
    query: Any, key: Any, value: Any, scaling: float | None, window: int | None, bounds: Sequence[int]
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    limits = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
    rows = [part[0].transpose(0, 1).contiguous() for part in (query, key, value)]
    out: torch.Tensor = varlen_attn(
        *rows,
        limits,
        limits,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


@cache
def _kernel_is_right(
    device: str, dtype: torch.dtype, heads: int, key_heads: int, head_size: int, windowed: bool
) -> bool:
    """Whether the kernel is there and gives, with gradients, what one SDPA call a document gives; tried once."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
            return False
        draw = torch.Generator(device).manual_seed(0)
        shapes = [(1, count, 40, head_size) for count in (heads, key_heads, key_heads)]
        inputs = [torch.randn(shape, generator=draw, device=device, dtype=dtype) for shape in shapes]
        window, bounds = (7 if windowed else None), [0, 3, 24, 40]
        results = []
        for fast in (True, False):
            with torch.enable_grad():
                q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
                one_call = partial(_kernel, q, k, v, None) if fast else partial(_one_by_one, q, k, v, None, 0.0)
                out = one_call(window, bounds)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        return all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(*results, strict=True))
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        log.info("documents attend one by one: %s", error)
        return False


def register_attention() -> str:
    """Make `NAME` known to transformers (doing it twice is harmless) and return it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


#: Whether the decoder that is being run attends by documents, which need no mask.
by_documents: ContextVar[bool] = ContextVar("by_documents", default=False)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    made: torch.Tensor | None = None if by_documents.get() else sdpa_mask(*args, **kwargs)
    return made
