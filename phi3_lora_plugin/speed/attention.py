"""Attention over documents, one causal call each, so that no document ever sees another and no mask is built.

A block-diagonal mask over a pack of S tokens costs S x S and takes SDPA off its fast kernels; one causal call a
document costs the sum of their squares. The window of Phi-3-mini-4k (2,047 tokens) needs masks only in documents
that exceed it. On a GPU in half precision a variable-length kernel does all documents in one call, where one is
proved right (see `varlen_kernels`).
"""

# This module registers functions with transformers; it is imported only inside functions.
from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.speed import cpu_attention
from phi3_lora_plugin.speed.bounds import Documents
from phi3_lora_plugin.speed.device_kind import device_kind
from phi3_lora_plugin.speed.sdpa import one_by_one

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
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, or transformers' SDPA where no documents are named.

    Args:
        query: [1, heads, tokens, head size]; `key` and `value` have as many heads or an even share of them (GQA).
        attention_mask: None or `no_mask` with documents.

    Returns:
        ([1, tokens, heads, head size], None), as every attention function of transformers.

    Raises:
        Phi3LoraError: a mask or a cache came along with documents, or they do not end where the tokens do.
    """
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None
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
    if by_blocks(query) and dropout == 0.0 and query.requires_grad:  # without a gradient SDPA is faster
        return cpu_attention.attend(query, key, value, documents.bounds, scaling, window), None
    return one_by_one(query, key, value, documents.bounds, scaling, dropout, window), None


def by_blocks(x: torch.Tensor) -> bool:
    """Whether `cpu_attention` is the faster way to train in the dtype of `x`, where it is."""
    return device_kind(x) == "cpu" and x.dtype in cpu_attention.DTYPES


def register_attention() -> str:
    """Make `NAME` known to transformers (doing it twice is harmless) and return it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def attend_by(base: Any, name: str) -> None:
    """Let all layers of this causal model attend by `name`, as well as those that PEFT copied with their config.

    It copies what `modules_to_save` names, and layers that it replicates.
    """
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    for module in base.modules():
        config: Any = getattr(module, "config", None)
        if config is not base.config and getattr(config, "_attn_implementation", None) == before:
            config._attn_implementation = name


#: Whether the decoder that is being run attends by documents, which need no mask.
by_documents: ContextVar[bool] = ContextVar("by_documents", default=False)


#: Whether the host knows that a batch has padding which its mask has to hide, and need not ask the card for it.
needs_mask: ContextVar[bool] = ContextVar("needs_mask", default=False)


def no_mask(attention: str, device: torch.device) -> torch.Tensor | None:
    """What says that no mask is needed: None, or, to attention by `NAME`, a mask with nothing in it.

    transformers hands masks of four dimensions on as they are. Without one it looks for documents in the positions,
    and the host waits for a card that has to say whether there are any.
    """
    return torch.empty((0, 0, 0, 0), dtype=torch.bool, device=device) if attention == NAME else None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    if "allow_is_causal_skip" in kwargs and not torch.compiler.is_compiling() and needs_mask.get():
        kwargs["allow_is_causal_skip"] = False  # for which the values of the mask would be looked at
    without = not torch.compiler.is_compiling() and by_documents.get()
    made: torch.Tensor | None = None if without else sdpa_mask(*args, **kwargs)
    return made
