"""Attention over packed rows, document by document, so that no document ever sees another and no mask is built.

A block-diagonal mask over a pack of S tokens costs S x S and takes SDPA off its fast kernels; one causal call a
document costs the sum of their squares. The window of Phi-3-mini-4k (2,047 tokens) needs a mask only in documents
that exceed it.
"""

# This module registers a function with transformers; it is imported only inside functions.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253

#: The name in `AttentionInterface`. It is in no mask interface, hence transformers builds no mask for it.
NAME = "phi3_packed"


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, per document where `cu_seq_lens_q` says where documents begin.

    Args:
        query: [batch, heads, tokens, head size]; `key` and `value` have as many heads or an even share of them (GQA).
        attention_mask: must be None: padding stands on the right, where causality hides it.
        cu_seq_lens_q: [documents + 1] first token of each document of a batch of one row, and the end.

    Returns:
        ([batch, tokens, heads, head size], None), as every attention function of transformers.

    Raises:
        ValueError: a mask came along with packed documents, or tokens outnumber what is packed.
    """
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes right-padded or packed rows without attention_mask, and got one")
    tokens = query.shape[2]
    if key.shape[2] != tokens:
        raise ValueError(f"attention {NAME!r} is for training: {tokens} queries over {key.shape[2]} keys need a cache")
    bounds = [0, tokens] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    if bounds[-1] != tokens or (len(bounds) > 2 and query.shape[0] != 1):
        raise ValueError(
            f"packed documents end at {bounds[-1]} in {query.shape[0]} row(s) of {tokens} tokens; expected one row"
        )
    parts = [
        _causal(
            query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], scaling, dropout, sliding_window
        )
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out.transpose(1, 2), None


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


def register_attention() -> str:
    """Make `NAME` known to transformers (doing it twice is harmless) and return it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME
