"""One SDPA call a document: the slow twin of the kernels, and what runs where no kernel is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # noqa: TID253

_LEAST_CHUNK = 512  # queries that share one mask, where documents exceed a window shorter than that


def one_by_one(
    query: Any, key: Any, value: Any, bounds: Sequence[int], scaling: float | None, dropout: float, window: int | None
) -> torch.Tensor:
    """[1, tokens, heads, head size]; the twin of the kernels."""
    parts = []
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    # Split at once: the gradient of each slice would be written into zeros of the whole shape, and these added up.
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        if window is not None and q.shape[2] > window:
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


def repeated(part: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values [rows, key heads, tokens, size], each once for each of its query heads [.., heads, ..]."""
    rows, own, tokens, size = part.shape
    return part[:, :, None].expand(rows, own, heads // own, tokens, size).reshape(rows, heads, tokens, size)
