"""Attention over documents, one causal call each, so that no document ever sees another and no mask is built.

A block-diagonal mask over a pack of S tokens costs S x S and takes SDPA off its fast kernels; one causal call a
document costs the sum of their squares. The window of Phi-3-mini-4k (2,047 tokens) needs masks only in documents
that exceed it. On a GPU in half precision a variable-length kernel does all documents in one call, where one is
proved right (see `varlen_kernels`).
"""

# This module registers functions with transformers; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.speed.bounds import Documents
from phi3_lora_plugin.speed.varlen_kernels import repeated

#: The name in `AttentionInterface`. Without documents it is transformers' "sdpa", masks included.
NAME = "phi3_documents"

_LEAST_CHUNK = 512  # queries that share one mask, where documents exceed a window shorter than that


def document_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, or transformers' SDPA where no documents are named.

    Args:
        query: [1, heads, tokens, head size]; `key` and `value` have as many heads or an even share of them (GQA).
        attention_mask: None beside documents.

    Returns:
        ([1, tokens, heads, head size], None), as every attention function of transformers.

    Raises:
        Phi3LoraError: a mask or a cache came along with documents, or they do not end where the tokens do.
    """
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        stock: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return stock
    tokens, end = query.shape[2], documents.bounds[-1]
    if attention_mask is not None:
        raise Phi3LoraError("documents attend to themselves without attention_mask, and one came along")
    if key.shape[2] != tokens or query.shape[0] != 1 or end != tokens:
        raise Phi3LoraError(
            f"documents end at {end} in {query.shape[0]} row(s) of {tokens} queries and {key.shape[2]} keys; "
            "expected one row that ends there, without a cache"
        )
    windowed = sliding_window is not None and documents.longest > sliding_window
    window = sliding_window if windowed else None
    if torch.is_autocast_enabled(query.device.type):
        # as autocast casts for SDPA: rotated queries and keys of a float32 base are float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = documents.kernels.kernel_for(query, windowed) if dropout == 0.0 else None
    if kernel is not None:
        return kernel(query, key, value, documents.limits, documents.longest, scaling, window), None
    return one_by_one(query, key, value, documents.bounds, scaling, dropout, window), None


def one_by_one(
    query: Any, key: Any, value: Any, bounds: Sequence[int], scaling: float | None, dropout: float, window: int | None
) -> torch.Tensor:
    """[1, tokens, heads, head size]; the twin of the kernels."""
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        q, k, v = (part[:, :, start:stop] for part in (query, key, value))
        if window is not None and stop - start > window:
            parts += _over_the_window(q, k, v, scaling, dropout, window)
        else:
            parts.append(_attend(q, k, v, None, scaling, dropout))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out.transpose(1, 2)


def _over_the_window(
    query: Any, key: Any, value: Any, scaling: float | None, dropout: float, window: int
) -> list[torch.Tensor]:
    """One document a few queries at a time, each with the keys that some of them see: a long one has no S x S mask."""
    tokens, step = query.shape[2], max(window, _LEAST_CHUNK)
    parts = []
    for start in range(0, tokens, step):
        stop, first = min(start + step, tokens), max(0, start - window + 1)
        # transformers lets a token see the `window` last ones, itself included
        mask = torch.ones(stop - start, stop - first, dtype=torch.bool, device=query.device)
        mask = mask.tril(start - first).triu(start - first - window + 1)
        inside = query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        parts.append(_attend(*inside, mask, scaling, dropout))
    return parts


def _attend(query: Any, key: Any, value: Any, mask: Any, scaling: float | None, dropout: float) -> torch.Tensor:
    """[1, heads, queries, head size]; causal unless there is a mask."""
    causal = mask is None
    shared = query.shape[1] != key.shape[1]
    if shared and not _shares_keys(query, key, value, mask, dropout):
        key, value, shared = repeated(key, query.shape[1]), repeated(value, query.shape[1]), False
    # The argument came with torch 2.5; without shared keys it is not needed.
    gqa = {"enable_gqa": True} if shared else {}
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, **gqa
    )


def _shares_keys(query: Any, key: Any, value: Any, mask: Any, dropout: float) -> bool:
    """Whether a fast kernel of SDPA shares keys among heads here; where none does, it takes S x S a head.

    Flash takes no mask and memory-efficient attention no shared keys (pytorch/pytorch, `sdp_utils.cpp`).
    """
    if mask is not None:
        return False
    if query.device.type != "cuda":
        return bool(query.device.type == "cpu")
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return bool(can_use_flash_attention(SDPAParams(query, key, value, None, dropout, True, True)))


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
